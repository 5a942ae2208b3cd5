"""Sums over channels and what uses them, against float64 and flax: values, gradients, platforms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.layers import BatchNorm, Conv
from cnn_jax.ops import channels

pytestmark = pytest.mark.oldest


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 2, 7), (32, 24, 24, 16), (0, 3, 3, 2)])
def test_value_and_gradients_are_those_of_float64(shape):
    y, b, cotangent = normal(shape), normal(shape[-1:], 1), normal(shape, 2) + 1
    value, vjp = jax.vjp(channels.add, y, b)
    y_gradient, b_gradient = vjp(jnp.asarray(cotangent))
    np.testing.assert_array_equal(value, y + b)
    np.testing.assert_array_equal(y_gradient, cotangent)
    np.testing.assert_allclose(b_gradient, cotangent.astype(np.float64).sum((0, 1, 2)), rtol=3e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 2, 7), (32, 24, 24, 16), (0, 3, 3, 2)])
def test_sums_and_their_gradient(shape):
    x, cotangent = normal(shape) + 1, normal(shape[-1:], 1)
    value, vjp = jax.vjp(channels.sums, x)
    np.testing.assert_allclose(value, x.astype(np.float64).sum((0, 1, 2)), rtol=3e-6)
    np.testing.assert_array_equal(*vjp(jnp.asarray(cotangent)), np.broadcast_to(cotangent, shape))


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (16, 3)])
@pytest.mark.parametrize("options", [{}, {"use_scale": False}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_is_flaxs(shape, options, dtype):
    x = jnp.asarray(3 * normal(shape) + 1, dtype)
    fields = {"momentum": 0.7, "epsilon": 1e-3, **options}
    ours, flaxs = BatchNorm(**fields), nn.BatchNorm(**fields)
    variables = jax.tree.map(lambda v: v + 0.5, flaxs.init(jax.random.key(0), x, True))
    variables["params"] = jax.tree.map(lambda v: v.astype(dtype), variables["params"])
    assert jax.tree.structure(ours.init(jax.random.key(0), x, True)) == jax.tree.structure(
        variables
    )

    def results(layer):
        def loss(params, x):
            y, changed = layer.apply(
                {**variables, "params": params}, x, False, mutable="batch_stats"
            )
            return jnp.sum(jnp.sin(y).astype(jnp.float32)), (y, changed)

        trained = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return trained, layer.apply(variables, x, use_running_average=True)

    tolerance = 2e-2 if dtype == jnp.bfloat16 else 3e-5
    found, expected = jax.tree.leaves(results(ours)), jax.tree.leaves(results(flaxs))
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        atol = tolerance * max(1.0, float(abs(b).max()))
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=tolerance, atol=atol)


def test_batch_norm_averages_over_devices():
    x = normal((4, 3, 5, 5, 2))
    layer = BatchNorm(use_running_average=False, axis_name="batch")
    variables = layer.init(jax.random.key(0), x[0])
    y, changed = jax.pmap(
        lambda x: layer.apply(variables, x, mutable="batch_stats"), axis_name="batch"
    )(x)
    whole = x.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(y, (x - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-5), atol=3e-5)
    mean = changed["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, np.tile(0.01 * whole.mean(0), (4, 1)), atol=1e-6)


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
        jax.tree.leaves(results(channels.add)), jax.tree.leaves(results(jnp.add)), strict=True
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

    assert ("dot_general" in program(channels.add)) == (platform == "cpu")
    assert "dot_general" not in program(jnp.add)
