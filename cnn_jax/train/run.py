"""The epochs of a run: what happens after which step. A resumed run repeats this order exactly:

  each epoch: shuffle the examples by (seed, epoch); for each batch
    step -> (log) -> loss finite? -> (checkpoint) -> asked to stop? then save and end
  (checkpoint) -> evaluate, (asked to stop? then end) -> write the line of metrics.jsonl

A line depends only on the state after the epoch's last step. If a run is restored at that step and
its line is missing, the run first evaluates and writes the line. So no line is lost or repeated.
"""

import dataclasses
import functools
import logging
import time
from typing import Any

import jax

from cnn_jax.common.errors import CheckpointError
from cnn_jax.config import Config
from cnn_jax.data.splits import Splits
from cnn_jax.train import checkpoint, early_stopping, evaluation, optim, parallel, pretrained, start
from cnn_jax.train.bucket_run import shown
from cnn_jax.train.calls import make_calls
from cnn_jax.train.profile import Profile
from cnn_jax.train.reporting import Reporter, epoch_line
from cnn_jax.train.saving import Saver
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.step import TrainState, empty_sums
from cnn_jax.train.trackers import Trackers
from cnn_jax.train.trackers.base import ending_of

log = logging.getLogger(__name__)


class Run:
    """The state of one call of `train`, and the order in which it changes."""

    def __init__(
        self,
        config: Config,
        mesh: Any,
        splits: Splits,
        signals: StopSignals,
        saver: Saver,
        trackers: Trackers,
        profile: Profile | None = None,
    ):
        self.profile = profile
        self.config, self.mesh, self.splits = config, mesh, splits
        self.signals, self.saver = signals, saver
        self.steps_per_epoch = len(splits.train) // config.batch_size
        self.reporter = Reporter(config, saver.folder, self.steps_per_epoch, trackers)
        self.optimizer = optim.make_optimizer(config, self.steps_per_epoch)
        self.eval_step = evaluation.make_eval_step(config, mesh)
        self.state: TrainState
        self.epoch_seconds = 0.0
        self.line_is_missing = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.saver.close(error)
        except CheckpointError as failure:
            error = failure
            raise
        finally:
            self._report_checkpoints()
            self.reporter.trackers.close(ending_of(error))
            self._end_trace()

    def _end_trace(self) -> None:
        """Ends the trace of --profile if it is open. A failure must not hide how the run ended."""
        try:
            for line in self.profile.close() if self.profile else []:
                self.reporter.progress.message(line)
        except Exception as error:  # the profiler and its reader raise several types
            log.warning("warning: --profile: %s", " ".join(str(error).split()))

    # ------------------------------------------------------------------------------ before

    def restore(
        self, verify: bool, source: pretrained.Source | None = None
    ) -> checkpoint.Restored | None:
        """Restores `state` from the newest valid checkpoint and returns that, or initialises it.

        Args:
          verify: compares what is restored with its checksums.
          source: the checkpoint whose parameters the initialisation takes where they fit.
        """
        parts = self.config, self.optimizer, self.splits.train, self.mesh
        restored = self.saver.checkpoints.newest(verify=verify)
        if restored is None:
            self.state = start.first_state(*parts, source, verify)
            return None
        self.state = start.restored_state(*parts, restored)
        self.epoch_seconds = restored.notes["epoch_seconds"]
        self.line_is_missing = self.saver.line_is_missing(restored.step)
        place = shown(self.saver.folder)
        self.reporter.progress.message(f"resumed from step {restored.step} of {place}")
        return restored

    # ------------------------------------------------------------------------------ epochs

    def epochs(self) -> None:
        """Trains, evaluates and saves, epoch by epoch."""
        config, progress = self.config, self.reporter.progress
        epoch = int(self.state.step) // self.steps_per_epoch
        with progress:
            if self.line_is_missing:
                self._end_epoch(epoch - 1)
            if epoch >= config.epochs:
                progress.message(f"nothing left to do: {int(self.state.step)} steps are done")
                return
            over = functools.partial(early_stopping.is_over, config, self.saver.folder, progress)
            if over(epoch):
                return
            began = time.perf_counter()
            self.calls = make_calls(
                config, self.optimizer, self.splits.train, self.mesh, self.state
            )
            seconds = time.perf_counter() - began
            self.reporter.compiled(seconds, self.mesh.size, self.calls.described)
            self.signals.let_finish(config.grace_seconds)
            for remaining in range(epoch, config.epochs):
                self._epoch(remaining)
                if over(remaining + 1):
                    return

    def _epoch(self, epoch: int) -> None:
        config = self.config
        order = self.saver.order(epoch)
        first = epoch * self.steps_per_epoch
        skipped = int(self.state.step) - first
        if skipped == 0:
            self.state = dataclasses.replace(
                self.state, sums=parallel.replicate(empty_sums(), self.mesh)
            )
            self.epoch_seconds = 0.0
        self.reporter.progress.start_epoch(epoch, skipped)
        began, before = time.perf_counter(), self.epoch_seconds
        report = functools.partial(self.reporter.report, self.saver.check_finite)
        self._trace(first + skipped)
        for done, state, loss in self.calls.steps(self.state, order, epoch, skipped):
            self.state = state
            report()  # of the call before, so that the device has work meanwhile
            last = done == self.steps_per_epoch
            if done % config.log_every_steps == 0 or last:
                self.reporter.keep(first + done, parallel.copied(state.sums, self.mesh), loss)
            if last:
                break
            self.epoch_seconds = before + time.perf_counter() - began
            stop = self.saver.asked_to_stop(first + done)
            if stop or self.saver.is_due(first + done):
                report()
                self.saver.save(self.state, self.epoch_seconds)
            if stop:
                self.saver.stop(self.state, self.epoch_seconds, stop)
            self._trace(first + done)
        report()
        self.epoch_seconds = before + time.perf_counter() - began
        self._trace(first + done, last=epoch + 1 == config.epochs)
        self._end_epoch(epoch)

    def _report_checkpoints(self) -> None:
        """Tells the trackers of the checkpoints that were read back since."""
        for step, sha256 in self.saver.checkpoints.newly_proven():
            self.reporter.trackers.checkpoint(step, sha256)

    def _trace(self, step: int, last: bool = False) -> None:
        """Starts or ends the trace of --profile before `step`."""
        if self.profile:
            for line in self.profile.before(step, self.state, last):
                self.reporter.progress.message(line)

    def _end_epoch(self, epoch: int) -> None:
        """Does all that follows an epoch's last step; depends only on `state`."""
        config, saver, step = self.config, self.saver, int(self.state.step)
        last = epoch + 1 == config.epochs
        stop = saver.asked_to_stop(step)
        due = last or stop or (epoch + 1) % config.checkpoint_every_epochs == 0
        if due or saver.is_due(step):
            saver.save(self.state, self.epoch_seconds)
        images = self.steps_per_epoch * config.batch_size
        line = epoch_line(step, epoch, parallel.to_host(self.state.sums), images)
        if config.data.skip_corrupt:
            line["skipped_examples"] = self.splits.train.skipped
        if last or (epoch + 1) % config.eval_every_epochs == 0:
            line |= self._evaluate()
        saver.check_line(line)
        line["epoch_seconds"] = self.epoch_seconds
        line["images_per_second"] = images / self.epoch_seconds
        saver.check_lock()
        self.reporter.epoch(line)
        self._report_checkpoints()
        saver.changed()
        self.line_is_missing = False
        if last or early_stopping.stale_epochs(config, saver.folder):
            saver.save_and_wait(self.state, self.epoch_seconds)
        elif stop := saver.asked_to_stop(step):
            saver.stop(self.state, self.epoch_seconds, stop)

    def _evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the validation and test splits."""
        found = evaluation.evaluate_splits(
            self.eval_step,
            self.state.variables,
            self.splits,
            self.config.eval_batch_size,
            self.mesh,
            before_each=self._stop_evaluating,
        )
        shape, step = self.splits.train.image_shape, int(self.state.step)
        self.reporter.evaluated(found["test"].confusion, self.state.params, shape, step)
        return evaluation.as_line(found)

    def _stop_evaluating(self) -> None:
        """Ends the run after a signal: an evaluation may take longer than `grace_seconds`."""
        if jax.process_count() == 1 and (stop := self.signals.exit_code):
            self.saver.stop(self.state, self.epoch_seconds, stop)
