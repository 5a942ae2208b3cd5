"""The addition of a bias against flax's own: values, gradients, transformations, platforms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.layers import Conv
from cnn_jax.ops import bias

pytestmark = pytest.mark.oldest


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 2, 7), (32, 24, 24, 16), (0, 3, 3, 2)])
def test_value_and_gradients_are_those_of_float64(shape):
    y, b, cotangent = normal(shape), normal(shape[-1:], 1), normal(shape, 2) + 1
    value, vjp = jax.vjp(bias.add, y, b)
    y_gradient, b_gradient = vjp(jnp.asarray(cotangent))
    np.testing.assert_array_equal(value, y + b)
    np.testing.assert_array_equal(y_gradient, cotangent)
    np.testing.assert_allclose(b_gradient, cotangent.astype(np.float64).sum((0, 1, 2)), rtol=3e-6)


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 6, 5, 3), (3, 2), {}),
        ((6, 5, 3), (3, 2), {}),  # one image
        ((2, 3, 6, 5, 3), (3, 2), {}),  # two axes of images
        ((2, 6, 3), (3,), {}),
        ((2, 6, 5, 3), (3, 2), {"dtype": jnp.bfloat16}),
        ((2, 6, 5, 3), (3, 2), {"param_dtype": jnp.float16}),
        ((2, 6, 5, 3), (3, 2), {"use_bias": False}),
    ],
)
def test_a_layer_is_flaxs(shape, kernel, options):
    x = jnp.asarray(normal(shape))
    ours, flaxs = Conv(4, kernel, **options), nn.Conv(4, kernel, padding="VALID", **options)
    params = ours.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + jnp.asarray(0.5, p.dtype), params)  # a bias begins as 0

    def value_and_gradient(layer):
        def loss(params):
            return jnp.sum(jnp.sin(layer.apply(params, x)).astype(jnp.float32))

        return layer.apply(params, x), jax.grad(loss)(params)

    found, expected = value_and_gradient(ours), value_and_gradient(flaxs)
    tolerance = {jnp.bfloat16: 2e-2}.get(options.get("dtype"), 1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(
            np.float64(a), np.float64(b), rtol=tolerance, atol=tolerance * float(abs(b).max())
        )


def test_transformations():
    y, b = jnp.asarray(normal((2, 3, 4, 4, 2))), jnp.asarray(normal((2, 2), 1))

    def results(add):
        def loss(y, b):
            return jnp.sum(jnp.sin(add(y, b)))

        return (
            jax.vmap(jax.grad(loss, 1))(y, b),
            jax.vmap(jax.grad(loss, 1), (0, None))(y, b[0]),
            jax.hessian(loss, 1)(y[0], b[0]),
            jax.jvp(add, (y[0], b[0]), (y[1], b[1])),
        )

    for a, b in zip(
        jax.tree.leaves(results(bias.add)), jax.tree.leaves(results(jnp.add)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_other_platforms_get_xlas_own_sum(platform):
    shapes = (
        jax.ShapeDtypeStruct((2, 3, 3, 4), jnp.float32),
        jax.ShapeDtypeStruct((4,), jnp.float32),
    )

    def program(add):
        gradient = jax.jit(jax.grad(lambda y, b: jnp.sum(jnp.sin(add(y, b))), 1))
        return jax.export.export(gradient, platforms=(platform,))(*shapes).mlir_module()

    assert ("dot_general" in program(bias.add)) == (platform == "cpu")
    assert "dot_general" not in program(jnp.add)
