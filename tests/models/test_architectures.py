import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import models
from cnn_jax.models.layers import glorot_uniform, takes_one_image_size
from cnn_jax.models.speedrun import dirac
from tests.quick import noisy_variables, quick_jit

GRAY, COLOUR = (28, 28, 1), (32, 32, 3)
ARCHITECTURES = [name for name in models.__all__ if name != "Convolutional"]  # which wraps them

# The lecture's table: model, image, output of every layer, parameters of every layer.
TABLE = [
    (
        models.MLP,
        GRAY,
        {"Flatten_0": (784,), "Dense_0": (128,), "Dense_1": (10,)},
        {"Dense_0": 784 * 128 + 128, "Dense_1": 128 * 10 + 10},
        101_770,
    ),
    (
        models.ConvStack,
        GRAY,
        {
            "Conv_0": (22, 22, 32),
            "Conv_1": (16, 16, 64),
            "Conv_2": (10, 10, 128),
            "Conv_3": (4, 4, 256),
            "Flatten_0": (4096,),
            "Dense_0": (10,),
        },
        {
            "Conv_0": 1_600,
            "Conv_1": 100_416,
            "Conv_2": 401_536,
            "Conv_3": 1_605_888,
            "Dense_0": 40_970,
        },
        2_150_410,
    ),
    (
        models.MaxPoolCNN,
        GRAY,
        {
            "Conv_0": (26, 26, 32),
            "Conv_1": (24, 24, 64),
            "MaxPool_0": (12, 12, 64),
            "Conv_2": (10, 10, 128),
            "Conv_3": (8, 8, 256),
            "MaxPool_1": (4, 4, 256),
            "Conv_4": (2, 2, 512),
            "Flatten_0": (2048,),
            "Dense_0": (10,),
        },
        {
            "Conv_0": 320,
            "Conv_1": 18_496,
            "Conv_2": 73_856,
            "Conv_3": 295_168,
            "Conv_4": 1_180_160,
            "Dense_0": 20_490,
        },
        1_588_490,
    ),
    (
        models.StridedCNN,
        GRAY,
        {
            "Conv_0": (26, 26, 32),
            "Conv_1": (12, 12, 64),
            "Conv_2": (10, 10, 128),
            "Conv_3": (4, 4, 256),
            "Conv_4": (2, 2, 512),
            "Flatten_0": (2048,),
            "Dense_0": (10,),
        },
        {
            "Conv_0": 320,
            "Conv_1": 18_496,
            "Conv_2": 73_856,
            "Conv_3": 295_168,
            "Conv_4": 1_180_160,
            "Dense_0": 20_490,
        },
        1_588_490,
    ),
    (
        models.SamePaddingCNN,
        GRAY,
        {
            "Conv_0": (28, 28, 32),
            "Conv_1": (14, 14, 64),
            "Conv_2": (14, 14, 128),
            "Conv_3": (7, 7, 256),
            "Conv_4": (7, 7, 512),
            "Flatten_0": (25_088,),
            "Dense_0": (10,),
        },
        {
            "Conv_0": 320,
            "Conv_1": 18_496,
            "Conv_2": 73_856,
            "Conv_3": 295_168,
            "Conv_4": 1_180_160,
            "Dense_0": 250_890,
        },
        1_818_890,
    ),
    (
        models.LeNet,
        GRAY,
        {
            "Conv_0": (28, 28, 6),
            "MaxPool_0": (14, 14, 6),
            "Conv_1": (10, 10, 16),
            "MaxPool_1": (5, 5, 16),
            "Flatten_0": (400,),
            "Dense_0": (120,),
            "Dense_1": (84,),
            "Dense_2": (10,),
        },
        {"Conv_0": 156, "Conv_1": 2_416, "Dense_0": 48_120, "Dense_1": 10_164, "Dense_2": 850},
        61_706,
    ),
    (
        models.LeNet,
        COLOUR,
        {
            "Conv_0": (32, 32, 6),
            "MaxPool_0": (16, 16, 6),
            "Conv_1": (12, 12, 16),
            "MaxPool_1": (6, 6, 16),
            "Flatten_0": (576,),
            "Dense_0": (120,),
            "Dense_1": (84,),
            "Dense_2": (10,),
        },
        {"Conv_0": 456, "Conv_1": 2_416, "Dense_0": 69_240, "Dense_1": 10_164, "Dense_2": 850},
        83_126,
    ),
    (
        models.FullyConvCNN,
        GRAY,
        {
            "Conv_0": (28, 28, 32),
            "Conv_1": (14, 14, 64),
            "Conv_2": (14, 14, 128),
            "Conv_3": (7, 7, 256),
            "Conv_4": (1, 1, 512),
            "Conv_5": (1, 1, 10),
        },
        {
            "Conv_0": 320,
            "Conv_1": 18_496,
            "Conv_2": 73_856,
            "Conv_3": 295_168,
            "Conv_4": 7 * 7 * 256 * 512 + 512,
            "Conv_5": 5_130,
        },
        6_816_010,
    ),
    (
        models.CifarCNN,
        COLOUR,
        {
            "Conv_0": (32, 32, 32),
            "Conv_1": (16, 16, 64),
            "Conv_2": (16, 16, 128),
            "Conv_3": (8, 8, 256),
            "Conv_4": (8, 8, 512),
            "Conv_5": (4, 4, 1024),
            "Flatten_0": (16_384,),
            "Dense_0": (512,),
            "Dense_1": (10,),
        },
        {
            "Conv_0": 896,
            "Conv_1": 18_496,
            "Conv_2": 73_856,
            "Conv_3": 295_168,
            "Conv_4": 1_180_160,
            "Conv_5": 4_719_616,
            "Dense_0": 16_384 * 512 + 512,
            "Dense_1": 5_130,
        },
        14_682_442,
    ),
]
CASES = [pytest.param(*row, id=f"{row[0].__name__}-{row[1][0]}") for row in TABLE]
DENSE = [row[:2] for row in TABLE if row[0] is not models.FullyConvCNN]
DENSE.append((models.SpeedrunCNN, COLOUR))


def abstract(shape, batch=2):
    return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


def abstract_variables(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), abstract(shape))


def layers_of(model, shape):
    """{name: (module, output shape)} of the model's layers, in the order in which they are called."""
    seen = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.module.path and context.method_name == "__call__":
            seen["/".join(context.module.path)] = (context.module.clone(), output.shape)
        return output

    with nn.intercept_methods(record):
        abstract_variables(model, shape)
    return seen


def test_the_public_names():
    assert {*ARCHITECTURES} == {row[0].__name__ for row in TABLE} | {"SpeedrunCNN"}


@pytest.mark.parametrize(("model", "image", "shapes", "counts", "total"), CASES)
def test_shapes_and_parameters_are_the_lectures(model, image, shapes, counts, total):
    found = {name: shape for name, (_, shape) in layers_of(model(), image).items()}
    assert [*found.items()] == [(name, (2, *shape)) for name, shape in shapes.items()]
    params = abstract_variables(model(), image)["params"]
    numbers = {
        name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in params.items()
    }
    assert numbers == counts
    assert sum(numbers.values()) == total
    assert f"{total:,}" in model.__doc__


@pytest.mark.parametrize(("model", "image", "shapes", "counts", "total"), CASES)
def test_layers_are_keras(model, image, shapes, counts, total):
    """Glorot-uniform kernels, zero biases, float32, the paddings and strides of the listing."""
    for name, (layer, _) in layers_of(model(), image).items():
        if name.startswith(("Conv", "Dense")):
            assert layer.kernel_init is glorot_uniform
            assert (
                layer.bias_init is nn.initializers.zeros_init
                or (np.asarray(layer.bias_init(jax.random.key(0), (3,))) == 0).all()
            )
            assert layer.use_bias
        elif name.startswith("MaxPool"):
            assert layer.window == (2, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_variables(model(), image))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(("model", "image", "shapes", "counts", "total"), CASES)
def test_logits_are_float32_and_nothing_follows_them(model, image, shapes, counts, total):
    """Twice the last layer is twice the logits: no softmax, no ReLU, no other scale."""
    net, last = model(num_classes=4), [*shapes][-1]
    variables = noisy_variables(net, image)
    batch = np.random.default_rng(1).random((2, *image), np.float32)
    logits = quick_jit(lambda variables: net.apply(variables, batch, train=False))
    once = np.asarray(logits(variables))
    params = variables["params"]
    params[last] = jax.tree.map(lambda leaf: 2 * leaf, params[last])
    twice = np.asarray(logits(variables))
    assert once.dtype == np.float32
    assert once.shape == ((2, 1, 1, 4) if model is models.FullyConvCNN else (2, 4))
    assert (once < 0).any() or (once.sum(-1) > 1.5).all()
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4)


def test_relu_follows_every_hidden_layer():
    """With a bias that no input can lift above zero, a layer's ReLU hides the input behind it."""
    for model, image, shapes, *_ in TABLE:
        hidden = [name for name in shapes if name.startswith(("Conv", "Dense"))][:-1]
        net = model()
        variables = noisy_variables(net, image)
        logits = quick_jit(net.apply)
        image_1, image_2 = np.random.default_rng(2).random((2, 1, *image), np.float32)
        for name in (hidden[0], hidden[-1]):
            params = dict(variables["params"])
            params[name] = {"kernel": params[name]["kernel"], "bias": params[name]["bias"] - 1e9}
            one, other = (logits({"params": params}, x) for x in (image_1, image_2))
            np.testing.assert_array_equal(one, other)
            assert np.isfinite(one).all()
            assert np.abs(one).max() < 1e6


# --------------------------------------------------------------------------------- image sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), (1, 1)),
        ((64, 64), (10, 10)),
        ((32, 32), (2, 2)),
        ((29, 28), (2, 1)),
        ((28, 64), (1, 10)),
        ((224, 224), (50, 50)),
    ],
)
def test_fully_conv_maps_any_size_with_the_same_parameters(size, expected):
    model = models.FullyConvCNN()
    variables = abstract_variables(model, GRAY)
    assert abstract_variables(model, (*size, 1)) == variables
    logits = jax.eval_shape(model.apply, variables, abstract((*size, 1), batch=32))
    assert logits.shape == (32, *expected, 10)


def test_a_score_of_the_class_map_sees_its_window_alone():
    """One stack of windows and the map of the image they are cut from agree away from the borders."""
    model = models.FullyConvCNN(num_classes=2)
    variables = noisy_variables(model, GRAY)
    image = np.random.default_rng(3).random((1, 44, 44, 1), np.float32)
    scores = quick_jit(model.apply)
    whole = scores(variables, image)  # [1, 5, 5, 2]
    assert whole.shape == (1, 5, 5, 2)
    changed = image.copy()
    changed[:, 36:, 36:] = 0
    moved = np.abs(np.asarray(scores(variables, changed) - whole)).max(-1)[0]
    # A score sees 28 pixels, 4 further for each step, and 5 more on each side through the padding.
    assert moved[4, 4] > 1e-3 * np.abs(whole).max()
    # Fourier's transform spreads rounding errors over a row, and nothing else.
    nothing = 1e-5 * np.abs(whole).max()
    assert moved[0].max() < nothing
    assert moved[:, 0].max() < nothing


@pytest.mark.parametrize("size", [(27, 28), (28, 27), (7, 7), (1, 1)])
def test_fully_conv_refuses_less_than_28(size):
    with pytest.raises(ValueError, match=f"from 28x28 up, got {size[0]}x{size[1]}"):
        abstract_variables(models.FullyConvCNN(), (*size, 1))


@pytest.mark.parametrize(("model", "image"), DENSE)
def test_a_dense_model_refuses_another_size(model, image):
    net = model()
    variables = abstract_variables(net, image)
    own, channels = image[0], image[2]
    with pytest.raises(ValueError, match="FullyConvCNN takes any size") as caught:
        jax.eval_shape(net.apply, variables, abstract((64, 64, channels)))
    said = str(caught.value)
    assert said.startswith(f"{model.__name__} was initialised for images of ")
    assert f"got 64x64x{channels}: " in said
    assert "\n" not in said
    # The sizes it names lead to these parameters, its own among them; their neighbours do not.
    low, high = re.search(r"of (\d+)x\1x\d+(?: to (\d+)x\2x\d+)?,", said).groups()
    low, high = int(low), int(high or low)
    assert low <= own <= high
    for size in (low - 1, low, high, high + 1):
        try:
            fits = abstract_variables(net, (size, size, channels)) == variables
        except ValueError:
            fits = False
        assert fits == (low <= size <= high)


@pytest.mark.parametrize("other", [(20, 20, 1), (28, 50, 1), (50, 28, 1), (29, 64, 1)])
def test_a_dense_model_refuses_smaller_and_rectangular_images(other):
    net = models.LeNet()
    with pytest.raises(ValueError, match=f"got {'x'.join(map(str, other))}: "):
        jax.eval_shape(net.apply, abstract_variables(net, GRAY), abstract(other))


@pytest.mark.parametrize(("model", "image"), DENSE)
def test_a_dense_model_refuses_other_channels(model, image):
    net = model()
    other = (*image[:2], 4 - image[2])
    with pytest.raises(ValueError, match="FullyConvCNN takes any size") as caught:
        jax.eval_shape(net.apply, abstract_variables(net, image), abstract(other))
    assert f"got {'x'.join(map(str, other))}: " in str(caught.value)
    assert f"x{image[2]}" in str(caught.value).partition(", got")[0]


def test_a_dense_model_that_was_initialised_for_a_rectangle():
    net = models.LeNet()
    variables = abstract_variables(net, (28, 40, 1))
    assert jax.eval_shape(net.apply, variables, abstract((28, 40, 1))).shape == (2, 10)
    with pytest.raises(ValueError, match="initialised for images of another size, got 28x28x1"):
        jax.eval_shape(net.apply, variables, abstract(GRAY))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (models.ConvStack, 24),
        (models.MaxPoolCNN, 15),
        (models.StridedCNN, 20),
        (models.LeNet, 11),
        (models.SpeedrunCNN, 6),
    ],
)
def test_an_image_of_which_the_layers_leave_nothing(model, size):
    with pytest.raises(
        ValueError, match=f"^{model.__name__} needs larger images than {size}x{size}x3"
    ):
        abstract_variables(model(), (size, size, 3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_models_take_one_size(name):
    assert takes_one_image_size(getattr(models, name)()) == (name != "FullyConvCNN")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_num_classes(name):
    net = getattr(models, name)(num_classes=7)
    shape = COLOUR if name in ("CifarCNN", "SpeedrunCNN") else GRAY
    logits, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), abstract(shape))
    assert logits.shape[-1] == 7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_in_bfloat16(name):
    """The forward pass of a training step takes bfloat16 for images and parameters."""
    net = getattr(models, name)()
    shape = COLOUR if name in ("CifarCNN", "SpeedrunCNN") else GRAY
    variables = jax.eval_shape(net.init, jax.random.key(0), abstract(shape))
    coarse = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables)
    image = jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
    logits, _ = jax.eval_shape(
        functools.partial(net.apply, train=True, mutable=["batch_stats"]), coarse, image
    )
    assert logits.dtype == jnp.bfloat16


# ----------------------------------------------------------------------------------- speedrun


def test_the_speedruns_shapes_and_parameters():
    net = models.SpeedrunCNN()
    found = {name: shape[1:] for name, (_, shape) in layers_of(net, COLOUR).items()}
    assert found["whitening"] == (31, 31, 24)
    assert [found[f"ConvGroup_{i}"] for i in range(3)] == [(15, 15, 64), (7, 7, 256), (3, 3, 256)]
    assert found["MaxPool_0"] == (1, 1, 256)
    assert found["Dense_0"] == (10,)
    variables = abstract_variables(net, COLOUR)
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert total == 1_971_640
    assert f"{total:,}" in models.SpeedrunCNN.__doc__
    norms = variables["params"]["ConvGroup_0"]["BatchNorm_0"]
    assert set(norms) == {"bias"}  # its scale stays 1
    assert set(variables["batch_stats"]["ConvGroup_0"]["BatchNorm_0"]) == {"mean", "var"}


def test_dirac_passes_the_channels_on():
    make = quick_jit(lambda shape: dirac(jax.random.key(0), shape), static_argnums=0)
    kernel = np.asarray(make((3, 3, 4, 6)))
    image = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    passed = nn.Conv(6, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, image)
    np.testing.assert_allclose(passed[..., :4], image, rtol=1e-6)
    others = kernel[..., 4:]
    assert 0.9 * 36**-0.5 < np.abs(others).max() <= 36**-0.5
    # More channels than filters: each filter passes one on.
    narrow = np.asarray(make((3, 3, 4, 2)))
    np.testing.assert_array_equal(narrow[1, 1], np.eye(4, 2))
    assert narrow.sum() == 2


def test_the_speedruns_logits_are_scaled():
    image = np.random.default_rng(0).random((2, *COLOUR), np.float32)
    variables = noisy_variables(models.SpeedrunCNN(), COLOUR)
    one, other = (
        quick_jit(models.SpeedrunCNN(logit_scale=scale).apply)(variables, image)
        for scale in (1, 0.25)
    )
    np.testing.assert_allclose(0.25 * one, other, rtol=1e-5)


def test_the_whitening_layer_whitens():
    """On the images of the initialisation its outputs have variance 1 and no correlations."""
    noise = np.random.default_rng(0).normal(size=(50, *COLOUR))
    image = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)).astype(np.float32)
    net = models.SpeedrunCNN()
    params = quick_jit(net.init)(jax.random.key(0), image)["params"]
    kernel = params["whitening"]["kernel"]
    output = np.asarray(
        nn.Conv(24, (2, 2), padding="VALID", use_bias=False).apply(
            {"params": {"kernel": kernel}}, image
        )
    ).reshape(-1, 24)
    moments = output[:, :12].T @ output[:, :12] / len(output)
    np.testing.assert_allclose(moments, np.eye(12), atol=5e-3)
    np.testing.assert_allclose(output[:, 12:], -output[:, :12], atol=1e-5)
    head = np.asarray(params["Dense_0"]["kernel"])
    assert head.std() == pytest.approx(1, abs=0.05)
    assert np.abs(head).max() <= 3**0.5
