"""A run in Weights & Biases, without an account unless WANDB_MODE=online asks for one."""

import importlib
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.common.files import library_path
from cnn_jax.train.trackers.base import Ending, Tracker
from cnn_jax.train.workdir import write_text


class WandbRun(Tracker):
    """Keeps its files in wandb/ of the workdir; `wandb sync` uploads them.

    W&B writes what it got every 15 seconds. What it got after that is lost if the process is killed:
    a resumed run sends it again as far as it measures or has kept it.
    """

    def __init__(self, workdir: Path, saved: dict):
        """`workdir`/wandb need not exist; `saved` is what config.json has."""
        import wandb

        self._folder = library_path(workdir) / "wandb"
        self._folder.mkdir(exist_ok=True)
        identity = self._folder / "run_id.txt"
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        self._id = identity.read_text()
        self._image = wandb.Image
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cnn_jax"),
            group=saved["experiment"] or None,
            name=os.environ.get("WANDB_NAME", "/".join(workdir.parts[-2:])),
            id=self._id,
            resume="allow",
            reinit="create_new",  # several seeds have a run each
            dir=str(self._folder.parent),
            mode=mode,
            settings=settings,
        )
        self._run.config.update(saved, allow_val_change=True)

    def recorded(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for path in self._folder.glob(f"*run-*-{self._id}/run-{self._id}.wandb"):
            for record in records(path):
                step = record.history.step.num
                for item in record.history.item:
                    name = item.key or ".".join(item.nested_key)
                    last[name] = max(step, last.get(name, -1))
        return last

    def metrics(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        self._run.log({name: self._image(image) for name, image in images.items()}, step=step)

    def checkpoint(self, step: int, sha256: str) -> None:
        self._run.summary[f"checkpoint_{step}"] = sha256

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


def records(path: Path) -> Iterator[Any]:
    """The records of one of W&B's files, up to where it was cut short.

    The format is LevelDB's log: blocks of 32 KiB with pieces of records, each behind a checksum, its
    length, and whether it is a whole record (1), its first (2), middle (3) or last (4) piece.
    W&B's own reader is no longer in its Python package.
    """
    from google.protobuf.message import DecodeError

    types: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # made at the import
    data = path.read_bytes()
    at, record, header, block = 7, b"", struct.Struct("<IHB"), 2**15
    while at + header.size <= len(data):
        left = block - at % block
        length, kind = header.unpack_from(data, at)[1:] if left >= header.size else (0, 0)
        if not kind:
            at += left
            continue
        piece = data[at + header.size : at + header.size + length]
        if len(piece) < length:
            return
        record = piece if kind in (1, 2) else record + piece
        at += header.size + length
        if kind in (1, 4):
            try:
                yield types.Record.FromString(record)
            except DecodeError:
                return
