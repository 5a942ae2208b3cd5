"""Kernels and confusion matrices as images, and their way to TensorBoard."""

import dataclasses
import io
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from cnn_jax.common import images as pictures
from cnn_jax.config import Config, DataConfig
from cnn_jax.data.splits import Splits
from cnn_jax.models import MLP
from cnn_jax.train import loop


def test_tiles():
    images = np.arange(3, dtype=np.uint8).repeat(2 * 4 * 3).reshape(3, 2, 4, 3)
    picture = pictures.tiles(images, columns=2, side=32)
    assert picture.shape == (16 + 2 + 16, 32 + 2 + 32, 4)
    assert (picture[:16, 34:, 0] == 1).all()
    assert (picture[18:, :32, 0] == 2).all()
    opaque = picture[..., 3] == 255
    assert opaque.sum() == 3 * 16 * 32  # the gaps, and the fourth place, are transparent
    assert not opaque[16:18].any()


def test_signs_of_a_kernel_have_colours():
    kernel = np.zeros((1, 3, 1, 1), np.float32)
    kernel[0, :, 0, 0] = (-1, 0, 1)
    negative, zero, positive = pictures.draw_kernels(kernel, side=3)[0, :, :3].astype(int)
    assert negative[2] > negative[0] + 100  # blue
    assert positive[0] > positive[2] + 100  # orange
    assert zero.min() > 240


def test_colour_kernels_keep_their_colours():
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0, :, 0] = (1, -1, 0)
    red, grey = pictures.draw_kernels(kernel, side=1)[0, [0, 2], :3].astype(int)
    assert red.tolist() == [255, 0, 127]
    assert np.ptp(grey) == 0


def test_kernels_that_are_all_zero_or_many():
    assert pictures.draw_kernels(np.zeros((3, 3, 1, 200), np.float32)).shape[1] == 8 * 48 + 7 * 3
    assert pictures.draw_kernels(np.zeros((3, 3, 2, 1), np.float32)).shape == (48, 48, 4)


def test_the_confusion_matrix_is_darkest_where_a_row_is_whole():
    picture = pictures.draw_confusion(np.array([[5, 0], [500, 500]])).astype(int).sum(-1)
    side = len(picture) // 2
    assert picture[0, 0] < picture[side, 0] == picture[side, side] < picture[0, side]


# ------------------------------------------------------------------------------- TensorBoard


def images_of(workdir: Path) -> dict[tuple[str, int], np.ndarray]:
    """The images of the event files, by name and step; a record is length, crc, data, crc."""
    found = {}
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.HasField("image"):
                    encoded = io.BytesIO(value.image.encoded_image_string)
                    found[value.tag, event.step] = np.asarray(Image.open(encoded))
    return found


@pytest.fixture
def config() -> Config:
    return Config(
        model=MLP(),
        data=DataConfig("tiny_squares"),
        epochs=2,
        batch_size=80,
        eval_batch_size=48,
        eval_every_epochs=2,
        devices=1,
    )


def test_tensorboard_gets_both_after_an_evaluation(config: Config, tmp_path: Path, splits: Splits):
    loop.train(config, tmp_path, splits=splits)
    images = images_of(tmp_path)
    assert set(images) == {("confusion", 4), ("kernels", 4)}
    assert images["confusion", 4].shape == (320, 320, 3)
    assert images["kernels", 4].shape == (8 * 48 + 7 * 3, 8 * 48 + 7 * 3, 4)


def test_pictures_that_fail_do_not_end_a_run(
    config: Config,
    tmp_path: Path,
    splits: Splits,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(confusion: np.ndarray):
        raise MemoryError("no room")

    monkeypatch.setattr(pictures, "draw_confusion", fail)
    with caplog.at_level(logging.WARNING):
        lines = loop.train(dataclasses.replace(config, epochs=1), tmp_path, splits=splits)
    assert len(lines) == 1
    assert images_of(tmp_path) == {}
    assert "no pictures for the trackers: MemoryError: no room" in caplog.text
