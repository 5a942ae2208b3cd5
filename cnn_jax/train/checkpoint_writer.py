"""Writes checkpoints in the background. Only this file imports Orbax.

A save is complete when the checkpoint was read back as in a restore, and its checksums match those
of the arrays in memory. Only then are older checkpoints deleted. A checkpoint that cannot be
written or read back is reported at once and removed; the run continues and saves again.
"""

import contextlib
import logging
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp

from cnn_jax.common.errors import CheckpointError
from cnn_jax.common.files import library_path
from cnn_jax.train import parallel
from cnn_jax.train.checkpoint import (
    Arrays,
    Checkpoints,
    DamagedCheckpoint,
    describe,
    is_variable,
    names,
    reason_of,
    sum_of_manifest,
)
from cnn_jax.train.step import TrainState

log = logging.getLogger(__name__)


class CheckpointWriter(Checkpoints):
    """Reads and writes the checkpoints of a run's workdir."""

    def __init__(
        self,
        workdir: Path,
        keep: int = 1,
        proven: Callable[[list[int]], None] = lambda steps: None,
    ):
        """Args:
        workdir: the run's folder; checkpoints/ need not exist.
        keep: how many of the latest checkpoints to keep, besides the best.
        proven: called in the background when a save is complete, with the steps that there are.
        """
        super().__init__(workdir)
        self._keep, self._proven = keep, proven
        self._writer: ocp.AsyncCheckpointer | None = None
        self._proving: Future[None] | None = None  # of the current save
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._failure: CheckpointError | None = None  # of the last save
        self._failures, self._failed_at = 0, 0.0  # since the last success
        self._newly_proven: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def start_writing(self, resume_at: int | None) -> None:
        """Deletes unfinished saves of an earlier run, and sets its damaged checkpoints aside.

        Those are renamed to damaged-STEP, because the run will save their steps again.

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

    def save(self, state: TrainState | Mapping[str, Any], notes: dict) -> None:
        """Starts to save `state`; returns before its arrays are written.

        A failure is logged at once; `wait` raises it, `failing` and `retry_is_due` report it.

        Args:
          state: of NumPy arrays, equal on all processes; or what `evaluate` needs of one, by name.
          notes: plain JSON, returned by `read`.
        """
        self._join()
        # Copied: on a CPU they may be views of buffers that the next step reuses.
        arrays = {name: np.array(value) for name, value in names(state).items()}
        manifest = {
            "step": int(arrays["step"]),
            "notes": notes,
            "arrays": {name: describe(array) for name, array in arrays.items()},
        }
        manifest["sha256"] = sum_of_manifest(manifest)
        try:
            self._start(arrays, manifest)
        except Exception as error:
            self._fail(manifest, error)
        else:
            self._proving = self._background.submit(self._prove, manifest)

    def _start(self, arrays: Arrays, manifest: dict) -> None:
        """Passes the arrays to Orbax, which writes them in its own threads."""
        full = {name: a for name, a in arrays.items() if a.size}  # Orbax refuses empty ones
        variables = {name: a for name, a in full.items() if is_variable(name)}
        training = {name: a for name, a in full.items() if name not in variables}
        if not self.folder.is_dir():  # Orbax would create it again
            raise FileNotFoundError(f"{self.folder} was removed")
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
        """Waits until the save is written, reads it back, then deletes old checkpoints."""
        try:
            assert self._writer is not None, "it has begun this save"
            self._writer.wait_until_finished()
            if parallel.is_main_process():
                self._read_back(manifest)
                self._newly_proven.put((manifest["step"], manifest["sha256"]))
                self._prune(manifest["step"])
                self._proven(self.steps())
        except Exception as error:
            self._fail(manifest, error)
        else:
            self._failure, self._failures = None, 0

    def _read_back(self, manifest: dict) -> None:
        """Verifies the checkpoint just written; removes it if it differs from `manifest`.

        Raises:
          DamagedCheckpoint: it differs; names the problem.
        """
        folder = self.folder / str(manifest["step"])
        try:
            if self.manifest(manifest["step"]) != manifest:
                raise ValueError("its manifest is not the one that was saved")
            self.read(manifest["step"])
        except Exception as error:
            _remove(folder)
            place = f"{self.place}/{folder.name}"
            raise DamagedCheckpoint(reason_of(error).removeprefix(f"{place}: ")) from error

    def _fail(self, manifest: dict, error: Exception) -> None:
        path = self.folder / str(manifest["step"])
        what = (
            "does not read back" if isinstance(error, DamagedCheckpoint) else "could not be written"
        )
        self._failure = CheckpointError(f"{path}: {what}: {reason_of(error)}")
        self._failure.__cause__ = error
        self._failures, self._failed_at = self._failures + 1, time.monotonic()
        log.warning("warning: %s", self._failure)
        self._discard_writer()
        if parallel.is_main_process():
            with contextlib.suppress(OSError):
                self._clear_unfinished()

    def failing(self) -> bool:
        """Whether the last save failed on any process; all must call it at the same point."""
        return bool(parallel.largest(int(self._failure is not None)))

    def retry_is_due(self) -> bool:
        """Whether to retry a failed save now; all processes must call it at the same point.

        The pause grows from two seconds to a minute, so that a full disk does not stop the training.
        """
        pause = min(60.0, 2.0**self._failures)
        due = self._failure is not None and time.monotonic() - self._failed_at >= pause
        return bool(parallel.largest(int(due)))

    def newly_proven(self) -> Iterator[tuple[int, str]]:
        """(step, SHA-256 of the manifest) of each checkpoint read back since the last call."""
        while not self._newly_proven.empty():
            yield self._newly_proven.get()

    def wait(self) -> None:
        """Waits until the last save is done.

        Raises:
          CheckpointError: it could not be written or read back; raised on every process.
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
            with contextlib.suppress(Exception):  # it repeats the same failure
                writer.close()

    def _clear_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.startswith(".deleting-"):
                _remove(path)

    def _prune(self, newest: int) -> None:
        steps = [step for step in self.steps() if step <= newest]
        for step in set(steps) - {*steps[-self._keep :], self.best()}:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = self.folder / f".deleting-{step}"
            os.rename(self.folder / str(step), doomed)
            _remove(doomed)


def _make_writer() -> ocp.AsyncCheckpointer:
    # If a folder cannot be created, Orbax's threads would otherwise wait for it for ten minutes.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options)
    )
    return ocp.AsyncCheckpointer(handler, async_options=options)


def _remove(path: Path) -> None:
    """Deletes a folder or file if it exists; ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _nest(arrays: Arrays) -> dict:
    return flax.traverse_util.unflatten_dict(arrays, sep="/")
