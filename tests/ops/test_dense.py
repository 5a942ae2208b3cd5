"""The dense layer's matmul against a plain one in float64: values, gradients, transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.layers import Dense
from cnn_jax.ops import dense

pytestmark = pytest.mark.oldest

LARGE = (2048, 128)  # 2**18 weights: the fewest that are covered
NUMBERS = (((1,), (0,)), ((), ()))


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product(x, kernel):
    return dense.dot_general(x, kernel, NUMBERS)


@pytest.mark.parametrize("examples", [1, 3])
def test_value_and_both_gradients_are_those_of_float64(examples):
    x, kernel = normal((examples, LARGE[0]), 0), normal(LARGE, 1)
    cotangent = normal((examples, LARGE[1]), 2)
    value, vjp = jax.vjp(product, x, kernel)
    found = value, *vjp(cotangent)
    x, kernel, cotangent = (each.astype(np.float64) for each in (x, kernel, cotangent))
    expected = x @ kernel, cotangent @ kernel.T, x.T @ cotangent
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_grad_of_grad_and_vmap():
    x, kernel = jnp.asarray(normal((3, LARGE[0]), 0)), jnp.asarray(normal(LARGE, 1)) / 50

    def second(product):
        def norm(x, kernel):
            gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(product(*a))), (0, 1))(x, kernel)
            return sum(jnp.sum(jnp.cos(each)) for each in gradients)

        return jax.jit(jax.grad(norm, (0, 1)))(x, kernel)

    def each_alone(product):
        gradient = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x[None], kernel))), (0, 1))
        return jax.vmap(gradient, (0, None))(x, kernel)

    for transformed in (second, each_alone):
        expected = transformed(jnp.matmul)
        for a, b in zip(transformed(product), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("shape", "large"), [(LARGE, True), ((2047, 128), False)])
def test_a_large_kernel_alone_has_the_batch_in_columns(shape, large):
    layer = Dense(shape[1])
    x = jnp.zeros((2, shape[0]))
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: layer.apply(params, x).sum())
    assert ("optimization_barrier" in str(jax.make_jaxpr(gradient)(x))) == large


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_and_more_axes_go_to_lax(dtype):
    x, kernel = jnp.asarray(normal((2, 3, LARGE[0]), 0)), jnp.asarray(normal(LARGE, 1))
    for layer_dtype in (dtype, None):
        params = {"params": {"kernel": kernel}}
        layers = (each(LARGE[1], use_bias=False, dtype=layer_dtype) for each in (Dense, nn.Dense))
        found, expected = (layer.apply(params, x) for layer in layers)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
