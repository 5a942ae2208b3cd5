"""The same numbers from flatten + dense and from convolutions, and from windows of a larger image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import models
from cnn_jax.analysis.convert import as_convolutions
from cnn_jax.models.convolutional import Convolutional, convolutional, gives_class_map
from cnn_jax.models.layers import Conv, Dense, Flatten
from tests.quick import make_run, noisy_variables, quick_jit

GRAY, COLOUR = (28, 28, 1), (32, 32, 3)
CONVERTIBLE = [
    (models.MLP(), GRAY),
    (models.ConvStack(), GRAY),
    (models.MaxPoolCNN(), GRAY),
    (models.StridedCNN(), GRAY),
    (models.SamePaddingCNN(), GRAY),
    (models.LeNet(), GRAY),
    (models.LeNet(num_classes=3), (20, 27, 3)),
    (models.CifarCNN(), COLOUR),
    (models.SpeedrunCNN(), COLOUR),
]
IDS = [f"{type(model).__name__}-{shape[0]}x{shape[1]}" for model, shape in CONVERTIBLE]


def both(tmp_path, model, shape):
    """Dense and convolutional network with the same random parameters, as functions of images."""
    dense = make_run(tmp_path, model, shape)
    for statistics in jax.tree.leaves(
        dense.variables["batch_stats"], is_leaf=lambda x: "mean" in x
    ):
        statistics["mean"] *= 0  # a mean of 1 leaves GELUs nothing but rounding errors
    made = as_convolutions(dense)
    return tuple(
        lambda image, run=run: np.asarray(quick_jit(run.model.apply)(run.variables, image))
        for run in (dense, made)
    )


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.mark.parametrize(("model", "shape"), CONVERTIBLE, ids=IDS)
def test_equal_on_images_of_the_trainings_size(model, shape, tmp_path):
    dense, made = both(tmp_path, model, shape)
    image = pixels(3, *shape)
    expected, scores = dense(image), made(image)
    assert scores.shape == (3, 1, 1, model.num_classes)
    assert np.abs(scores[:, 0, 0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("model", "larger", "stride", "places"),
    [
        (models.MLP(), (30, 29), 1, (3, 2)),
        (models.ConvStack(), (30, 29), 1, (3, 2)),
        (models.MaxPoolCNN(), (33, 36), 4, (2, 3)),
        (models.StridedCNN(), (33, 36), 4, (3, 3)),  # 25 of 28 pixels count
    ],
)
def test_without_padding_each_score_is_that_of_its_window(model, larger, stride, places, tmp_path):
    dense, made = both(tmp_path, model, GRAY)
    image = pixels(1, *larger, 1)
    scores = made(image)[0]
    assert scores.shape == (*places, 10)
    for row, column in np.ndindex(*places):
        window = image[:, row * stride :, column * stride :][:, :28, :28]
        if window.shape[1:3] == (28, 28):
            expected = dense(window)[0]
            np.testing.assert_allclose(
                scores[row, column], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
            )


def test_the_parameters_keep_their_names_and_order(tmp_path):
    dense = make_run(tmp_path, models.LeNet(), GRAY)
    before, after = dense.variables["params"], as_convolutions(dense).variables["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert after["Dense_0"]["kernel"].shape == (5, 5, 16, 120)
    assert after["Dense_2"]["kernel"].shape == (1, 1, 84, 10)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.ravel(old), np.ravel(new))


def test_it_can_be_trained(tmp_path):
    """As a model like any other: from its own initialisation, and with gradients."""
    model = Convolutional(models.LeNet(), (5, 5))
    image = pixels(2, *GRAY)
    params = noisy_variables(model, GRAY)["params"]
    assert params["Dense_0"]["kernel"].shape == (5, 5, 16, 120)
    grads = quick_jit(jax.grad(lambda p: model.apply({"params": p}, image, True).sum()))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_an_image_that_is_too_small(tmp_path):
    _, made = both(tmp_path, models.LeNet(), GRAY)
    said = "^LeNet leaves a map of 5x4 of images of 28x27; its first dense layer, .* needs 5x5\\b"
    with pytest.raises(ValueError, match=said):
        made(pixels(1, 28, 27, 1))


def test_which_models_give_a_class_map():
    assert gives_class_map(models.FullyConvCNN(), GRAY)
    assert gives_class_map(Convolutional(models.LeNet(), (5, 5)), GRAY)
    assert not gives_class_map(models.LeNet(), GRAY)


# --------------------------------------------------------------------- what is not converted


class Own(nn.Module):
    """A convolution and a head of one's own."""

    head: object

    @nn.compact
    def __call__(self, image, train=False):
        return self.head(Conv(4, (3, 3))(image))


@pytest.mark.parametrize(
    "head",
    [
        lambda x: Dense(3)(x.reshape(len(x), -1)),  # flattened by nobody whom one could ask
        lambda x: Dense(3)(x.mean((1, 2))),
        lambda x: Dense(3)(Flatten()(x)) + Dense(3)(Flatten()(x)),
    ],
)
def test_a_head_of_other_layers_is_refused(head):
    with pytest.raises(ValueError, match=r"^Own has no head of layers.Flatten and dense layers "):
        convolutional(Own(head), GRAY)


@pytest.mark.parametrize("model", [models.FullyConvCNN(), Convolutional(models.LeNet(), (5, 5))])
def test_what_is_convolutional_already_is_refused(model):
    name = type(model).__name__
    with pytest.raises(ValueError, match=rf"^{name} is convolutional already: it takes any larger"):
        convolutional(model, GRAY)


def test_what_stands_between_the_dense_layers_stays(tmp_path):
    def head(x):
        x = nn.LayerNorm()(nn.Dense(8, use_bias=False)(Flatten()(x)))
        return Dense(5)(nn.Dropout(0.5, deterministic=True)(jnp.tanh(x)))

    dense, made = both(tmp_path, Own(head), (6, 7, 2))
    image = pixels(2, 6, 7, 2)
    np.testing.assert_allclose(made(image)[:, 0, 0], dense(image), rtol=1e-4, atol=1e-5)
    assert made(pixels(2, 8, 8, 2)).shape == (2, 3, 2, 5)
