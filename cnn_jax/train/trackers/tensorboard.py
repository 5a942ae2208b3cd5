"""The TensorBoard event file of a run; each event is written at once."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.train.trackers.base import Ending, Tracker

log = logging.getLogger(__name__)


class TensorBoard(Tracker):
    """The curves and pictures of one call of `train`, in one file under tensorboard/.

    tensorboardX's SummaryWriter writes in a thread. A full disk ends that thread with a traceback,
    and the run would wait for it for ever. Here events are written at once. After a failure there
    is a warning and no more curves, but the run continues.
    """

    def __init__(self, workdir: Path, saved: dict | None = None):
        """`workdir`/tensorboard need not exist; `saved` is not used."""
        self._folder = workdir / "tensorboard"
        self._is_new = not self._folder.exists()
        self._records: Any = None
        self._failed = False

    def recorded(self) -> dict[str, int] | None:
        """Nothing in a new folder, which thus gets the epochs so far."""
        return {} if self._is_new else None

    def metrics(self, values: dict[str, float], step: int) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, value))
        self.flush()

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        from tensorboardX import summary

        for name, image in images.items():
            self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        if self._records is not None:
            self._try(self._records.flush)

    def close(self, ending: Ending = "finished") -> None:
        records, self._records = self._records, None
        if records is not None:
            self._try(records.close)

    def _write(self, step: int, **content: Any) -> None:
        if not self._failed:
            self._try(self._append, step=step, **content)

    def _try(self, action: Callable, **fields: Any) -> None:
        try:
            action(**fields)
        except OSError as error:
            if not self._failed:
                reason = error.strerror
                log.warning(
                    "warning: %s: cannot be written: %s; no more curves", self._folder, reason
                )
            self._failed = True

    def _append(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        def write(**fields: Any) -> None:
            event = Event(wall_time=time.time(), **fields)
            self._records.write(event.SerializeToString())

        if self._records is None:
            self._folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter(str(self._folder / name))
            write(file_version="brain.Event:2")
            # Hides what an earlier run drew after the step from which this one resumes.
            write(step=step, session_log=SessionLog(status=SessionLog.START))
        write(step=step, **content)
