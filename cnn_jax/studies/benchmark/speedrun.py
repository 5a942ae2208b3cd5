"""The CIFAR-10 speedrun, several times with fresh seeds: accuracy and training time.

The time is that of the training steps with their data, summed over the epochs. Compilation, loading
and evaluation are outside it; the original counts its evaluation too.
"""

import dataclasses
import secrets
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


def speedrun(count: int, data_dir: str | None) -> None:
    """Prints a line for each run, and the summary."""
    found = []
    for run in runs(count, data_dir):
        found.append(run)
        print("seed {seed}: {test_accuracy:.4f} in {seconds:.2f} s".format(**run), flush=True)
    print(summary(found))
