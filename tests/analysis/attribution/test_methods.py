"""The pixels that a prediction depends on, against networks where they can be calculated by hand."""

import flax.linen as nn
import numpy as np
import pytest

from cnn_jax.analysis.attribution import methods
from cnn_jax.models.layers import Conv, Dense
from cnn_jax.models.summary import summarise
from tests.networks import Linear
from tests.quick import make_run, unoptimised

SHAPE = (12, 10, 3)
TARGET = np.array([2, 7])


class Pooled(nn.Module):
    """A convolution, the mean over its map, and a dense layer."""

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(Conv(5, (3, 3))(image).mean((1, 2)))


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)


def explained(run, image):
    return methods.explain(run, summarise(run.model, SHAPE), image, TARGET)


def test_a_linear_network(tmp_path, image):
    """Its gradient is its kernel; the window over the only pixel with a weight matters alone."""
    run = make_run(tmp_path, Linear(), SHAPE)
    kernel = run.variables["params"]["Dense_0"]["kernel"]
    found = explained(run, image)
    assert [*found] == ["saliency", "occlusion"]
    expected = [np.abs(kernel[:, c]).reshape(SHAPE).max(-1) for c in TARGET]
    np.testing.assert_allclose(found["saliency"], expected, rtol=1e-6)
    kernel[:] = 0
    kernel.reshape(*SHAPE, 10)[7, 4, :, TARGET] = 1
    image = image // 2
    image[:, 7, 4] = 255
    falls = explained(run, image)["occlusion"]
    # A window is 2 x 2 pixels here and moves by one.
    assert {(r, c) for _, r, c in np.argwhere(falls > 0)} == {
        (r, c) for r in (6, 7, 8) for c in (3, 4, 5)
    }
    assert (falls[:, 7, 4] == falls.max((1, 2))).all()


def test_grad_cam_of_a_mean_over_the_map(tmp_path, image):
    run = make_run(tmp_path, Pooled(), SHAPE)
    params = run.variables["params"]
    kernel, bias = params["Conv_0"]["kernel"], params["Conv_0"]["bias"]
    windows = np.lib.stride_tricks.sliding_window_view(image / 255, (3, 3), (1, 2))
    maps = np.einsum("nyxcij,ijck->nyxk", windows, kernel) + bias  # [2, 10, 8, 5]
    weights = params["Dense_0"]["kernel"][:, TARGET].T / (10 * 8)
    cam = np.maximum(np.einsum("nyxk,nk->nyx", maps, weights), 0)
    found = explained(run, image)["Grad-CAM"]
    assert found.shape == (2, 12, 10)
    rows, columns = np.arange(12) * 10 // 12, np.arange(10) * 8 // 10
    np.testing.assert_allclose(found, cam[:, rows][:, :, columns], rtol=1e-4, atol=1e-7)


class Hidden(nn.Module):
    """Its convolution cannot be intercepted."""

    @nn.compact
    def __call__(self, image, train=False):
        return nn.remat(Pooled)()(image)


class Shared(nn.Module):
    """One convolution at two sizes: which of its maps would Grad-CAM show?"""

    @nn.compact
    def __call__(self, image, train=False):
        x = Conv(3, (3, 3), padding="SAME")
        return Dense(10)(x(x(image)[:, ::2, ::2]).mean((1, 2)))


@pytest.mark.parametrize("model", [Hidden(), Shared()])
def test_a_network_without_one_last_map(tmp_path, image, model):
    assert [*explained(make_run(tmp_path, model, SHAPE), image)] == ["saliency", "occlusion"]
