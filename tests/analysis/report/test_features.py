"""The way of an image through the layers, against arithmetic by hand."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from cnn_jax.analysis import restore
from cnn_jax.analysis.report import features
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.models import summary
from tests.tiny import make_examples


@pytest.fixture(scope="module")
def run(lenet: Path) -> RestoredRun:
    return restore.load_run(lenet)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return make_examples(3, seed=5).image


@pytest.fixture(scope="module")
def stages(run: RestoredRun, image: np.ndarray) -> list[features.Stage]:
    return features.follow(run, summary.summarise(run.model, run.image_shape), image)


def test_there_is_one_for_each_layer(stages: list[features.Stage]):
    assert [stage.name for stage in stages] == [
        *("Conv_0", "MaxPool_0", "Conv_1", "MaxPool_1", "Flatten_0"),
        *("Dense_0", "Dense_1", "Dense_2"),
    ]
    assert [stage.shape for stage in stages] == [
        *((28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (400,)),
        *((120,), (84,), (10,)),
    ]
    assert all(stage.output.shape == (3, *stage.shape) for stage in stages)


def test_convolution_relu_and_pooling(
    run: RestoredRun, image: np.ndarray, stages: list[features.Stage]
):
    layer = run.variables["params"]["Conv_0"]
    window = image[1, 8:13, 10:15] / 255  # 'same' padding: seen by the output at (10, 12)
    sums = (window[..., None] * layer["kernel"]).sum((0, 1, 2)) + layer["bias"]
    np.testing.assert_allclose(stages[0].output[1, 10, 12], np.maximum(sums, 0), atol=1e-5)
    assert stages[0].activation == "ReLU"
    pooled = stages[0].output.reshape(3, 14, 2, 14, 2, 6).max((2, 4))
    np.testing.assert_allclose(stages[1].output, pooled, rtol=1e-5)
    assert stages[1].activation == ""


def test_the_last_one_is_the_logits(
    run: RestoredRun, image: np.ndarray, stages: list[features.Stage]
):
    logits = run.model.apply(run.variables, image / np.float32(255))
    np.testing.assert_allclose(stages[-1].output, logits, rtol=1e-4, atol=1e-5)
    assert stages[-1].activation == ""


class Groups(nn.Module):
    """Eight convolutions in four groups, each followed by BatchNorm and GELU."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        for i in range(4):
            image = Group(name=f"group_{i}")(image)
        return image.mean((1, 2))


class Group(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.gelu(nn.BatchNorm(use_running_average=True)(x), approximate=False)
        return x


def test_groups_of_layers_with_gelu(run: RestoredRun):
    images = make_examples(2, (28, 28, 3)).image
    model = Groups()
    variables = jax.jit(model.init)(jax.random.key(0), images / np.float32(255))
    own = dataclasses.replace(run, model=model, variables=variables, image_shape=(28, 28, 3))
    stages = features.follow(own, summary.summarise(model, (28, 28, 3)), images)
    assert [stage.name for stage in stages[-2:]] == ["group_3/Conv_1", "group_3/BatchNorm_1"]
    assert stages[1].activation == "GELU"
    assert -0.2 < stages[1].output.min() < 0  # GELU's least value is -0.17
    assert stages[0].activation == ""
    assert len(stages) == 16
    shown = features.shown(stages)
    assert len(shown) == features.MOST_LAYERS < 16
    assert shown[0] is stages[0]
    assert shown[-1] is stages[-1]


def test_the_maps_that_vary_most_are_drawn():
    output = np.zeros((2, 4, 4, 20), np.float32)
    output[:, :2, :, 17] = 3  # the upper half responds
    output[0, 0, 0, 4] = 1
    strips = features.draw(features.Stage("a", "Conv", (4, 4, 20), "", output))
    assert len(strips) == 2
    tile = strips[0].shape[0]
    assert strips[0].shape[1] == pytest.approx(8 * tile, rel=0.06)  # eight tiles and seven gaps
    first = strips[0][:, :tile, :3].astype(int)
    assert (first[: tile // 2] == first[0, 0]).all()
    assert (first[tile // 2 :] == first[-1, -1]).all()
    assert first[0, 0].sum() > first[-1, -1].sum() + 200  # high is light, low is dark


def test_a_vector_is_drawn_in_rows():
    values = np.arange(120, dtype=np.float32)[None]
    (strip,) = features.draw(features.Stage("a", "Dense", (120,), "", values))
    assert strip.shape == (2 * features.ROW, 8 * features.TILE, 4)
    brightness = strip[:, :, :3].astype(int).sum(-1)
    assert brightness[0, 0] < brightness[0, -1] < brightness[-1, -1]
    assert strip[..., 3].min() == 255  # two rows of sixty
