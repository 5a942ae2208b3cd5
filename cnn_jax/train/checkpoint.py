"""Checkpoints that prove themselves. The only file that says orbax.

checkpoints/STEP/ holds, as Orbax items:
  variables  the model's params and its other collections, as batch_stats; eval_params where they differ
  training   the rest of the TrainState: step, opt_state, rng, sums
  manifest   shape, dtype and SHA-256 of every array above, what the run noted, and its own SHA-256

Orbax restores a flipped byte without a word and may read a missing file as zeros. The manifest
holds the sums of the arrays as they were in memory, and becomes visible with them in one rename:
what is restored is what was saved, or it is refused.

Orbax writes; the arrays are read with TensorStore, on which it stands. Orbax's own restore of a
damaged file leaves tracebacks of its threads on the screen, and makes several processes wait for
each other.

A save is done when the checkpoint has been read back: opened as a restore would open it, its sums
compared with those of the arrays in memory. Only then are older ones deleted. One that cannot be
written or read back is told at once and removed; the run goes on from memory and saves again.

Beside the steps there may be damaged-STEP, set aside by a run that went on from an earlier one, and
what a killed run left of a save or of a deletion, which the next run clears away.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from cnn_jax.common.errors import CheckpointError
from cnn_jax.common.files import library_path
from cnn_jax.train import parallel
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.step import TrainState

log = logging.getLogger(__name__)

STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
TRAINING = ("step", "opt_state", "rng", "sums")
Arrays = dict[str, np.ndarray]


class DamagedCheckpoint(CheckpointError):
    """One checkpoint is incomplete or holds other bytes than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
      step: its training step.
      arrays: name ("params/Conv_0/kernel") to NumPy array.
      notes: what the run noted with it.
    """

    step: int
    arrays: Arrays
    notes: dict


class Checkpoints:
    """The checkpoints of a workdir, written in the background, read with proof."""

    def __init__(self, workdir: Path, keep: int = 1):
        """Args:
        workdir: of the run; checkpoints/ need not exist.
        keep: how many of the latest `save` leaves, besides the best.
        """
        self.workdir = Path(workdir).resolve()
        self.folder = self.workdir / "checkpoints"
        self._keep = keep
        self._writer: ocp.AsyncCheckpointer | None = None
        self._proving: Future[None] | None = None  # of the save under way
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._failure: CheckpointError | None = None  # of the last save
        self._failures, self._failed_at = 0, 0.0  # since the last success

    # ------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """Steps for which there is something, ascending; what it is is not looked at."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if STEP.fullmatch(p.name))

    def read(self, step: int, training: bool = True, verify: bool = True) -> Restored:
        """The arrays and notes of one checkpoint.

        Args:
          step: which.
          training: False leaves out what evaluation does not need.
          verify: compares every array with its SHA-256 sum.

        Raises:
          DamagedCheckpoint: it is not what was saved; names what is wrong first.
        """
        folder = self.folder / str(step)
        try:
            manifest = self._manifest(step)
            notes = manifest["notes"]
            if manifest["step"] != step:
                raise ValueError(f"its manifest is that of step {manifest['step']}")
            expected = manifest["arrays"]
            given = library_path(folder)
            full = [name for name, about in expected.items() if 0 not in about["shape"]]
            arrays = _read(given / "variables", filter(_is_variable, full))
            if training:
                arrays |= _read(given / "training", itertools.filterfalse(_is_variable, full))
                empty = {name: about for name, about in expected.items() if name not in full}
                arrays |= {n: np.zeros(a["shape"], a["dtype"]) for n, a in empty.items()}
            for name, array in arrays.items():
                if verify and _describe(array) != expected[name]:
                    raise ValueError(f"{name} differs from its checksum")
        except Exception as error:  # TensorStore and damaged JSON raise many types
            raise DamagedCheckpoint(f"{folder}: damaged ({_reason(error)})") from error
        return Restored(step, arrays, notes)

    def _manifest(self, step: int) -> dict:
        manifest = json.loads((self.folder / str(step) / "manifest" / "metadata").read_bytes())
        if manifest.get("sha256") != _sum_of_manifest(manifest):
            raise ValueError("its manifest differs from its own checksum")
        return manifest

    def newest(self, training: bool = True, verify: bool = True) -> Restored | None:
        """The newest valid checkpoint; damaged ones are named and skipped. None: there are none.

        Raises:
          CheckpointError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step, training, verify)
            except DamagedCheckpoint as error:
                log.warning("warning: skipped %s", error)
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of its {len(steps)} checkpoints is valid; nothing was changed"
            )
        return None

    def select(self, which: str, training: bool = False, verify: bool = True) -> Restored:
        """The checkpoint that --checkpoint names.

        Args:
          which: "latest", "best" (by validation accuracy) or a step.
          training: as in `read`.
          verify: as in `read`.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        if which == "latest":
            return self.newest(training, verify)
        if which == "best":
            best = self._best()
            if best is None:
                raise CheckpointError(
                    f"--checkpoint=best: {self.folder} has no validation accuracy to choose by; "
                    "train with --set data.validation_examples=N"
                )
            return self.read(best, training, verify)
        if which not in map(str, steps):
            raise CheckpointError(
                f"--checkpoint={which}: {self.folder} has latest, best or "
                + ", ".join(map(str, steps))
            )
        return self.read(int(which), training, verify)

    # ------------------------------------------------------------------------------- writing

    def start_writing(self, resume_at: int | None) -> None:
        """Clears away what a dead run left: half-written saves, and damaged later checkpoints.

        Damaged ones are kept as damaged-STEP, out of the way of the steps to be saved again.

        Raises:
          CheckpointError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()
            for step in self.steps():
                if step > (-1 if resume_at is None else resume_at):
                    target = self.folder / f"damaged-{step}"
                    _remove(target)
                    os.rename(self.folder / str(step), target)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written: {error.strerror}") from error

    def save(self, state: TrainState, notes: dict) -> None:
        """Starts to save `state`; returns before its arrays are written.

        A failure is logged at once; `wait` raises it, `failing` and `retry_is_due` tell of it.

        Args:
          state: of NumPy arrays, equal on all processes.
          notes: plain JSON, handed back by `read`.
        """
        self._join()
        # Copied: on a CPU they may be views of buffers that the next step takes over.
        arrays = {name: np.array(value) for name, value in names(state).items()}
        manifest = {
            "step": int(arrays["step"]),
            "notes": notes,
            "arrays": {name: _describe(array) for name, array in arrays.items()},
        }
        manifest["sha256"] = _sum_of_manifest(manifest)
        try:
            self._start(arrays, manifest)
        except Exception as error:
            self._fail(manifest, error)
        else:
            self._proving = self._background.submit(self._prove, manifest)

    def _start(self, arrays: Arrays, manifest: dict) -> None:
        """Hands the arrays to Orbax, which writes them in threads of its own."""
        full = {name: a for name, a in arrays.items() if a.size}  # Orbax refuses the others
        variables = {name: a for name, a in full.items() if _is_variable(name)}
        training = {name: a for name, a in full.items() if name not in variables}
        if not self.folder.is_dir():  # Orbax would make it anew
            raise FileNotFoundError(f"{self.folder} is gone")
        if self._writer is None:
            self._writer = _make_writer()
        self._writer.save(
            library_path(self.folder) / str(manifest["step"]),
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(_nest(variables)),
                training=ocp.args.StandardSave(_nest(training)),
                manifest=ocp.args.JsonSave(manifest),
            ),
        )

    def _prove(self, manifest: dict) -> None:
        """Waits until the save is written, reads it back, then deletes what is no longer kept."""
        try:
            self._writer.wait_until_finished()
            if parallel.is_main_process():
                self._read_back(manifest)
                self._prune(manifest["step"])
        except Exception as error:
            self._fail(manifest, error)
        else:
            self._failure, self._failures = None, 0

    def _read_back(self, manifest: dict) -> None:
        """Removes a checkpoint that is not what was to be saved, which no restore shall find.

        Raises:
          DamagedCheckpoint: what is wrong with it.
        """
        folder = self.folder / str(manifest["step"])
        try:
            if self._manifest(manifest["step"]) != manifest:
                raise ValueError("its manifest is not the one that was saved")
            self.read(manifest["step"])
        except Exception as error:
            _remove(folder)
            raise DamagedCheckpoint(_reason(error).removeprefix(f"{folder}: ")) from error

    def _fail(self, manifest: dict, error: Exception) -> None:
        path = self.folder / str(manifest["step"])
        what = (
            "does not read back" if isinstance(error, DamagedCheckpoint) else "could not be written"
        )
        self._failure = CheckpointError(f"{path}: {what}: {_reason(error)}")
        self._failure.__cause__ = error
        self._failures, self._failed_at = self._failures + 1, time.monotonic()
        log.warning("warning: %s", self._failure)
        self._discard_writer()
        if parallel.is_main_process():
            with contextlib.suppress(OSError):
                self._clear_unfinished()

    def failing(self) -> bool:
        """Whether the last save failed on any process; each must call it at the same place."""
        return bool(parallel.largest(int(self._failure is not None)))

    def retry_is_due(self) -> bool:
        """Whether the last save failed, and long enough ago to try another; as `failing`.

        The pause grows from two seconds to a minute, so that a full disk does not stop the training.
        """
        pause = min(60.0, 2.0**self._failures)
        due = self._failure is not None and time.monotonic() - self._failed_at >= pause
        return bool(parallel.largest(int(due)))

    def wait(self) -> None:
        """Waits until the last save is done.

        Raises:
          CheckpointError: it could not be written, or not be read back; on every process.
        """
        self._join()
        if self.failing():
            raise self._failure or CheckpointError(
                f"{self.folder}: another process could not write the checkpoint"
            )

    def close(self) -> None:
        """Waits until the last save is done and ends the background threads.

        Raises:
          CheckpointError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._discard_writer()
            self._background.shutdown()

    def _join(self) -> None:
        if self._proving is not None:
            self._proving.result()
            self._proving = None

    def _discard_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):  # the same failure again
                writer.close()

    def _clear_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.startswith(".deleting-"):
                _remove(path)

    def _prune(self, newest: int) -> None:
        steps = [step for step in self.steps() if step <= newest]
        for step in set(steps) - {*steps[-self._keep :], self._best()}:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = self.folder / f".deleting-{step}"
            os.rename(self.folder / str(step), doomed)
            _remove(doomed)

    def _best(self) -> int | None:
        """The step with the highest validation accuracy by metrics.jsonl; the first of equals."""
        steps = set(self.steps())
        scores = {
            line["step"]: line["validation_accuracy"]
            for line in workdirs.metrics(self.workdir)
            if line["step"] in steps and isinstance(line.get("validation_accuracy"), float)
        }
        return max(scores, key=scores.get) if scores else None


def verify(workdir: Path) -> int:
    """Checks every checkpoint of a workdir, prints what each is worth; 0, or 4 if one is damaged."""
    if not workdir.is_dir():
        raise CheckpointError(f"workdir={workdir}: no such folder")
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{checkpoints.folder}: holds no checkpoint")
    valid = []
    for step in steps:
        try:
            restored = checkpoints.read(step)
        except DamagedCheckpoint as error:
            print(f"step {step:>8}  {str(error).partition(': ')[2]}")
            continue
        valid.append(step)
        size = sum(array.nbytes for array in restored.arrays.values())
        print(f"step {step:>8}  valid, {len(restored.arrays)} arrays, {size / 1e6:.1f} MB")
    newest = f"training and evaluation go on from step {valid[-1]}" if valid else "none is valid"
    print(f"{len(valid)} of {len(steps)} checkpoints are valid; {newest}")
    return 0 if len(valid) == len(steps) else CheckpointError.exit_code


def names(state: Any) -> dict[str, Any]:
    """The leaves of a TrainState by name, as in "opt_state/0/mu/Conv_0/kernel".

    Those of its model_state begin with their collection, as in "batch_stats/BatchNorm_0/mean".
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name.removeprefix("model_state/"): leaf for name, leaf in named.items()}


def fill(template: Any, restored: Restored) -> Any:
    """`template` with its leaves replaced by the restored arrays of the same names.

    Args:
      template: a TrainState, or variables such as {"params": ..., "batch_stats": ...}, of arrays or
        shapes.
      restored: the checkpoint.

    Raises:
      CheckpointError: names, shapes or types differ; lists how. Nothing is cast or left out.
    """
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in names(template).items()}
    tops = {name.split("/")[0] for name in wanted}
    found = {
        name: (array.shape, str(array.dtype))
        for name, array in restored.arrays.items()
        if _is_variable(name) or name.split("/")[0] in tops
    }
    lines = [
        f"{name}: {_shown(found.get(name))} saved, {_shown(wanted.get(name))} expected"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise CheckpointError(
            f"checkpoint {restored.step} does not fit the model: {'; '.join(lines[:5])}{more}"
        )
    leaves = [restored.arrays[name] for name in names(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _shown(kind: tuple | None) -> str:
    return f"{kind[1]}{list(kind[0])}" if kind else "nothing"


def _make_writer() -> ocp.AsyncCheckpointer:
    # Where a folder cannot be made, threads would wait ten minutes for one that is made in another.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options)
    )
    return ocp.AsyncCheckpointer(handler, async_options=options)


def _read(folder: Path, names: Iterable[str]) -> Arrays:
    """Arrays of an Orbax item by name: zarr arrays in one OCDBT database."""
    context = tensorstore.Context()  # a cache of its own: the files may have changed since
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}

    def opened(name: str) -> tensorstore.Future:
        place = database | {"path": name.replace("/", ".") + "/"}
        return tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, context=context)

    opening = {name: opened(name) for name in names}
    reading = {name: future.result().read() for name, future in opening.items()}
    return {name: np.asarray(future.result()) for name, future in reading.items()}


def _is_variable(name: str) -> bool:
    return name.split("/")[0] not in TRAINING


def _reason(error: Exception) -> str:
    """What an error of Orbax or TensorStore says, which can be pages, as part of one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"\[os_error_code='(\d+)'\]", str(error)):
        return os.strerror(int(number[1]))
    text = " ".join(str(error).partition(" [tensorstore_spec=")[0].split())
    return text[:300] or type(error).__name__


def _remove(path: Path) -> None:
    """Deletes a folder or file, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _nest(arrays: Arrays) -> dict:
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _describe(array: np.ndarray) -> dict:
    digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def _sum_of_manifest(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
