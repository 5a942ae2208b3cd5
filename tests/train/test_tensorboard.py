import dataclasses
import errno
import io
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP
from cnn_jax.train import loop
from cnn_jax.train.trackers.tensorboard import TensorBoard
from tests.quick import unoptimised


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files, bit by bit from its polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path) -> list[Event]:
    """What a TFRecord file holds, every checksum checked."""
    data, found = path.read_bytes(), []
    assert (
        masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32
    )
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, end = data[12 : 12 + length], 12 + length
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        assert struct.unpack("<I", data[end : end + 4]) == (masked_crc32c(event),)
        found.append(Event.FromString(event))
        data = data[end + 4 :]
    return found


def only_file(workdir):
    (path,) = (workdir / "tensorboard").iterdir()
    return path


def test_curves_and_pictures_are_there_once_flushed(tmp_path):
    board = TensorBoard(tmp_path)
    assert not (tmp_path / "tensorboard").exists()  # nothing to show yet
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    board.metrics({"train_loss": 0.5, "test_loss": 0.25}, 7)
    assert len(events(only_file(tmp_path))) == 4  # a process that is killed now loses nothing
    board.images({"kernels": picture}, 8)
    board.flush()
    head, session, *rest = events(only_file(tmp_path))
    assert head.file_version == "brain.Event:2"
    assert (session.session_log.status, session.step) == (SessionLog.START, 7)
    shown = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in rest[:2]]
    assert shown == [(7, "train_loss", 0.5), (7, "test_loss", 0.25)]
    assert (rest[2].step, rest[2].summary.value[0].tag) == (8, "kernels")
    encoded = rest[2].summary.value[0].image.encoded_image_string
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), picture)
    board.close()
    board.close()


def test_one_that_comes_late_gets_the_epochs_before_it(splits, tmp_path):
    config = Config(MLP(), DataConfig("tiny"), epochs=1, eval_batch_size=48, devices=1)
    loop.train(config, tmp_path, splits=splits, trackers=["csv"])
    lines = loop.train(dataclasses.replace(config, epochs=2), tmp_path, splits=splits)
    found = [
        (event.step, event.summary.value[0].simple_value)
        for event in events(only_file(tmp_path))
        if event.summary.value and event.summary.value[0].tag == "test_loss"
    ]
    assert found == [(line["step"], pytest.approx(line["test_loss"])) for line in lines]
    assert len(found) == 2


@pytest.mark.parametrize("fails", ["mkdir", "open", "write"])
def test_a_full_disk_costs_one_warning_and_the_curves(tmp_path, monkeypatch, caplog, fails):
    board = TensorBoard(tmp_path)
    if fails == "write":
        board.metrics({"loss": 1.0}, 1)

        def write(records, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    elif fails == "open":
        (tmp_path / "tensorboard").write_text("in the way")
    else:
        board = TensorBoard(tmp_path / "gone")
    for step in range(2, 30):
        board.metrics({"loss": 1.0}, step)
        board.images({"kernels": np.zeros((2, 2, 3), np.uint8)}, step)
    board.close()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"warning: {board._folder}: cannot be written: ")
    assert record.getMessage().endswith("; no more curves")


def test_what_a_run_draws(splits, tmp_path):
    config = Config(
        MLP(),
        DataConfig("tiny"),
        epochs=2,
        batch_size=32,
        eval_batch_size=48,
        log_every_steps=2,
        devices=1,
    )
    with unoptimised():
        lines = loop.train(config, tmp_path, splits=splits)
        loop.train(config, tmp_path, splits=splits)  # nothing left to do, nothing to draw
    drawn = {}
    for event in events(only_file(tmp_path))[2:]:
        value = event.summary.value[0]
        drawn.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in drawn.pop("step_loss")] == [2, 4, 5, 7, 9, 10]
    assert [step for step, _ in drawn.pop("confusion")] == [5, 10]
    drawn.pop("kernels", None)
    assert drawn.keys() == lines[0].keys() - {"step", "epoch"}
    for name, points in drawn.items():
        assert points == [(line["step"], np.float32(line[name])) for line in lines], name
