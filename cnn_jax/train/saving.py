"""When a run saves its state, and how it ends early."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.common.errors import CheckpointError, NotFiniteError, Preempted
from cnn_jax.config import Config
from cnn_jax.train import parallel, processes, workdir
from cnn_jax.train.checkpoint import Restored, names
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.signals import EXIT_CODES, StopSignals
from cnn_jax.train.step import TrainState

log = logging.getLogger(__name__)


class Saver:
    """Decides when to save and when to end; refuses a state that is not finite.

    All processes make the same decisions: each must call these methods at the same steps.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        train_examples: int,
        order: Callable[[int], np.ndarray],
        signals: StopSignals,
        check_lock: Callable[[], None],
        changed: Callable[..., None] = lambda steps=None: None,
    ):
        """Args:
        config: the run's configuration.
        folder: its workdir.
        train_examples: the size of its training split.
        order: of the examples of an epoch, from `loader.make_order`.
        signals: the signals that ask it to stop.
        check_lock: raises CheckpointError if the workdir was deleted or moved.
        changed: called when a file of the workdir is complete, as `mirror.attached` yields it.
        """
        self.config, self.folder, self.signals = config, folder, signals
        self.checkpoints = CheckpointWriter(folder, config.keep_checkpoints, changed)
        self.saved_step: int | None = None
        self.order = order
        self._steps_per_epoch = train_examples // config.batch_size
        self.check_lock, self.changed = check_lock, changed
        self._saved_at = time.monotonic()
        self._asked_at, self._points = -1, 0  # of `asked_to_stop`

    def start(self, restored: Restored | None) -> None:
        """Removes what the workdir holds after the step from which the run resumes.

        Raises:
          CheckpointError: the processes see different workdirs, or cannot write there.
        """
        step = restored.step if restored else None
        if not parallel.agree(-1 if step is None else step):
            raise CheckpointError(
                f"workdir={self.folder}: the processes found different checkpoints in it; all "
                "processes must use the same shared folder"
            )
        self.saved_step = step
        if parallel.is_main_process():  # all processes have read the workdir by now
            self.checkpoints.start_writing(step)
            workdir.keep_metrics_until(self.folder, step or 0)
            if restored:
                workdir.warn_of_other_bits(self.folder)

    def line_is_missing(self, step: int) -> bool:
        """Whether an epoch ended with `step`, and metrics.jsonl does not have its line."""
        lines = {line["step"] for line in workdir.metrics(self.folder)}
        return step > 0 and step % self._steps_per_epoch == 0 and step not in lines

    # -------------------------------------------------------------------------------- due?

    def is_due(self, step: int) -> bool:
        """Whether to save a checkpoint after training step `step` of the run."""
        config = self.config
        if config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0:
            return True
        if not self._processes_meet(step):
            return False
        if self.checkpoints.retry_is_due():
            return True
        if config.checkpoint_every_minutes is None:
            return False
        seconds = time.monotonic() - self._saved_at
        return bool(parallel.largest(int(seconds >= 60 * config.checkpoint_every_minutes)))

    def asked_to_stop(self, step: int) -> int:
        """The exit code if a signal asked any process to stop by step `step`; otherwise 0.

        Of several processes, each must ask after the same steps.
        """
        code = self.signals.exit_code
        if jax.process_count() == 1:
            return code
        if step != self._asked_at:  # a call of the device may do several steps
            self._asked_at, self._points = step, self._points + 1
        if not processes.all_stop_at(self._points, signalled=code > 0):
            return 0
        # JAX took a signal at the start if none of ours did.
        return parallel.largest(code) or EXIT_CODES[signal.SIGTERM]

    def _processes_meet(self, step: int) -> bool:
        """Whether to decide after `step`: an exchange of several processes at each step is slow."""
        done = (step - 1) % self._steps_per_epoch + 1
        last = done == self._steps_per_epoch
        return jax.process_count() == 1 or last or done % self.config.log_every_steps == 0

    # ------------------------------------------------------------------------------- saving

    def save(self, state: TrainState, epoch_seconds: float) -> None:
        """Starts to save `state`, unless it is already saved or being saved.

        Args:
          state: on the devices.
          epoch_seconds: the time of the epoch's steps so far.

        Raises:
          NotFiniteError: `state` is not finite. Its loss would show that one step later.
          CheckpointError: the workdir was deleted or moved.
        """
        host = parallel.to_host(state)
        step = int(host.step)
        if step == self.saved_step and not self.checkpoints.failing():
            return
        self.check_finite(host.sums)
        for name, array in names(host).items():
            if not name.startswith("sums/") and not _is_sound(name, array):
                self.not_finite(step - 1, f"{name} is not finite after step {step - 1}")
        self.check_lock()
        self.checkpoints.save(host, {"epoch_seconds": epoch_seconds})
        self.saved_step, self._saved_at = step, time.monotonic()

    def save_and_wait(self, state: TrainState, epoch_seconds: float) -> None:
        """Saves `state` and waits until it is read back; tries three times, as the run ends here.

        Raises:
          CheckpointError: three tries failed.
          NotFiniteError: as `save`.
        """
        for remaining in (2, 1, 0):
            self.save(state, epoch_seconds)
            try:
                self.checkpoints.wait()
                break
            except CheckpointError:
                if not remaining:
                    raise

    def stop(self, state: TrainState, epoch_seconds: float, exit_code: int) -> None:
        """Saves `state` and ends the run, as a signal asked.

        Raises:
          Preempted: always, unless the save raises another error.
        """
        self.save_and_wait(state, epoch_seconds)
        total = self.config.epochs * self._steps_per_epoch
        raise Preempted(
            f"stopped by a signal after step {self.saved_step} of {total}, and saved; run the same "
            "command again to go on",
            exit_code,
        )

    def close(self, error: BaseException | None) -> None:
        """Waits for the current save; its failure does not hide an earlier `error`."""
        try:
            self.checkpoints.close()
        except CheckpointError as failure:
            if error is None:
                raise
            if failure is not error:
                log.warning("warning: %s", failure)

    # --------------------------------------------------------------------------- not finite

    def check_finite(self, sums: Any) -> None:
        """Raises NotFiniteError if a step of this epoch had a loss that was infinite or NaN."""
        if (step := int(sums["bad_step"])) >= 0:
            self.not_finite(step, f"loss={float(sums['bad_loss'])} at step {step}")

    def check_line(self, line: dict[str, float]) -> None:
        """Raises NotFiniteError if a value of an epoch's line is infinite or NaN."""
        for name, value in line.items():
            if not np.isfinite(value):
                step = int(line["step"]) - 1
                self.not_finite(step, f"{name}={value} after step {step}")

    def not_finite(self, step: int, what: str) -> None:
        """Ends the run; writes the batch's indices to a file and keeps the last good checkpoint.

        Args:
          step: the training step at fault, from 0; checkpoint `step` is the state before it.
          what: the value that is not finite, in words.

        Raises:
          NotFiniteError: always.
        """
        epoch, place = divmod(step, self._steps_per_epoch)
        batch = self.order(epoch)[
            place * self.config.batch_size : (place + 1) * self.config.batch_size
        ]
        dump = self.folder / "not_finite.json"
        if parallel.is_main_process():
            found = {"step": step, "epoch": epoch + 1, "what": what, "indices": batch.tolist()}
            with _only_warns(OSError):
                workdir.write_json(dump, found)
        with _only_warns(CheckpointError):
            self.checkpoints.wait()
        good = self.checkpoints.steps()
        kept = (
            f"the checkpoint of step {good[-1]} is kept" if good else "there is no checkpoint yet"
        )
        raise NotFiniteError(
            f"{what} (epoch {epoch + 1}): not finite; {kept}, the batch's indices are in {dump}; try "
            f"a smaller learning_rate (now {self.config.learning_rate})"
        )


def _is_sound(name: str, array: np.ndarray) -> bool:
    # A scalar of an optimizer may start as infinity, as the best value of reduce_on_plateau does.
    if name.startswith("opt_state/") and not array.shape:
        return not np.isnan(array).any()
    return bool(np.isfinite(array).all())


@contextlib.contextmanager
def _only_warns(kind: type[Exception]) -> Iterator[None]:
    """Logs an error of type `kind`, so that it does not hide the error raised next."""
    try:
        yield
    except kind as error:
        log.warning("warning: %s", error)
