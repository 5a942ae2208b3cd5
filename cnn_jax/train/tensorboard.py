"""What TensorBoard shows of a run: its event file, written as the events come."""

import logging
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


class Curves:
    """The curves and pictures of one call of `train`, in a file of its own under tensorboard/.

    tensorboardX's SummaryWriter hands them to a thread, which a full disk ends with a traceback;
    after that the run would wait for it for ever. Here they are written at once, and a failure
    costs a warning and the rest of the curves, not the run.
    """

    def __init__(self, folder: Path):
        """`folder`/tensorboard need not exist."""
        self._folder = folder / "tensorboard"
        self._file: Any = None
        self._failed = False

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point of each of these curves."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, value))

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Pictures, uint8 [H, W, C]."""
        from tensorboardX import summary

        for name, image in images.items():
            self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, step: int, **content: Any) -> None:
        if self._failed:
            return
        try:
            if self._file is None:
                self._open(step)
            self._append(step=step, **content)
        except OSError as error:
            self._failed = True
            log.warning(
                "warning: %s: cannot be written: %s; no more curves", self._folder, error.strerror
            )

    def _open(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(self._folder / name, "wb", buffering=0)  # noqa: SIM115
        self._append(file_version="brain.Event:2")
        # Hides what a run that died had drawn beyond the step from which this one goes on.
        self._append(step=step, session_log=SessionLog(status=SessionLog.START))

    def _append(self, **fields: Any) -> None:
        """One TFRecord: length, checksum, event, checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", masked_crc32c(data)) for data in (length, event)]
        self._file.write(length + sums[0] + event + sums[1])
