"""The shape of images that --input_size and the dataset decide on."""

import pytest

from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import DataConfig
from cnn_jax.data.sources import input_shape

GRAY = DataConfig("fashion_mnist")


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (None, (28, 28, 1)),
        ("64", (64, 64, 1)),
        ("64x48", (64, 48, 1)),
        ("64x48x3", (64, 48, 3)),
        ("28x28x4", (28, 28, 4)),
    ],
)
def test_the_input_size(text, shape):
    assert input_shape(GRAY, text) == shape


def test_the_input_size_follows_the_data(tfds_dir):
    resized = DataConfig("cifar10", image_size=(64, 48))
    assert input_shape(resized, None) == (64, 48, 3)
    assert input_shape(resized, "20") == (20, 20, 3)
    own = DataConfig("tiny_squares")
    assert input_shape(own, None, str(tfds_dir)) == (28, 28, 1)
    unknown = DataConfig("xyzzy")
    assert input_shape(unknown, "8x9x3") == (8, 9, 3)
    with pytest.raises(DataError, match=r"^data.name=xyzzy: "):
        input_shape(unknown, "8x9")


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "x", "64x", "x64", "64X64", "64,64", "1x2x3x4", "28.0", "028", "100000", "²"],
)
def test_what_is_no_input_size(text):
    with pytest.raises(ConfigError) as caught:
        input_shape(GRAY, text)
    assert str(caught.value) == f"--input_size={text}: write SIZE, HxW or HxWxC, as in 64x64x3"
