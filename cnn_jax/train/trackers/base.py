"""What a tracker is: a place outside of metrics.jsonl to which a run reports."""

from pathlib import Path
from typing import Literal

import numpy as np

from cnn_jax.common.errors import Preempted

Ending = Literal["finished", "stopped", "failed"]


def ending_of(error: BaseException | None) -> Ending:
    """How a run ended that raised `error`, or nothing."""
    if error is None:
        return "finished"
    return "stopped" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"


class Tracker:
    """Gets what a run measures. A subclass defines what it has use for.

    It is made once for each call of `train`, by the main process alone. All methods are called by the
    same thread, in the order of the steps. An error in any of them costs a warning and this tracker;
    the run continues.
    """

    def __init__(self, workdir: Path, saved: dict):
        """Args:
        workdir: the run's folder, which exists.
        saved: the content of its config.json.
        """

    def recorded(self) -> dict[str, int] | None:
        """The last step of each metric and picture that the record holds from earlier calls.

        The run then sends nothing twice, and sends again what metrics.jsonl has and the record lacks.
        None: the tracker gets everything that this call measures, and thus some steps twice if an
        earlier call was killed after its last checkpoint.
        """
        return None

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Takes metrics of training step `step`: step_loss, and those in a line of metrics.jsonl."""

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Takes pictures, uint8 [H, W, C]."""

    def checkpoint(self, step: int, sha256: str) -> None:
        """Takes the checksum of a checkpoint's manifest, which has those of all its arrays.

        It comes after the checkpoint has been read back, and again if the step is saved again.
        """

    def flush(self) -> None:
        """Writes what is buffered, after each epoch."""

    def close(self, ending: Ending) -> None:
        """Ends the record of this call: "stopped" if a signal ended the run before its last epoch."""
