"""`train --init_from=WORKDIR[:STEP]`: parameters of a trained run are the first ones of a new run."""

import dataclasses
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import user_path
from cnn_jax.common.remote import is_remote
from cnn_jax.train import checkpoint
from cnn_jax.train.bucket_run import local_copy, shown
from cnn_jax.train.checkpoint import Arrays, Checkpoints, DamagedCheckpoint
from cnn_jax.train.workdir import read_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint from which a run takes its first parameters; config.json records it.

    Attributes:
      path: the source's workdir.
      step: the checkpoint's training step.
      sha256: of its manifest, which holds the SHA-256 of every array.
    """

    path: str
    step: int
    sha256: str

    def arrays(self, verify: bool = True) -> Arrays:
        """The parameters that are evaluated, and the model's other collections, by name.

        Raises:
          CheckpointError: the checkpoint is damaged, missing, or no longer the recorded one.
        """
        checkpoints = Checkpoints(local_copy(self.path))
        found = checkpoints.select(str(self.step), verify=verify, flag=f"--init_from={self.path}:")
        if _sum(checkpoints, self.step) != self.sha256:
            raise CheckpointError(
                f"--init_from={self.path}:{self.step}: is not the checkpoint with which this run began "
                "(another SHA-256); begin anew in another --workdir"
            )
        return evaluated(found.arrays)


def find(text: str | None, workdir: Path | None = None, verify: bool = True) -> Source | None:
    """The source of a run: what its config.json records, or what the flag names for a new run.

    Args:
      text: WORKDIR, WORKDIR:STEP, WORKDIR:latest or WORKDIR:best; None: the flag is not given.
      workdir: the run's folder; None: a new run without one.
      verify: compares the source with its checksums.

    Raises:
      ConfigError: the run in `workdir` began from another source; or `text` names an exported file.
      CheckpointError: the source has no such checkpoint, or it is damaged.
    """
    if workdir and (workdir / "config.json").exists():
        recorded = read_config(workdir).get("init_from")
        recorded = Source(**recorded) if recorded else None
        if text is not None:
            _check_same(text, recorded, workdir)
        return recorded
    if text is None:
        return None
    folder, which = _parse(text)
    if workdir and shown(folder) == shown(workdir):
        raise ConfigError(f"--init_from={text}: is the --workdir of this run; choose another one")
    checkpoints = Checkpoints(folder)
    step = checkpoints.select(which, verify=verify, flag=f"--init_from={shown(folder)}:").step
    return Source(shown(folder), step, _sum(checkpoints, step))


def _parse(text: str) -> tuple[Path, str]:
    """The folder and the checkpoint that `text` names."""
    if is_remote(text):
        kind, _, rest = text.partition("://")
        place, _, which = rest.partition(":")
        return local_copy(f"{kind}://{place}"), which or "latest"
    path, which = user_path(text).absolute(), "latest"
    if not path.exists() and ":" in text:
        before, _, which = text.rpartition(":")
        path = user_path(before).absolute()
    if path.is_file() and zipfile.is_zipfile(path):
        raise ConfigError(
            f"--init_from={text}: an exported file holds a program, not parameters by name; give the "
            "workdir that was exported"
        )
    if not path.is_dir():
        raise CheckpointError(f"--init_from={text}: no such folder; give the workdir of a run")
    return path, which


def _check_same(text: str, recorded: Source | None, workdir: Path) -> None:
    """Refuses a source that is not the recorded one; a recorded one may have been deleted since."""
    if recorded is None:
        raise ConfigError(
            f"--init_from={text}: the run in workdir={workdir} began without it (choose another "
            "--workdir)"
        )
    try:
        folder, which = _parse(text)
        step = int(which) if checkpoint.STEP.fullmatch(which) else recorded.step
        if _sum(Checkpoints(folder), step) == recorded.sha256:
            return
    except CheckpointError:
        if text in (recorded.path, f"{recorded.path}:{recorded.step}"):
            return
    raise ConfigError(
        f"--init_from={text}: the run in workdir={workdir} began from {recorded.path}:{recorded.step}, "
        f"with SHA-256 {recorded.sha256[:12]}...; leave the flag out, or choose another --workdir"
    )


def _sum(checkpoints: Checkpoints, step: int) -> str:
    try:
        return checkpoints.manifest(step)["sha256"]
    except (OSError, ValueError, AttributeError) as error:
        place = checkpoints.folder / str(step)
        raise DamagedCheckpoint(f"{place}: damaged ({checkpoint.reason_of(error)})") from None


def evaluated(arrays: Arrays) -> Arrays:
    """A checkpoint's variables, with the parameters that are evaluated in the place of the trained."""
    average = {
        name.replace("eval_params/", "params/", 1): array
        for name, array in arrays.items()
        if name.startswith("eval_params/")
    }
    variables = {name: a for name, a in arrays.items() if not name.startswith("eval_params/")}
    return variables | average


def fitting(source: Source, arrays: Arrays, wanted: dict[str, Any]) -> Arrays:
    """The arrays that fit a new model; logs what is taken, made anew and left over.

    Args:
      source: for the messages.
      arrays: from `Source.arrays`.
      wanted: the leaves of the new state or their shapes, from `checkpoint.names`.

    Raises:
      ConfigError: not one parameter fits.
    """
    wanted = {n: leaf for n, leaf in wanted.items() if checkpoint.is_variable(n)}
    wanted = evaluated(wanted)
    taken = {
        name: arrays[name]
        for name, leaf in wanted.items()
        if name in arrays and _kind(arrays[name]) == _kind(leaf)
    }
    place = f"{source.path}:{source.step}"
    if not any(name.startswith("params/") for name in taken):
        raise ConfigError(
            f"--init_from={place}: not one of its parameters fits, by name and shape; it has "
            f"{_shapes(arrays)}; the model has {_shapes(wanted)}"
        )
    others = {name: arrays[name] for name in wanted.keys() & arrays.keys() - taken.keys()}
    log.info("init_from %s: %d arrays taken (%s)", place, len(taken), groups(taken))
    for name in sorted(others):
        log.info(
            "  made anew: %s, %s there, %s here", name, *map(_shown, (others[name], wanted[name]))
        )
    if new := wanted.keys() - arrays.keys():
        log.info("  made anew: %d arrays that the source does not have (%s)", len(new), groups(new))
    if left := arrays.keys() - wanted.keys():
        log.info("  left over: %d arrays of the source (%s)", len(left), groups(left))
    return taken


def groups(names: Iterable[str]) -> str:
    """The modules of arrays, each once: "params Conv_0, Conv_1; batch_stats BatchNorm_0"."""
    found: dict[str, dict[str, None]] = {}
    for name in sorted(names):
        collection, *path = name.split("/")
        found.setdefault(collection, {})["/".join(path[:-1]) or path[-1]] = None
    return "; ".join(
        f"{collection} {', '.join([*modules][:12])}{' ...' if len(modules) > 12 else ''}"
        for collection, modules in reversed(found.items())
    )


def _shapes(arrays: dict[str, Any]) -> str:
    shown = [f"{name.removeprefix('params/')} {_shown(a)}" for name, a in sorted(arrays.items())]
    return ", ".join(shown[:4]) + (" ..." if len(shown) > 4 else "")


def _shown(array: Any) -> str:
    return "x".join(map(str, array.shape)) or "a number"


def _kind(array: Any) -> tuple:
    return tuple(array.shape), np.dtype(array.dtype)
