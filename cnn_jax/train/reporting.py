"""The output of a run while it trains: the progress bar, metrics.jsonl, the trackers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.common import images
from cnn_jax.config import Config
from cnn_jax.models.kernels import first_kernel
from cnn_jax.train import parallel, workdir
from cnn_jax.train.progress import Progress
from cnn_jax.train.trackers import Trackers, metrics_of

log = logging.getLogger(__name__)


def epoch_line(step: int, epoch: int, sums: dict[str, np.ndarray], images: int) -> dict[str, Any]:
    """What a line of metrics.jsonl says of training.

    Args:
      step: the last of the epoch.
      epoch: from 0.
      sums: of the epoch, as `step.empty_sums` names them.
      images: the epoch's examples.
    """
    return {
        "step": step,
        "epoch": epoch + 1,
        "train_loss": float(sums["loss"]) / images,
        "train_accuracy": int(sums["correct"]) / images,
    }


class Reporter:
    """Reports on a run. Every process prints; only the main process writes to the workdir."""

    def __init__(self, config: Config, folder: Path, steps_per_epoch: int, trackers: Trackers):
        self._model, self._folder, self._steps = config.model, folder, steps_per_epoch
        self._compute_dtype = config.compute_dtype
        self.progress = Progress(config.epochs, steps_per_epoch, config.batch_size)
        self.trackers = trackers
        self._kept: tuple[int, Any, jax.Array] | None = None

    def compiled(self, seconds: float, devices: int, calls: str) -> None:
        """Prints the devices for which the step was compiled; `calls` says how it is called."""
        device, how = jax.devices()[0], ""
        if self._compute_dtype == "bfloat16" and device.platform == "cpu":
            onednn = parallel.uses_onednn(self._compute_dtype)
            how = ", bfloat16 " + ("by oneDNN" if onednn else "with convolutions in float32")
        self.progress.message(
            f"compiled in {seconds:.1f} s for {devices} x {device.device_kind}{how}{calls}"
        )

    def keep(self, step: int, sums: Any, loss: jax.Array) -> None:
        """Keeps what the next `report` says of training step `step`; does not wait for it."""
        self._kept = step, sums, loss

    def report(self, check_finite: Callable[[dict[str, np.ndarray]], None]) -> None:
        """Waits for what was kept, if there is something, checks it and shows it."""
        if self._kept:
            step, sums, loss = self._kept
            self._kept, sums = None, parallel.to_host(sums)
            check_finite(sums)
            self.steps(step, sums, loss)

    def steps(self, step: int, sums: dict[str, np.ndarray], loss: jax.Array) -> None:
        """Shows the epoch's means so far, and records the loss of training step `step`."""
        mean, accuracy = sums["loss"] / sums["count"], sums["correct"] / sums["count"]
        done = (step - 1) % self._steps + 1
        self.progress.update(done, float(mean), float(accuracy))
        if parallel.is_main_process():
            self.trackers.metrics({"step_loss": float(loss)}, step)

    def evaluated(self, confusion: np.ndarray, params: Any, image_shape: tuple, step: int) -> None:
        """Draws the test split's confusion matrix and the first layer's kernels for the trackers.

        Args:
          confusion: int64 [classes, classes].
          params: the model's parameters.
          image_shape: (H, W, C).
          step: the run's training step.
        """
        if not parallel.is_main_process():
            return
        try:
            pictures = {"confusion": images.draw_confusion(confusion)}
            if kernel := first_kernel(self._model, image_shape, params):
                pictures["kernels"] = images.draw_kernels(kernel[1])
            self.trackers.images(pictures, step)
        except Exception as error:  # a picture must not end a run
            log.warning(
                "warning: no pictures for the trackers: %s: %s", type(error).__name__, error
            )

    def epoch(self, line: dict[str, Any]) -> None:
        """Writes an epoch's line to metrics.jsonl and shows it.

        Raises:
          CheckpointError: it cannot be written.
        """
        if parallel.is_main_process():
            workdir.append_metrics(self._folder, line)
            self.trackers.metrics(metrics_of(line), line["step"])
            self.trackers.flush()
        self.progress.end_epoch(line)
