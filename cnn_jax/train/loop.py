"""The training loop. Its order, which a resumed run repeats exactly:

  load data -> initialise -> restore the newest valid checkpoint
  each epoch: its order of examples is drawn from (seed, epoch); for each batch
    step -> (log) -> loss finite? -> (checkpoint) -> asked to stop? then save and end
  (checkpoint) -> evaluate, (asked to stop? then end) -> write the line of metrics.jsonl

All that a line says follows from the state after the epoch's last step. A run that is restored at
that step, and does not find its line, evaluates and writes it before it goes on: however it ended,
no line is lost or repeated.
"""

import contextlib
import dataclasses
import functools
import logging
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from cnn_jax.analysis import evaluate
from cnn_jax.common import images as pictures
from cnn_jax.common.errors import CheckpointError, ConfigError, DataError, NotFiniteError, Preempted
from cnn_jax.common.files import library_path
from cnn_jax.config import Config
from cnn_jax.config.validate import check_images, check_model, validate
from cnn_jax.data import loader
from cnn_jax.data.splits import Splits, load_splits
from cnn_jax.models.kernels import first_kernel
from cnn_jax.train import checkpoint, optim, parallel
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.progress import Progress
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.step import TrainState, empty_sums, init_state, train_step
from cnn_jax.train.tensorboard import Curves

log = logging.getLogger(__name__)


def train(
    config: Config,
    workdir: Path,
    experiment: str = "",
    data_dir: str | None = None,
    download: bool = False,
    verify: bool = True,
    splits: Splits | None = None,
) -> list[dict]:
    """Trains to the last epoch, going on where an earlier call on `workdir` stopped.

    Args:
      config: the run.
      workdir: its folder; made if missing.
      experiment: the name to record.
      data_dir: where the dataset lies.
      download: fetches the dataset if it is not prepared.
      verify: compares a restored checkpoint with its checksums.
      splits: the examples, if they are loaded already.

    Returns:
      The lines of metrics.jsonl.

    Raises:
      ConfigError, DataError, CheckpointError: as their names say.
      NotFiniteError: the loss became infinite or NaN.
      Preempted: a signal asked the run to end; it saved, and the same call goes on.
    """
    validate(config)
    mesh = parallel.make_mesh(config.devices)
    parallel.check_divides(mesh, config.batch_size)
    workdir = Path(workdir).absolute()
    if parallel.is_main_process():
        workdirs.prepare(workdir)
        library_path(workdir)  # refuses, before the first step, what cannot be saved into
    with StopSignals() as signals, workdirs.locked(workdir) as check_lock:
        workdirs.check_same_run(workdir, config, about={})  # before time goes into the data
        splits = splits or load_splits(config, data_dir, download)
        run = _Run(config, workdir, mesh, splits, signals, check_lock)
        workdirs.check_same_run(workdir, config, run.about)
        with run:
            run.restore(verify, experiment)
            run.epochs()
    return workdirs.metrics(workdir)


def dry_run(config: Config, data_dir: str | None = None, download: bool = False) -> list[dict]:
    """Does everything once on two batches, in a workdir that is thrown away.

    Raises:
      ConfigError: this is one of several processes, which would share no such workdir.
      As `train`.
    """
    if parallel.is_one_of_several():
        raise ConfigError("--dry_run: takes one process; leave out --coordinator")
    validate(config)
    splits = load_splits(config, data_dir, download)
    few = {
        name: examples and examples.take(np.arange(min(len(examples), 2 * config.batch_size)))
        for name, examples in vars(splits).items()
    }
    config = dataclasses.replace(config, epochs=1, warmup_epochs=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        lines = train(config, Path(scratch), splits=Splits(**few))
        run = checkpoint.Checkpoints(Path(scratch)).newest()
        log.info("dry run: two batches trained, evaluated, saved and restored (step %d)", run.step)
    return lines


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Any,
        splits: Splits,
        signals: StopSignals,
        check_lock: Callable[[], None],
    ):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.splits, self.signals, self.check_lock = splits, signals, check_lock
        self.steps_per_epoch = len(splits.train) // config.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch_size={config.batch_size}: must be at most the {len(splits.train)} training "
                "examples"
            )
        shape = splits.train.image_shape
        check_images(config.data, shape)
        if splits.test.image_shape != shape:
            raise DataError(f"data.test_split: images of {splits.test.image_shape}, not {shape}")
        names = splits.train.class_names
        logits = check_model(config.model, shape, len(names))
        self.about = {
            "class_names": [*names, *(f"class {i}" for i in range(len(names), logits))],
            "image_shape": shape,
            "train_examples": len(splits.train),
        }
        self.optimizer = optim.make_optimizer(config, self.steps_per_epoch)
        self.checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
        self.progress = Progress(config.epochs, self.steps_per_epoch, config.batch_size)
        self.eval_step = evaluate.make_eval_step(
            config.model, config.data, config.compute_dtype, mesh
        )
        self.curves = Curves(workdir)
        self.state: TrainState
        self.epoch_seconds = 0.0
        self.line_is_missing = False
        self.saved_step: int | None = None
        self.saved_at = time.monotonic()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the checkpoint under way; its failure does not hide an earlier error."""
        self.curves.close()
        try:
            self.checkpoints.close()
        except CheckpointError as own:
            if error is None:
                raise
            if own is not error:
                log.warning("warning: %s", own)

    # ------------------------------------------------------------------------------ stations

    def restore(self, verify: bool, experiment: str) -> None:
        """Fills `state` from the newest valid checkpoint, or initialises it; readies the workdir."""
        config, shape = self.config, self.splits.train.image_shape
        make = functools.partial(init_state, config.model, self.optimizer, shape, config.seed)
        restored = self.checkpoints.newest(verify=verify)
        if restored is None:
            self.state = parallel.make_replicated(make, self.mesh, *self._first_examples())
        else:
            state = checkpoint.fill(jax.eval_shape(make), restored)
            self.state = parallel.replicate(state, self.mesh)
            self.epoch_seconds = restored.notes["epoch_seconds"]
            self.saved_step = restored.step
            lines = {line["step"] for line in workdirs.metrics(self.workdir)}
            ended = restored.step > 0 and restored.step % self.steps_per_epoch == 0
            self.line_is_missing = ended and restored.step not in lines
            self.progress.message(f"resumed from step {restored.step} of {self.workdir}")
        if not parallel.agree(restored.step if restored else -1):
            raise CheckpointError(
                f"workdir={self.workdir}: the processes found different checkpoints in it; all must "
                "see one and the same folder"
            )
        # All have read by now: the main process may change things.
        if parallel.is_main_process():
            self.checkpoints.start_writing(restored.step if restored else None)
            workdirs.keep_metrics_until(self.workdir, restored.step if restored else 0)
            workdirs.write_config(self.workdir, config, experiment, self.about)

    def _first_examples(self) -> list[jax.Array]:
        """What the initialisation sees, if it sees any: float32 [init_examples, H, W, C]."""
        count = min(self.config.init_examples, len(self.splits.train))
        if not count:
            return []
        return [loader.normalise(self.splits.train[np.arange(count)]["image"], self.config.data)]

    def epochs(self) -> None:
        """Trains, evaluates and saves, epoch by epoch."""
        config = self.config
        epoch = int(self.state.step) // self.steps_per_epoch
        with self.progress:
            if self.line_is_missing:
                self._end_epoch(epoch - 1)
            if epoch >= config.epochs:
                self.progress.message(f"nothing left to do: {int(self.state.step)} steps are done")
                return
            train = self._compile()
            self.signals.let_finish(config.grace_seconds)
            for remaining in range(epoch, config.epochs):
                self._epoch(remaining, train)

    # ----------------------------------------------------------------------------- one epoch

    def _epoch(self, epoch: int, train: Callable) -> None:
        config = self.config
        order = loader.epoch_order(config.seed, epoch, len(self.splits.train))
        first = epoch * self.steps_per_epoch
        start = int(self.state.step) - first
        if start == 0:
            self.state = self.state.replace(sums=parallel.replicate(empty_sums(), self.mesh))
            self.epoch_seconds = 0.0
        self.progress.start_epoch(epoch, start)
        began, before = time.perf_counter(), self.epoch_seconds
        running: deque[jax.Array] = deque()
        data = loader.training_batches(self.splits.train, order, config.batch_size, start, epoch)
        for done, batch in enumerate(data, start + 1):
            self.state, loss = train(self.state, parallel.shard(batch, self.mesh))
            running.append(loss)
            if len(running) > parallel.QUEUE:
                running.popleft().block_until_ready()
            last = done == self.steps_per_epoch
            if done % config.log_every_steps == 0 or last:
                self._log(first + done, loss)
            self.epoch_seconds = before + time.perf_counter() - began
            if last:
                break
            stop = self._asked_to_stop(done)
            if stop or self._checkpoint_due(first + done):
                self._save()
            if stop:
                self._stop(stop)
        self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> None:
        """All that follows an epoch's last step; depends on nothing but `state`."""
        config = self.config
        last = epoch + 1 == config.epochs
        stop = self._asked_to_stop(self.steps_per_epoch)
        due = last or stop or (epoch + 1) % config.checkpoint_every_epochs == 0
        if due or self._checkpoint_due(int(self.state.step)):
            self._save()
        sums = parallel.to_host(self.state.sums)
        images = self.steps_per_epoch * config.batch_size
        line = {
            "step": int(self.state.step),
            "epoch": epoch + 1,
            "train_loss": float(sums["loss"]) / images,
            "train_accuracy": int(sums["correct"]) / images,
        }
        if last or (epoch + 1) % config.eval_every_epochs == 0:
            line |= self._evaluate()
        line["epoch_seconds"] = self.epoch_seconds
        line["images_per_second"] = images / self.epoch_seconds
        if parallel.is_main_process():
            self.check_lock()
            workdirs.append_metrics(self.workdir, line)
            self.curves.scalars(
                {k: v for k, v in line.items() if k not in ("step", "epoch")}, line["step"]
            )
        self.progress.end_epoch(line)
        self.line_is_missing = False
        if last:
            self._save_for_good()
        elif stop := self._asked_to_stop(self.steps_per_epoch):
            self._stop(stop)

    def _evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the validation and test splits."""
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        line = {}
        for name in ("validation", "test"):
            if (examples := getattr(self.splits, name)) is not None:
                result = evaluate.evaluate_examples(
                    self.eval_step,
                    variables,
                    examples,
                    self.config.eval_batch_size,
                    self.mesh,
                    before_each=self._stop_evaluating,
                )
                line |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        if parallel.is_main_process():
            self._pictures(result.confusion, int(self.state.step))
        return line

    def _stop_evaluating(self) -> None:
        """Ends the run between two batches of an evaluation, which may take longer than the grace."""
        if jax.process_count() == 1 and self.signals.exit_code:
            self._stop(self.signals.exit_code)

    def _compile(self) -> Callable:
        """The train step, compiled ahead, so that its seconds are not counted as training."""
        config = self.config
        pure = functools.partial(
            train_step, model=config.model, optimizer=self.optimizer, config=config
        )
        began = time.perf_counter()
        order = np.arange(len(self.splits.train))
        batch = next(loader.training_batches(self.splits.train, order, config.batch_size))
        jitted = parallel.jit_step(pure, self.mesh)
        compiled = jitted.lower(self.state, parallel.shard(batch, self.mesh)).compile()
        device = jax.devices()[0]
        self.progress.message(
            f"compiled in {time.perf_counter() - began:.1f} s for {self.mesh.size} x "
            f"{device.device_kind}"
        )
        return compiled

    def _log(self, step: int, loss: jax.Array) -> None:
        """Reads the sums so far: for the bar, the curves, and to see that the loss is finite."""
        sums = parallel.to_host(self.state.sums)
        self._check_finite(sums)
        mean, accuracy = sums["loss"] / sums["count"], sums["correct"] / sums["count"]
        done = (step - 1) % self.steps_per_epoch + 1
        self.progress.update(done, float(mean), float(accuracy))
        if parallel.is_main_process():
            self.curves.scalars({"step_loss": float(loss)}, step)

    def _pictures(self, confusion: np.ndarray, step: int) -> None:
        """The test split's confusion matrix and the first layer's kernels, for TensorBoard."""
        try:
            params, shape = self.state.params, self.splits.train.image_shape
            images = {"confusion": pictures.draw_confusion(confusion)}
            if kernel := first_kernel(self.config.model, shape, params):
                images["kernels"] = pictures.draw_kernels(kernel[1])
            self.curves.images(images, step)
        except Exception as error:  # a picture is not worth a run
            log.warning("warning: no pictures for TensorBoard: %s: %s", type(error).__name__, error)

    # ------------------------------------------------------------------------- saving, ending

    def _checkpoint_due(self, step: int) -> bool:
        config = self.config
        if config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0:
            return True
        if not self._processes_meet(step):
            return False
        if self.checkpoints.retry_is_due():
            return True
        if config.checkpoint_every_minutes is None:
            return False
        seconds = time.monotonic() - self.saved_at
        return bool(parallel.largest(int(seconds >= 60 * config.checkpoint_every_minutes)))

    def _asked_to_stop(self, step: int) -> int:
        """The exit code that a signal to any process asks for; 0 for none."""
        return parallel.largest(self.signals.exit_code) if self._processes_meet(step) else 0

    def _processes_meet(self, step: int) -> bool:
        """Several processes must decide alike, which costs them an exchange: not every step."""
        last = step % self.steps_per_epoch == 0
        return jax.process_count() == 1 or last or step % self.config.log_every_steps == 0

    def _save(self) -> None:
        """Starts to save `state`, once, and only if it is worth going back to.

        The loss tells of a state that is not finite one step too late: that state is looked at.
        """
        state = parallel.to_host(self.state)
        step = int(state.step)
        if step == self.saved_step and not self.checkpoints.failing():
            return
        self._check_finite(state.sums)
        for name, array in checkpoint.names(state).items():
            if not np.isfinite(array).all() and not name.startswith("sums/"):
                self._not_finite(step - 1, f"{name} is not finite after step {step - 1}")
        self.check_lock()
        self.checkpoints.save(state, {"epoch_seconds": self.epoch_seconds})
        self.saved_step, self.saved_at = step, time.monotonic()

    def _save_for_good(self) -> None:
        """Saves `state` and waits until it is proven; there is no later time to save again.

        Raises:
          CheckpointError: three tries failed.
        """
        for remaining in (2, 1, 0):
            self._save()
            try:
                self.checkpoints.wait()
                break
            except CheckpointError:
                if not remaining:
                    raise

    def _stop(self, exit_code: int) -> None:
        """Ends the run as a signal asked, with `state` saved."""
        self._save_for_good()
        total = self.config.epochs * self.steps_per_epoch
        raise Preempted(
            f"stopped by a signal after step {self.saved_step} of {total}, and saved; run the same "
            "command again to go on",
            exit_code,
        )

    def _check_finite(self, sums: Any) -> None:
        if (step := int(sums["bad_step"])) >= 0:
            self._not_finite(step, f"loss={float(sums['bad_loss'])} at step {step}")

    def _not_finite(self, step: int, what: str) -> None:
        """Ends the run, leaving the batch in question and the last good checkpoint.

        Args:
          step: the one to blame, counted from 0: a checkpoint of that number is the state before it.
          what: was found.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = loader.epoch_order(self.config.seed, epoch, len(self.splits.train))
        batch = order[place * self.config.batch_size : (place + 1) * self.config.batch_size]
        dump = self.workdir / "not_finite.json"
        if parallel.is_main_process():
            about = {"step": step, "epoch": epoch + 1, "what": what, "indices": batch.tolist()}
            with _only_warns(OSError):
                workdirs.write_json(dump, about)
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


@contextlib.contextmanager
def _only_warns(kind: type[Exception]) -> Iterator[None]:
    """What fails here must not hide the error that is about to be raised."""
    try:
        yield
    except kind as error:
        log.warning("warning: %s", error)
