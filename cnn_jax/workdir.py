"""A run's folder: config.json, metrics.jsonl, the lock; checkpoints/ is checkpoint.py's.

A workdir is self-sufficient: evaluate, predict and report need nothing but it and the data.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cnn_jax import config as configs
from cnn_jax import parallel
from cnn_jax.errors import CheckpointError, ConfigError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def prepare(workdir: Path) -> None:
    """Makes the folder.

    Raises:
      CheckpointError: it is a file, or cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(f"workdir={workdir}: is a file or below one; name a folder") from None
    except OSError as error:
        raise CheckpointError(f"workdir={workdir}: cannot be made: {error.strerror}") from None
    try:
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"workdir={workdir}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir for one training run; the system frees it when the process ends or dies.

    Raises:
      CheckpointError: another process holds it; names that process.
    """
    if not parallel.is_main_process():
        yield
        return
    with open(workdir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CheckpointError(
                f"workdir={workdir}: in use by {file.read().strip() or 'another process'}; "
                "wait for it, or choose another workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_config(workdir: Path, config: configs.Config, experiment: str, about: dict) -> None:
    """Writes config.json: what was asked for, the data's classes and image shape, versions."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    saved = {
        "experiment": experiment,
        "config": configs.to_json(config),
        **about,
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
        },
    }
    write_json(workdir / "config.json", saved)


def read_config(workdir: Path) -> dict:
    """The content of config.json.

    Raises:
      CheckpointError: no run has been started in `workdir`, or the file is damaged.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
        if not {"config", "class_names", "image_shape"} <= saved.keys():
            raise ValueError("incomplete")
        return saved
    except FileNotFoundError:
        there = "holds no config.json" if workdir.is_dir() else "no such folder"
        raise CheckpointError(f"workdir={workdir}: {there}, so no run to read") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def check_same_run(workdir: Path, config: configs.Config) -> bool:
    """Whether `workdir` holds an earlier part of this run.

    Raises:
      ConfigError: it holds another run; lists the fields that differ.
    """
    if not (workdir / "config.json").exists():
        return False
    saved = read_config(workdir)["config"]
    wanted = json.loads(json.dumps(configs.to_json(config)))
    free = set(configs.CHANGEABLE_ON_RESUME)
    if config.schedule == "constant":
        free.add("epochs")
    lines = [
        line for line in configs.differences(saved, wanted) if line.partition(":")[0] not in free
    ]
    if lines:
        raise ConfigError(
            f"workdir={workdir}: holds another run; {'; '.join(lines)} (choose another --workdir)"
        )
    return True


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, one an epoch; a line cut short by a crash is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def keep_metrics_until(workdir: Path, step: int) -> None:
    """Drops the lines of epochs that end after `step`, which will be trained again."""
    kept = [line for line in metrics(workdir) if line["step"] <= step]
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def append_metrics(workdir: Path, line: dict[str, Any]) -> None:
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file as a whole: a reader, or a crash, sees the old text or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)
