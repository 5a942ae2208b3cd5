"""The kernel that meets the image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import MLP, LeNet, SpeedrunCNN
from cnn_jax.models.kernels import first_kernel


def init(model: nn.Module, shape: tuple[int, int, int]) -> dict:
    """Parameters of the right shapes, without compiling anything."""
    random = np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("model", "shape", "name", "kernel_shape"),
    [
        (LeNet(), (28, 28, 1), "Conv_0", (5, 5, 1, 6)),
        (MLP(), (8, 6, 3), "Dense_0", (8, 6, 3, 128)),
        (SpeedrunCNN(), (32, 32, 3), "whitening", (2, 2, 3, 24)),
    ],
)
def test_the_first_kernel(model: nn.Module, shape: tuple, name: str, kernel_shape: tuple):
    params = init(model, shape)
    found, kernel = first_kernel(model, shape, params)
    assert found == name
    assert kernel.shape == kernel_shape
    np.testing.assert_array_equal(kernel.ravel(), params[name]["kernel"].ravel())


def test_a_dense_kernel_weighs_the_pixel_at_its_place():
    params = init(MLP(), (8, 6, 3))
    _, kernel = first_kernel(MLP(), (8, 6, 3), params)
    image = np.random.default_rng(0).random((8, 6, 3), np.float32)
    expected = image.reshape(-1) @ params["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.einsum("hwc,hwcf->f", image, kernel), expected, rtol=1e-4)


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(10)(image.mean((1, 2)))


def test_a_kernel_that_meets_no_image_is_none():
    assert first_kernel(Pooled(), (8, 8, 3), init(Pooled(), (8, 8, 3))) is None
