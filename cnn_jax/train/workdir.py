"""A run's working directory: config.json, metrics.jsonl, the lock; checkpoint.py has checkpoints/.

The commands evaluate, predict and report need only a workdir and the data.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from cnn_jax.common import cpu, files
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import library_path, written
from cnn_jax.config import CHANGEABLE_ON_RESUME, Config
from cnn_jax.config.paths import is_path
from cnn_jax.config.serialize import changes, differences, to_json, with_current_names
from cnn_jax.train import parallel
from cnn_jax.train.bucket_run import shown

log = logging.getLogger(__name__)

NEEDED = {"experiment", "config", "class_names", "image_shape"}
NEEDED_OF_CONFIG = {"model", "data", "eval_batch_size", "compute_dtype"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def prepare(workdir: Path) -> None:
    """Creates the folder, and checks that it can be written.

    Raises:
      CheckpointError: it is a file, or cannot be written.
      ConfigError: checkpoints cannot be saved below a path like this.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CheckpointError(
            f"workdir={workdir}: this path or a part of it is a file; name a folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"workdir={workdir}: cannot be made: {error.strerror}") from None
    library_path(workdir)
    try:
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"workdir={workdir}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Locks the workdir for one training run; the system removes the lock when the process ends.

    Yields:
      A function that raises CheckpointError if the workdir was deleted or moved. A later write
      would create another one in its place.

    Raises:
      CheckpointError: another process has the lock; names that process.
    """
    if not parallel.is_main_process():
        yield lambda: None
        return
    path = workdir / "lock"
    with contextlib.ExitStack() as stack:
        with written(path, CheckpointError):
            file = stack.enter_context(open(path, "ab+", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode(errors="replace") or "another process"
            raise CheckpointError(
                f"workdir={shown(workdir)}: in use by {holder}; wait for it, or choose another workdir"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be locked: {error.strerror}") from None
        with written(path, CheckpointError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

        def check() -> None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return
            raise CheckpointError(f"workdir={workdir}: was deleted or moved during the run")

        yield check


def write_config(workdir: Path, config: Config, experiment: str, metadata: dict) -> None:
    """Writes config.json: experiment, configuration, metadata of the data, versions, device.

    Each call of `train` that continues a run writes it again, so it describes the last call. It differs
    from the call before only in the fields that `check_same_run` allows.

    Raises:
      CheckpointError: it cannot be written.
    """
    saved = {"experiment": experiment, "config": to_json(config), **metadata, **machine()}
    path = workdir / "config.json"
    with written(path, CheckpointError):
        write_json(path, saved)


def machine() -> dict[str, dict]:
    """The versions and the device that compute a run."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    about = {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "processor": cpu.name(),
        "cores": cpu.cores(),
        "multiplies_bfloat16": cpu.multiplies_bfloat16(),
    }
    return {"versions": {"python": platform.python_version(), **versions}, "device": about}


def warn_of_other_bits(workdir: Path) -> None:
    """Warns if a run resumes with versions or a device that change the last bits of its numbers.

    XLA splits sums over the cores that a process may use, and chooses its loops by the processor.
    """
    saved, now = read_config(workdir), machine()
    fields = {"versions": ["jax", "jaxlib"], "device": ["kind", "platform", "count"]}
    if now["device"]["platform"] == "cpu":
        fields["device"] += ["processor", "cores"]
    lines = [
        f"{name} {saved[part][name]} -> {now[part][name]}"
        for part, names in fields.items()
        for name in names
        if saved.get(part, {}).get(name, now[part][name]) != now[part][name]
    ]
    if lines:
        log.warning(
            "warning: workdir=%s: the run continues with %s, which changes the last digits of its "
            "numbers",
            shown(workdir),
            "; ".join(lines),
        )


def read_config(workdir: Path) -> dict:
    """The content of config.json.

    Raises:
      CheckpointError: no run has been started in `workdir`, or the file is damaged.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = saved.get("config", {})
        missing = [*(NEEDED - saved.keys()), *(NEEDED_OF_CONFIG - config.keys())]
        if missing or not all(isinstance(config[part], dict) for part in ("model", "data")):
            raise ValueError("incomplete")
        shape = saved["image_shape"]
        if len(shape) != 3 or not all(isinstance(length, int) and length > 0 for length in shape):
            raise ValueError(f"image_shape is {shape}")
        config["data"] = with_current_names(config["data"])
        return saved
    except FileNotFoundError:
        there = "holds no config.json" if workdir.is_dir() else "no such folder"
        raise CheckpointError(
            f"workdir={shown(workdir)}: {there}; name the folder of a run"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def check_same_run(workdir: Path, config: Config, metadata: dict) -> None:
    """Checks that a workdir holds an earlier part of this run, or no run.

    Args:
      workdir: the run's folder.
      config: the run. It may change the fields in config.CHANGEABLE_ON_RESUME, and `epochs` if the
        learning rate does not depend on them.
      metadata: the entries of config.json that describe the data; all must be the same.

    Raises:
      ConfigError: it holds another run (lists the differences), or more epochs than `config`.
    """
    if not (workdir / "config.json").exists():
        return
    saved = read_config(workdir)
    free = {*CHANGEABLE_ON_RESUME, *(["epochs"] if config.schedule in ("constant", "step") else [])}
    compared = {name: value for name, value in metadata.items() if name != "fingerprints"}
    lines = differences(
        {name: saved.get(name) for name in compared}, json.loads(json.dumps(compared))
    )
    others = any(line.startswith("data_files:") for line in lines)
    before = str(saved["config"]["data"].get("name"))
    moved = before != config.data.name and is_path(before) and is_path(config.data.name)
    if moved and not others:
        free.add("data.name")
    lines = changes(saved["config"], config, free) + lines
    if others:
        lines.append("images of the dataset were added, removed or changed since")
    if lines:
        raise ConfigError(
            f"workdir={shown(workdir)}: holds another run; {'; '.join(lines)} (choose another "
            "--workdir)"
        )
    done = max((line.get("epoch", 0) for line in metrics(workdir)), default=0)
    if done > config.epochs:
        raise ConfigError(
            f"epochs={config.epochs}: must be at least the {done} that workdir={shown(workdir)} has "
            "done (or choose another --workdir)"
        )
    if metadata:
        _tell_of_other_data(workdir, saved, config, metadata, moved)


def _tell_of_other_data(
    workdir: Path, saved: dict, config: Config, metadata: dict, moved: bool
) -> None:
    """Says that the dataset has moved, and warns of splits that have other examples than before."""
    if moved:
        log.info(
            "workdir=%s: its images have moved from %s to %s; names, classes, splits and sizes in "
            "bytes are the same",
            workdir,
            *(
                files.printable(name)
                for name in (saved["config"]["data"]["name"], config.data.name)
            ),
        )
    before, now = saved.get("fingerprints", {}), metadata.get("fingerprints", {})
    changed = [
        split
        for split in now.keys() & before.keys()
        if any(before[split].get(part, value) != value for part, value in now[split].items())
    ]
    if changed:
        log.warning(
            "warning: workdir=%s: the run continues with other images or labels than before in %s of "
            "%s (fingerprints in config.json)",
            workdir,
            " and ".join(sorted(changed)),
            files.printable(config.data.name),
        )


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl, one per epoch.

    Omits a line cut short by a crash, and a line with NaN, which is not JSON.
    """
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (workdir / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text, parse_constant=_refused)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def keep_metrics_until(workdir: Path, step: int) -> None:
    """Drops the lines of epochs that end after `step`; these epochs will be trained again.

    Raises:
      CheckpointError: it cannot be written.
    """
    kept = [line for line in metrics(workdir) if line["step"] <= step]
    path = workdir / "metrics.jsonl"
    with written(path, CheckpointError):
        write_text(path, "".join(map(line_of, kept)))


def append_metrics(workdir: Path, line: dict[str, Any]) -> None:
    """Adds an epoch's line.

    Raises:
      CheckpointError: it cannot be written.
    """
    path = workdir / "metrics.jsonl"
    with written(path, CheckpointError), open(path, "a", encoding="utf-8") as file:
        file.write(line_of(line))


def line_of(metrics: dict[str, Any]) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(metrics, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file atomically: even after a crash it holds the old text or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):  # a partly written file, as after a full disk
            scratch.unlink(missing_ok=True)
