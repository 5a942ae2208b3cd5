"""What an output sees, against the pixels that really reach it."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax import models
from cnn_jax.models.convolutional import convolutional
from cnn_jax.models.layers import BatchNorm, Conv, Flatten, MaxPool
from cnn_jax.models.receptive_field import Field
from cnn_jax.models.summary import summarise

COLOUR, GRAY = (32, 32, 3), (28, 28, 1)


class Odd(nn.Module):
    """Uneven kernels, strides, dilation and padding, and layers that look at single places."""

    @nn.compact
    def __call__(self, image, train=False):
        x = Conv(2, (3, 2), strides=(2, 1), padding=((1, 2), (0, 1)))(image)
        x = Conv(2, (1, 2), kernel_dilation=(1, 2))(nn.BatchNorm(use_running_average=True)(x))
        x = MaxPool((1, 3))(x)
        x = nn.Conv(2, (4, 4), strides=3)(x)  # flax's: padding "SAME"
        x = nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(x))
        return Conv(2, (2, 2), padding=1)(x)


def on(model, larger, own=GRAY):
    """A network of convolutions alone on a larger image."""
    return pytest.param(convolutional(model, own), larger, id=f"{type(model).__name__}-converted")


NETWORKS = [
    pytest.param(model, shape, id=type(model).__name__)
    for model, shape in [
        (models.MLP(), GRAY),
        (models.ConvStack(), GRAY),
        (models.MaxPoolCNN(), GRAY),
        (models.StridedCNN(), GRAY),
        (models.SamePaddingCNN(), (29, 30, 1)),
        (models.LeNet(), GRAY),
        (models.CifarCNN(), COLOUR),
        (models.SpeedrunCNN(), COLOUR),
        (models.FullyConvCNN(), (70, 61, 1)),
        (Odd(), (40, 33, 1)),
    ]
] + [
    on(models.MLP(), (33, 30, 1)),
    on(models.ConvStack(), (33, 30, 1)),
    on(models.MaxPoolCNN(), (45, 50, 1)),
    on(models.StridedCNN(), (45, 50, 1)),
    on(models.SamePaddingCNN(), (77, 70, 1)),
    on(models.LeNet(), (45, 40, 1)),
    on(models.CifarCNN(), (131, 100, 3), COLOUR),
    on(models.SpeedrunCNN(), (101, 90, 3), COLOUR),
]


def all_ones(outputs, dense_is_one_place):
    """Turns every layer into sums over its windows, on one channel: no pixel can cancel another.

    Args:
      outputs: takes what each layer gives, under its name.
      dense_is_one_place: whether a dense layer over a map looks at single places, as flax has it.
    """

    def pair(value):
        return (value,) * 2 if isinstance(value, int | None) else value

    def summed(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not layer.path:
            return call(*args, **kwargs)
        x = args[0]
        if isinstance(layer, nn.Conv):
            padding = layer.padding
            x = lax.conv_general_dilated(
                x,
                jnp.ones((*layer.kernel_size, 1, 1)),
                [step or 1 for step in pair(layer.strides)],
                padding if isinstance(padding, str) else [pair(side) for side in pair(padding)],
                rhs_dilation=pair(layer.kernel_dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        elif isinstance(layer, MaxPool):
            x = nn.avg_pool(x, layer.window, layer.window)
        elif isinstance(layer, nn.Dense) and (x.ndim == 2 or dense_is_one_place):
            x = x.sum(-1, keepdims=True)
        elif not isinstance(layer, BatchNorm | nn.BatchNorm):
            x = call(*args, **kwargs)
        if hasattr(x, "shape"):
            outputs["/".join(layer.path)] = x
        return x

    return summed


@pytest.mark.parametrize(("model", "shape"), NETWORKS)
def test_the_pixels_that_reach_an_output(model, shape):
    """Images that are black but for one row, or one column, say which ones an output sees."""
    height, width = shape[:2]
    image = np.zeros((height + width, height, width, 1), np.float32)
    image[np.arange(height), np.arange(height)] = 1
    image[height + np.arange(width), :, np.arange(width)] = 1
    outputs = {}
    with nn.intercept_methods(all_ones(outputs, isinstance(model, Odd))):
        model.apply({"params": {}}, image)
    for layer in summarise(model, shape).layers:
        reached = np.asarray(outputs[layer.name])
        if reached.ndim == 2:  # behind the flattening all outputs see the same
            reached = reached.sum(-1)[:, None, None, None]
        assert reached.shape[1:3] == layer.field.places
        assert (reached >= 0).all()
        for row, column in np.ndindex(layer.field.places):
            top, left = layer.field.origin(row, column)
            rows, columns = (
                np.flatnonzero(x) for x in np.split(reached[:, row, column, 0], [height])
            )
            window = range(max(0, top), min(height, top + layer.field.size[0]))
            assert [*rows] == [*window], layer.name
            window = range(max(0, left), min(width, left + layer.field.size[1]))
            assert [*columns] == [*window], layer.name


@pytest.mark.parametrize(
    ("model", "shape", "size", "stride", "start"),
    [
        (models.LeNet(), GRAY, 32, 4, -2),  # 5 pixels, 6, 14, 16; then 5 x 5 of them, 4 apart
        (models.MLP(), GRAY, 28, 1, 0),
        (models.StridedCNN(), GRAY, 25, 4, 0),
    ],
)
def test_windows_by_hand(model, shape, size, stride, start):
    field = summarise(convolutional(model, shape), shape).field
    assert (field.size, field.stride, field.start) == ((size,) * 2, (stride,) * 2, (start,) * 2)
    assert field.places == (1, 1)


def test_the_windows_that_lie_inside():
    random = np.random.default_rng(0)
    for _ in range(50):
        size, stride, start, image, count = (random.integers(1, 20, 2) for _ in range(5))
        field = Field(
            *(tuple(map(int, pair)) for pair in (count, size, stride, start - 10)),
        )
        rows, columns = field.inside(tuple(map(int, image)))
        for place in itertools.product(range(count[0]), range(count[1])):
            origin = np.array(field.origin(*place))
            inside = (origin >= 0).all() and (origin + size <= image).all()
            assert inside == (place[0] in rows and place[1] in columns)


# ----------------------------------------------------------------------- what is not known


class Chain(nn.Module):
    """A convolution, something, another convolution."""

    between: object

    @nn.compact
    def __call__(self, image, train=False):
        return Conv(2, (3, 3), name="last")(self.between(Conv(2, (3, 3))(image)))


class Average(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.avg_pool(x, (3, 3), padding="SAME")


@pytest.mark.parametrize(
    "between",
    [
        lambda x: nn.max_pool(x, (2, 2), (2, 2)),  # seen by nobody but for its smaller map
        lambda x: Average()(x),  # of the same size, but who knows
        lambda x: nn.Conv(2, (3, 3), padding="CIRCULAR")(x),
        lambda x: nn.Conv(2, (3, 3), input_dilation=2, padding=1)(x),
        lambda x: nn.ConvTranspose(2, (3, 3), strides=(2, 2))(x),
        lambda x: nn.GroupNorm(1)(x),  # sees the whole map
        lambda x: jnp.concatenate([x, x], 1),
        lambda x: nn.max_pool(x, (3, 3), (1, 1), "SAME"),  # functions that keep the map's size
        lambda x: nn.avg_pool(x, (3, 3), padding="SAME"),
        lambda x: jnp.roll(x, 1, 1),
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x[:, ::-1],
        lambda x: x * x.mean((1, 2), keepdims=True),
        lambda x: jax.image.resize(x, x.shape, "linear", antialias=True) + jnp.cumsum(x, 2),
        lambda x: nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=3)(x),
    ],
)
def test_behind_a_layer_that_is_not_looked_through(between):
    layers = {layer.name: layer for layer in summarise(Chain(between), (20, 20, 1)).layers}
    assert layers["Conv_0"].field.size == (3, 3)
    assert layers["last"].field is None


@pytest.mark.parametrize(
    "between",
    [
        nn.relu,
        nn.gelu,
        jax.nn.softmax,
        lambda x: nn.LayerNorm()(x),
        lambda x: nn.RMSNorm()(x),
        lambda x: jnp.concatenate([nn.relu(x), nn.relu(-x)], -1),
        lambda x: jnp.where(x > 0, x, 0.1 * x) + jnp.float32(1),
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        lambda x: nn.remat(nn.Dense)(3)(x),
        jax.jit(lambda x: jnp.tanh(x).reshape(*x.shape[:3], 1, -1).sum(-1)),
    ],
)
def test_behind_a_function_of_single_places(between):
    layers = {layer.name: layer for layer in summarise(Chain(between), (20, 20, 1)).layers}
    assert layers["last"].field == Field((16, 16), (5, 5))


def test_branches_see_what_their_union_sees():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            x = Conv(2, (3, 3), padding="SAME")(image)
            wide = Conv(2, (5, 3), padding="SAME", name="wide")(x)
            high = Conv(2, (1, 1))(Conv(2, (1, 7), padding="SAME")(x))
            return x + wide + high

    found = summarise(Net(), (20, 20, 1))
    assert {layer.name: layer.field for layer in found.layers}["wide"].size == (7, 5)
    assert found.field == Field((20, 20), (7, 9), (1, 1), (-3, -4))


def test_flattening_another_map_than_the_last_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            x = nn.max_pool(Conv(2, (3, 3))(image), (2, 2), (2, 2))
            return nn.Dense(3)(Flatten()(x))

    assert summarise(Net(), (20, 20, 1)).field is None


def test_a_field_as_text():
    field = Field((1, 1), (32, 32), (4, 4), (-2, -2))
    assert field.shown() == ("32x32", "4", "-2")
    uneven = dataclasses.replace(field, size=(32, 30), stride=(4, 2), start=(-2, 0))
    assert uneven.shown() == ("32x30", "4x2", "-2,0")
