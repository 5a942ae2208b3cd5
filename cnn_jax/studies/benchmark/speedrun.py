"""The CIFAR-10 speedrun, several times with fresh seeds: accuracy and training time.

The time is that of the training steps with their data, summed over the epochs. Compilation, loading
and evaluation are outside it; the original counts its evaluation too.
"""

import dataclasses
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.experiment import load
from cnn_jax.data.splits import load_splits
from cnn_jax.studies import markdown
from cnn_jax.train import loop

EXPERIMENT = "cifar10/speedrun"


def runs(
    count: int, data_dir: str | None, experiment: str = EXPERIMENT, changes: tuple[str, ...] = ()
) -> Iterator[dict]:
    """Trains `count` times in this process; yields seed, test_accuracy and seconds of each run.

    Args:
      count: how often.
      data_dir: the folder of the dataset, which is loaded once.
      experiment: another one, for a test.
      changes: of its fields, as for --set.

    Raises:
      ConfigError, DataError: the configuration or the dataset is unusable.
    """
    config = load(experiment, changes)
    splits = load_splits(config, data_dir, download=False)
    for _ in range(count):
        seed = secrets.randbelow(2**31)
        with tempfile.TemporaryDirectory() as folder:
            one = dataclasses.replace(config, seed=seed)
            lines = loop.train(one, Path(folder), experiment, splits=splits)
        seconds = sum(line["epoch_seconds"] for line in lines)
        yield {"seed": seed, "test_accuracy": lines[-1]["test_accuracy"], "seconds": seconds}


def summary(found: list[dict]) -> str:
    """Mean and deviation of the accuracies, and the median time, in one line."""
    accuracy = markdown.spread([run["test_accuracy"] for run in found])
    seconds = statistics.median(run["seconds"] for run in found)
    return f"test accuracy {accuracy} (n = {len(found)}), {seconds:.2f} s of training each (median)"


def speedrun(count: int, data_dir: str | None, peer: list[dict]) -> None:
    """Prints a line for each run, and the summary; then that of the `original`, if there is one."""
    found = []
    for run in runs(count, data_dir):
        found.append(run)
        print("seed {seed}: {test_accuracy:.4f} in {seconds:.2f} s".format(**run), flush=True)
    print(summary(found))
    if peer:
        ours, theirs = (statistics.median(run["seconds"] for run in each) for each in (found, peer))
        print(
            f"the original: {summary(peer)}, with its evaluation; ours took {ours / theirs:.2f} of it"
        )


# Prints nothing if the original can run.
_CHECK = """
try:
    import torch, torchvision
    print("" if torch.cuda.is_available() else "a GPU for CUDA, and torch finds none")
except ImportError as error:
    print(f"torch and torchvision in {__import__('sys').executable} ({error})")
"""


def original(script: Path, count: int) -> list[dict]:
    """Runs the original in PyTorch, in its own folder; prints a line for each of `count` runs.

    Args:
      script: airbench94_muon.py of KellerJordan/cifar10-airbench, or another of its scripts that
        prints the same table. It downloads CIFAR-10 on its own.
      count: how many runs, after the one that it begins with to compile. It is ended after them.

    Returns:
      test_accuracy and seconds of each run.

    Raises:
      ConfigError: there is no such file, it cannot run here, or it ended before.
    """
    if not script.is_file():
        raise ConfigError(f"--peer={script}: no such file")
    checked = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True)
    if lacks := checked.stdout.strip():
        raise ConfigError(f"--peer={script}: needs {lacks}")
    found: list[dict] = []
    command, env = [sys.executable, str(script.absolute())], os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=script.parent, env=env
        ) as process,
    ):
        for number, run in enumerate(_rows(process.stdout or ())):
            if number:  # the first run only compiles
                found.append(run)
                print("original: {test_accuracy:.4f} in {seconds:.2f} s".format(**run), flush=True)
            if len(found) == count:
                break
        process.kill()
        process.wait()
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:]
    if len(found) < count:
        raise ConfigError(f"--peer={script}: ended after {len(found)} runs: {' '.join(last)}")
    return found


def _rows(lines: Iterable[str]) -> Iterator[dict]:
    """The runs in the original's table, which has a row for each epoch and one with epoch "eval"."""
    head: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "tta_val_acc" in cells:
            head = cells
        elif "eval" in cells:
            row = dict(zip(head, cells, strict=True))
            accuracy, seconds = float(row["tta_val_acc"]), float(row["time_seconds"])
            yield {"test_accuracy": accuracy, "seconds": seconds}
