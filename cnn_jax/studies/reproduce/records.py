"""Records of finished runs: what of a run is worth keeping in the repository, without its weights.

RECORDS/EXPERIMENT/seed_S/ holds config.json and metrics.jsonl as the run left them, evaluation.json of
the test split, and run.json: commit, versions, device, seconds, FLOPs, command.
"""

import dataclasses
import datetime
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cnn_jax import CHECKOUT
from cnn_jax.common.errors import WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config import Config
from cnn_jax.config.experiment import FOLDER, short_name
from cnn_jax.models import summary
from cnn_jax.train.workdir import PACKAGES, metrics, read_config, write_json

FILES = ("config.json", "metrics.jsonl", "evaluation.json", "run.json")
# What the tables need of run.json, and of each line of metrics.jsonl.
NEEDED = ("device", "versions", "parameters", "training_flops", "training_seconds")
NEEDED_OF_EPOCH = ("epoch", "train_accuracy", "epoch_seconds", "images_per_second")
REPOSITORY = FOLDER.parent


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of a record.

    Attributes:
      seed: of the run.
      config: config.json.
      metrics: the lines of metrics.jsonl.
      evaluation: evaluation.json.
      run: run.json.
    """

    seed: int
    config: dict
    metrics: list[dict]
    evaluation: dict
    run: dict


def folder(records: Path, experiment: str, seed: int) -> Path:
    """Where the record of a run lies; below a workdir, the run itself."""
    return records / short_name(experiment) / f"seed_{seed}"


def read(path: Path) -> Record | None:
    """The record in the folder `path`; None: there is none.

    Raises:
      WorkdirError: it is damaged.
    """
    if not (path / "run.json").exists():  # which is written last
        return None
    try:
        config, evaluation, run = (
            json.loads((path / name).read_text(encoding="utf-8"))
            for name in ("config.json", "evaluation.json", "run.json")
        )
        record = Record(config["config"]["seed"], config, metrics(path), evaluation, run)
        needed = [evaluation["accuracy"], *(run[name] for name in NEEDED)]
        needed += [line[name] for line in record.metrics for name in NEEDED_OF_EPOCH]
        if None in needed or not record.metrics:
            raise ValueError("incomplete")
        return record
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WorkdirError(f"{path}: damaged record ({reason}); delete or restore it") from None


def commit() -> dict[str, Any]:
    """The repository's commit, and whether files other than results differ from it.

    Both are None where there is no git, or this is no checkout.
    """
    if not CHECKOUT:  # another repository may lie around an installed package
        return {"commit": None, "dirty": None}
    try:
        head = _git("rev-parse", "HEAD")
        results = (":!experiments/records", ":!experiments/RESULTS.md")
        return {"commit": head, "dirty": bool(_git("status", "--porcelain", "--", ".", *results))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(path: Path, workdir: Path, config: Config, command: str, origin: dict) -> None:
    """Makes the record of a finished and evaluated run.

    Args:
      path: the record's folder.
      workdir: of the run.
      config: of the run.
      command: that trains it.
      origin: commit and dirty, as `commit` gave them when the run began; processor, its description;
        wall_seconds of its processes, with start, compilation and evaluation.

    Raises:
      WorkdirError: the evaluation is not that of the last epoch, or the disk does not take it.
    """
    saved = read_config(workdir)
    lines = metrics(workdir)
    evaluation = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
    if not lines or evaluation["checkpoint"] != lines[-1]["step"]:
        raise WorkdirError(
            f"{workdir / 'evaluation.json'}: checkpoint={evaluation['checkpoint']} is not that of "
            "the last epoch"
        )
    counted = summary.summarise(config.model, tuple(saved["image_shape"]))
    images = lines[-1]["step"] * config.batch_size
    device = saved["device"]
    on_cpu = device["platform"] == "cpu"
    run = {
        "commit": origin["commit"],
        "dirty": origin["dirty"],
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": origin["processor"] if on_cpu else f"{device['count']} x {device['kind']}",
        "versions": {name: saved["versions"][name] for name in ("python", *PACKAGES)},
        "parameters": counted.parameters,
        "training_flops": counted.training_flops * images,
        "training_images": images,
        "training_seconds": sum(line["epoch_seconds"] for line in lines),
        "wall_seconds": origin["wall_seconds"],
    }
    with written(path, WorkdirError):
        path.mkdir(parents=True, exist_ok=True)
        (path / "run.json").unlink(missing_ok=True)  # until the others are in their place
        for name in FILES[:3]:
            shutil.copyfile(workdir / name, path / name)
        write_json(path / "run.json", run)
