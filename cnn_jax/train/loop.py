"""The training loop. A resumed run repeats this order exactly:

  load data -> initialise -> restore the newest valid checkpoint
  each epoch: shuffle the examples by (seed, epoch); for each batch
    step -> (log) -> loss finite? -> (checkpoint) -> asked to stop? then save and end
  (checkpoint) -> evaluate, (asked to stop? then end) -> write the line of metrics.jsonl

A line depends only on the state after the epoch's last step. If a run is restored at that step and
its line is missing, the run first evaluates and writes the line. So no line is lost or repeated.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.config import Config
from cnn_jax.config.paths import resolve
from cnn_jax.config.validate import validate
from cnn_jax.data import loader, statistics
from cnn_jax.data.splits import Splits, check_splits, load_splits
from cnn_jax.train import (
    agreement,
    checkpoint,
    early_stopping,
    evaluation,
    optim,
    parallel,
    pretrained,
    start,
)
from cnn_jax.train.reporting import Reporter
from cnn_jax.train.saving import Saver
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.step import TrainState, empty_sums
from cnn_jax.train.workdir import check_same_run, locked, metrics, prepare, write_config


def train(
    config: Config,
    workdir: Path,
    experiment: str = "",
    data_dir: str | None = None,
    download: bool = False,
    verify: bool = True,
    splits: Splits | None = None,
    init_from: str | None = None,
) -> list[dict]:
    """Trains to the last epoch; resumes where an earlier call on `workdir` stopped.

    Args:
      config: the run.
      workdir: its folder; created if missing.
      experiment: the name to record.
      data_dir: the folder of the dataset.
      download: downloads the dataset if it is not prepared.
      verify: compares a restored checkpoint with its checksums.
      splits: the examples, if they are loaded already.
      init_from: WORKDIR[:STEP] of the run from which a new run takes its first parameters.

    Returns:
      The lines of metrics.jsonl.

    Raises:
      ConfigError, DataError, CheckpointError: the configuration, data or a checkpoint is unusable.
      NotFiniteError: the loss, the parameters or an evaluation became infinite or NaN.
      Preempted: a signal asked the run to end; its state is saved, the same call resumes it.
    """
    # `experiment.load` has checked a command's configuration; nobody has checked one made in Python.
    config = resolve(validate(config))
    mesh = parallel.make_mesh(config.devices)
    parallel.check_divides(mesh, config.batch_size)
    agreement.check_program(config)
    workdir = Path(workdir).absolute()
    if parallel.is_main_process():
        prepare(workdir)
    with StopSignals() as signals, locked(workdir) as check_lock:
        check_same_run(workdir, config, metadata={})  # before the data is loaded, which takes time
        source = pretrained.find(init_from, workdir, verify)
        splits = splits or load_splits(config, data_dir, download)
        agreement.check_data(splits, source)
        config = statistics.in_numbers(config, splits.train)
        metadata = check_splits(config, splits)
        if source:
            metadata["init_from"] = dataclasses.asdict(source)
        check_same_run(workdir, config, metadata)
        order = loader.make_order(config, splits.train)
        saver = Saver(config, workdir, len(splits.train), order, signals, check_lock)
        with _Run(config, mesh, splits, signals, saver) as run:
            saver.start(run.restore(verify, source))
            if parallel.is_main_process():
                write_config(workdir, config, experiment, metadata)
            run.epochs()
    return metrics(workdir)


class _Run:
    """The state of one call of `train`, and the order in which it changes."""

    def __init__(
        self, config: Config, mesh: Any, splits: Splits, signals: StopSignals, saver: Saver
    ):
        self.config, self.mesh, self.splits = config, mesh, splits
        self.signals, self.saver = signals, saver
        self.steps_per_epoch = len(splits.train) // config.batch_size
        self.reporter = Reporter(config, saver.folder, self.steps_per_epoch)
        self.optimizer = optim.make_optimizer(config, self.steps_per_epoch)
        self.eval_step = evaluation.make_eval_step(
            config.model, config.data, config.compute_dtype, mesh
        )
        self.state: TrainState
        self.epoch_seconds = 0.0
        self.line_is_missing = False

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self.reporter.close()
        self.saver.close(error)

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
        lines = {line["step"] for line in metrics(self.saver.folder)}
        ended = restored.step > 0 and restored.step % self.steps_per_epoch == 0
        self.line_is_missing = ended and restored.step not in lines
        self.reporter.progress.message(f"resumed from step {restored.step} of {self.saver.folder}")
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
            if self._is_over():
                return
            began = time.perf_counter()
            train = start.compiled_step(
                config, self.optimizer, self.splits.train, self.mesh, self.state
            )
            self.reporter.compiled(time.perf_counter() - began, self.mesh.size)
            self.signals.let_finish(config.grace_seconds)
            for remaining in range(epoch, config.epochs):
                self._epoch(remaining, train)
                if self._is_over():
                    return

    def _epoch(self, epoch: int, train: Callable) -> None:
        config = self.config
        order = self.saver.order(epoch)
        first = epoch * self.steps_per_epoch
        skipped = int(self.state.step) - first
        if skipped == 0:
            self.state = self.state.replace(sums=parallel.replicate(empty_sums(), self.mesh))
            self.epoch_seconds = 0.0
        self.reporter.progress.start_epoch(epoch, skipped)
        began, before = time.perf_counter(), self.epoch_seconds
        running: deque[jax.Array] = deque()
        size = config.batch_size
        rows = parallel.own_rows(self.mesh, size)
        data = loader.training_batches(self.splits.train, order, size, skipped, epoch, rows)
        for done, batch in enumerate(data, skipped + 1):
            self.state, loss = train(self.state, parallel.shard(batch, self.mesh, size))
            running.append(loss)
            if len(running) > parallel.QUEUE:
                running.popleft().block_until_ready()
            last = done == self.steps_per_epoch
            if done % config.log_every_steps == 0 or last:
                sums = parallel.to_host(self.state.sums)
                self.saver.check_finite(sums)
                self.reporter.steps(first + done, sums, loss)
            self.epoch_seconds = before + time.perf_counter() - began
            if last:
                break
            stop = self.saver.asked_to_stop(first + done)
            if stop or self.saver.is_due(first + done):
                self.saver.save(self.state, self.epoch_seconds)
            if stop:
                self.saver.stop(self.state, self.epoch_seconds, stop)
        self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> None:
        """Does all that follows an epoch's last step; depends only on `state`."""
        config, saver, step = self.config, self.saver, int(self.state.step)
        last = epoch + 1 == config.epochs
        stop = saver.asked_to_stop(step)
        due = last or stop or (epoch + 1) % config.checkpoint_every_epochs == 0
        if due or saver.is_due(step):
            saver.save(self.state, self.epoch_seconds)
        sums = parallel.to_host(self.state.sums)
        images = self.steps_per_epoch * config.batch_size
        line = {
            "step": step,
            "epoch": epoch + 1,
            "train_loss": float(sums["loss"]) / images,
            "train_accuracy": int(sums["correct"]) / images,
        }
        if last or (epoch + 1) % config.eval_every_epochs == 0:
            line |= self._evaluate()
        for name, value in line.items():
            if not np.isfinite(value):
                saver.not_finite(step - 1, f"{name}={value} after step {step - 1}")
        line["epoch_seconds"] = self.epoch_seconds
        line["images_per_second"] = images / self.epoch_seconds
        saver.check_lock()
        self.reporter.epoch(line)
        self.line_is_missing = False
        if last or early_stopping.stale_epochs(config, saver.folder):
            saver.save_and_wait(self.state, self.epoch_seconds)
        elif stop := saver.asked_to_stop(step):
            saver.stop(self.state, self.epoch_seconds, stop)

    def _is_over(self) -> bool:
        """Whether the run ends before its last epoch; prints why."""
        stale = early_stopping.stale_epochs(self.config, self.saver.folder)
        if stale:
            epoch = int(self.state.step) // self.steps_per_epoch
            self.reporter.progress.message(early_stopping.reason(epoch, stale))
        return stale > 0

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
