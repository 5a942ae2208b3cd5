"""Max pooling against flax's and lax's own, values and gradients, ties included."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.ops.pool import max_pool

pytestmark = pytest.mark.oldest


def plain(x, window, strides=None, padding="VALID"):
    return nn.max_pool(x, tuple(window), tuple(strides or window), padding)


def image(shape, levels=3, dtype="float32"):
    """Few different values: most windows have ties, as after a ReLU."""
    values = np.random.default_rng(sum(shape)).integers(0, levels, shape)
    return jnp.asarray(values, dtype)


def gradient(pool, x, cotangent):
    return jax.vjp(pool, x)[1](cotangent)[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(*[st.integers(4, 11)] * 2),
    window=st.tuples(*[st.integers(1, 4)] * 2),
    strides=st.none() | st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.sampled_from(["VALID", "SAME"]),
    channels=st.sampled_from([3, 16]),
    levels=st.sampled_from([1, 3, 1000]),
)
def test_values_and_gradients_are_those_of_lax(size, window, strides, padding, channels, levels):
    x = image((2, *size, channels), levels)
    y = max_pool(x, window, strides, padding)
    np.testing.assert_array_equal(y, plain(x, window, strides, padding))
    # Whole numbers, so that overlapping windows add up exactly.
    cotangent = image(y.shape, 50)
    np.testing.assert_array_equal(
        gradient(lambda x: max_pool(x, window, strides, padding), x, cotangent),
        gradient(lambda x: plain(x, window, strides, padding), x, cotangent),
    )


def test_the_lecture_example():
    grid = jnp.arange(1.0, 17).reshape(1, 4, 4, 1)  # v1 .. v16
    np.testing.assert_array_equal(max_pool(grid, (2, 2))[0, :, :, 0], [[6, 8], [14, 16]])


def test_the_ragged_border_is_dropped():
    x = image((2, 15, 13, 16))
    assert max_pool(x, (2, 2)).shape == (2, 7, 6, 16)
    cotangent = jnp.ones((2, 7, 6, 16))
    border = gradient(lambda x: max_pool(x, (2, 2)), x, cotangent)
    assert not border[:, 14].any()
    assert not border[:, :, 12].any()
    assert border.sum() == cotangent.size


def test_the_first_of_equal_values_gets_the_whole_gradient():
    window = gradient(
        lambda x: max_pool(x, (2, 2)), jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 1, 1, 1))
    )
    np.testing.assert_array_equal(window[0, :, :, 0], [[1, 0], [0, 0]])


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_nan_is_not_lost(place, channels):
    x = jnp.zeros((1, 2, 2, channels)).at[0, *place].set(jnp.nan)
    assert jnp.isnan(max_pool(x, (2, 2))).all()


def test_infinities():
    x = jnp.asarray([-jnp.inf, -jnp.inf, -jnp.inf, -1.0]).reshape(1, 2, 2, 1)
    assert max_pool(x, (2, 2)).item() == -1
    assert max_pool(x[:, :, :1], (2, 1)).item() == -jnp.inf


@pytest.mark.parametrize("channels", [2, 16])
def test_transformations(channels):
    x = image((3, 2, 6, 6, channels), 1000)
    expected = jnp.stack([plain(each, (2, 2)) for each in x])
    np.testing.assert_array_equal(jax.vmap(lambda x: max_pool(x, (2, 2)))(x), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: max_pool(x, (2, 2)))(x[0]), expected[0])

    def penalty(pool):
        inner = jax.grad(lambda x: jnp.sum(pool(x) ** 3))
        return jax.grad(lambda x: jnp.sum(inner(x) ** 2))(x[0])

    np.testing.assert_allclose(
        penalty(lambda x: max_pool(x, (2, 2))), penalty(lambda x: plain(x, (2, 2))), rtol=1e-6
    )
    for actual, expected in zip(
        jax.jvp(lambda x: max_pool(x, (2, 2)), (x[0],), (x[1],)),
        jax.jvp(lambda x: plain(x, (2, 2)), (x[0],), (x[1],)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int32"])
def test_dtypes(dtype, channels):
    with jax.enable_x64(True):
        x = image((2, 6, 6, channels), 100, dtype)
        y = max_pool(x, (2, 2))
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, plain(x, (2, 2)))


@pytest.mark.parametrize("shape", [(6, 6, 2), (2, 3, 6, 6, 2), (2, 1, 6, 2)])
def test_what_it_does_not_cover_goes_to_flax(shape):
    """No batch axis, two of them, an image smaller than the window."""
    x = image(shape)
    np.testing.assert_array_equal(max_pool(x, (2, 2)), plain(x, (2, 2)))


@pytest.mark.parametrize(("platform", "xlas"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_a_tpu_gets_xlas_own_pooling(platform, xlas):
    def loss(x):
        return jnp.sum(max_pool(x, (2, 2)) ** 2)

    x = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=(platform,))(x).mlir_module()
    assert ("reduce_window" in text) is xlas
    assert ("scatter" in text) is xlas


def test_the_batch_stays_split_over_two_devices():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = image((4, 7, 6, 3), 1000)

    def loss(x):
        return jnp.sum(max_pool(x, (2, 2)) ** 2)

    compiled = jax.jit(jax.grad(loss), in_shardings=split, out_shardings=split).lower(x).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(jax.device_put(x, split)), jax.grad(loss)(x))
