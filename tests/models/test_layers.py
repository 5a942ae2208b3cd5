"""The lecture's worked examples as numbers, computed here by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.layers import Conv, Dense, Dropout, Flatten, MaxPool
from tests.quick import quick_jit

V = np.arange(1.0, 10.0, dtype=np.float32)  # v1 .. v9, row by row
GRID = np.arange(1.0, 17.0, dtype=np.float32).reshape(1, 4, 4, 1)  # v1 .. v16


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def params_of(layer, shape):
    variables = jax.eval_shape(
        layer.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32")
    )
    return variables["params"]


def output_shape(layer, shape):
    image = jax.ShapeDtypeStruct(shape, "float32")
    return jax.eval_shape(layer.init_with_output, jax.random.key(0), image)[0].shape


def apply(layer, kernel, bias, image):
    params = {"kernel": np.asarray(kernel, np.float32), "bias": np.asarray(bias, np.float32)}
    return np.asarray(layer.apply({"params": params}, image))


def test_a_2x2_kernel_on_3x3_data():
    v1, v2, v3, v4, v5, v6, v7, v8, v9 = V
    w1, w2, w3, w4, b = 0.5, -1.0, 2.0, 0.25, 3.0
    kernel = np.array([w1, w2, w3, w4]).reshape(2, 2, 1, 1)
    output = apply(Conv(1, (2, 2)), kernel, [b], V.reshape(1, 3, 3, 1))
    m1 = v1 * w1 + v2 * w2 + v4 * w3 + v5 * w4 + b
    m2 = v2 * w1 + v3 * w2 + v5 * w3 + v6 * w4 + b
    m3 = v4 * w1 + v5 * w2 + v7 * w3 + v8 * w4 + b
    m4 = v5 * w1 + v6 * w2 + v8 * w3 + v9 * w4 + b
    assert m1 == 10.75
    np.testing.assert_array_equal(output, np.array([m1, m2, m3, m4]).reshape(1, 2, 2, 1))


def test_a_kernel_of_2x2_has_5_parameters_and_two_have_10():
    one, two = (params_of(Conv(n, (2, 2)), (1, 3, 3, 1)) for n in (1, 2))
    assert (one["kernel"].shape, one["bias"].shape, count(one)) == ((2, 2, 1, 1), (1,), 5)
    assert (two["kernel"].shape, two["bias"].shape, count(two)) == ((2, 2, 1, 2), (2,), 10)
    assert output_shape(Conv(2, (2, 2)), (1, 3, 3, 1)) == (1, 2, 2, 2)


def test_two_kernels_give_two_channels():
    first, second = [1.0, 0, 0, 0], [0, 0, 0, 1.0]
    kernel = np.stack([first, second], -1).reshape(2, 2, 1, 2)
    output = apply(Conv(2, (2, 2)), kernel, [0, 100], V.reshape(1, 3, 3, 1))
    np.testing.assert_array_equal(output[0, :, :, 0], [[1, 2], [4, 5]])
    np.testing.assert_array_equal(output[0, :, :, 1], [[105, 106], [108, 109]])


def test_the_kernels_channels_are_the_datas():
    assert params_of(Conv(4, (2, 2)), (1, 3, 3, 3))["kernel"].shape == (2, 2, 3, 4)
    # ... and are summed over
    image = np.stack([V, 10 * V, 100 * V], -1).reshape(1, 3, 3, 3)
    output = apply(Conv(1, (1, 1)), np.ones((1, 1, 3, 1)), [0], image)
    np.testing.assert_array_equal(output.reshape(-1), 111 * V)


def test_a_2x2_kernel_on_4x4_data_with_stride_1_and_2():
    kernel = np.ones((2, 2, 1, 1))
    stride_1 = apply(Conv(1, (2, 2)), kernel, [0], GRID)
    stride_2 = apply(Conv(1, (2, 2), strides=2), kernel, [0], GRID)
    # v1 + v2 + v5 + v6 = 14; a step to the right adds 4, a step down 16
    np.testing.assert_array_equal(stride_1[0, :, :, 0], [[14, 18, 22], [30, 34, 38], [46, 50, 54]])
    np.testing.assert_array_equal(stride_2[0, :, :, 0], [[14, 22], [46, 54]])


def test_padding_1_keeps_the_resolution():
    kernel = np.ones((3, 3, 1, 1))
    without = apply(Conv(1, (3, 3)), kernel, [0], GRID)[0, :, :, 0]
    with_1 = apply(Conv(1, (3, 3), padding=1), kernel, [0], GRID)[0, :, :, 0]
    same = apply(Conv(1, (3, 3), padding="SAME"), kernel, [0], GRID)[0, :, :, 0]
    np.testing.assert_array_equal(without, [[54, 63], [90, 99]])
    expected = [[14, 24, 30, 22], [33, 54, 63, 45], [57, 90, 99, 69], [46, 72, 78, 54]]
    np.testing.assert_array_equal(with_1, expected)
    np.testing.assert_array_equal(same, expected)


def test_same_padding_with_stride_2_pads_after_at_even_sizes():
    kernel = np.ones((3, 3, 1, 1))
    layer = Conv(1, (3, 3), strides=2, padding="SAME")
    # 4x4: (0, 1), so the first window is v1 .. v11 and the last v11 .. v16 with a border of zeros
    output = apply(layer, kernel, [0], GRID)[0, :, :, 0]
    np.testing.assert_array_equal(output, [[54, 45], [72, 54]])
    # 3x3: (1, 1), so the first window is a border of zeros with v1, v2, v4, v5
    output = apply(layer, kernel, [0], V.reshape(1, 3, 3, 1))[0, :, :, 0]
    np.testing.assert_array_equal(output, [[12, 16], [24, 28]])


def test_max_pooling_keeps_the_strongest_feature():
    grid = np.array([[[5, -1, 7, 8], [6, 2, 0, 3], [-4, -3, 1, 1], [-2, -9, 1, 1]]], np.float32)[
        ..., None
    ]
    v1, v2, v5, v6 = 5, -1, 6, 2
    pooled = np.asarray(MaxPool((2, 2)).apply({}, grid))[0, :, :, 0]
    assert pooled[0, 0] == max(v1, v2, v5, v6)
    np.testing.assert_array_equal(pooled, [[6, 8], [-2, 1]])


def test_max_pooling_halves_and_drops_what_is_left_over():
    assert output_shape(MaxPool((2, 2)), (1, 220, 220, 3)) == (1, 110, 110, 3)
    assert output_shape(MaxPool((2, 2)), (1, 110, 110, 3)) == (1, 55, 55, 3)
    assert output_shape(MaxPool((2, 2)), (1, 55, 55, 3)) == (1, 27, 27, 3)
    pooled = np.asarray(MaxPool((2, 2)).apply({}, V.reshape(1, 3, 3, 1)))
    np.testing.assert_array_equal(pooled.reshape(-1), [5])


def test_a_dense_layer_is_a_1x1_convolution():
    assert count(params_of(Dense(3), (1, 6))) == 21
    assert count(params_of(Conv(3, (1, 1)), (1, 1, 1, 6))) == 21
    random = np.random.default_rng(0)
    kernel, bias, x = random.normal(size=(6, 3)), random.normal(size=3), random.normal(size=6)
    x = x.astype(np.float32)
    dense = apply(Dense(3), kernel, bias, x.reshape(1, 6))
    convolution = apply(Conv(3, (1, 1)), kernel.reshape(1, 1, 6, 3), bias, x.reshape(1, 1, 1, 6))
    by_hand = x.astype(np.float64) @ kernel + bias
    np.testing.assert_allclose(dense.reshape(-1), by_hand, rtol=1e-5)
    np.testing.assert_allclose(convolution.reshape(-1), by_hand, rtol=1e-5)
    np.testing.assert_allclose(
        nn.softmax(jnp.asarray(convolution)).reshape(-1),
        np.exp(by_hand) / np.exp(by_hand).sum(),
        rtol=1e-5,
    )


def test_a_dense_layer_over_a_flattened_map_is_a_convolution_over_all_of_it():
    random = np.random.default_rng(0)
    image = random.normal(size=(2, 3, 4, 5)).astype(np.float32)
    kernel, bias = random.normal(size=(60, 7)), random.normal(size=7)
    flat = np.asarray(Flatten().apply({}, image))
    np.testing.assert_array_equal(flat, image.reshape(2, 60))
    dense = apply(Dense(7), kernel, bias, flat)
    convolution = apply(Conv(7, (3, 4)), kernel.reshape(3, 4, 5, 7), bias, image)
    assert convolution.shape == (2, 1, 1, 7)
    np.testing.assert_allclose(dense, convolution[:, 0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "fans"),
    [
        (Conv(24, (5, 3)), (1, 8, 8, 16), 5 * 3 * (16 + 24)),
        (Dense(100), (1, 50), 50 + 100),
    ],
)
def test_kernels_are_drawn_from_keras_glorot_uniform(layer, shape, fans):
    params = quick_jit(layer.init)(jax.random.key(1), jnp.zeros(shape))["params"]
    limit = np.sqrt(6 / fans)
    kernel = np.asarray(params["kernel"], np.float64)
    assert kernel.dtype == np.float64
    assert params["kernel"].dtype == jnp.float32
    assert 0.99 * limit < np.abs(kernel).max() <= limit
    assert np.isclose(kernel.var(), limit**2 / 3, rtol=0.05)
    assert abs(kernel.mean()) < 0.05 * limit
    np.testing.assert_array_equal(params["bias"], 0)


# ------------------------------------------------------------------------------------ dropout


def drop(rate, x, train, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    return np.asarray(quick_jit(lambda x: Dropout(rate).apply({}, x, train, rngs=rngs))(x))


def test_dropout_drops_a_share_and_scales_the_rest():
    x = np.ones((50, 400), np.float32)
    output = drop(0.25, x, train=True)
    assert set(np.unique(output)) == {0.0, np.float32(1 / 0.75)}
    assert abs((output == 0).mean() - 0.25) < 0.02
    assert len({row.tobytes() for row in output}) == 50  # every example has its own mask
    assert (drop(0.25, x, train=True, seed=1) != output).any()


def test_dropout_does_nothing_in_evaluation_or_at_rate_0():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_array_equal(Dropout(0.9).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.9).apply({}, x, False), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)


def test_an_examples_mask_does_not_depend_on_the_others():
    x = np.ones((8, 30), np.float32)
    np.testing.assert_array_equal(drop(0.5, x, True)[:3], drop(0.5, x[:3], True))
