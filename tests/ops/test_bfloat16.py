"""The passes in bfloat16 against lax's convolution in float64, and where they are used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_jax.common import cpu
from cnn_jax.ops import bfloat16, channels, conv
from cnn_jax.train import parallel

NHWC = ("NHWC", "HWIO", "NHWC")
plain = functools.partial(lax.conv_general_dilated, dimension_numbers=NHWC)
fast = functools.partial(conv.conv_general_dilated, dimension_numbers=NHWC)
needs_bfloat16 = pytest.mark.skipif(
    not cpu.multiplies_bfloat16(), reason="needs AVX512_BF16 or AMX, and jaxlib 0.12"
)

# Image, kernel, strides, padding: at least one for each branch of the three passes.
PROBLEMS = {
    "one channel": ((4, 9, 8, 1), (3, 3, 1, 32), (1, 1), "VALID"),
    "few outputs": ((4, 9, 8, 3), (5, 5, 3, 6), (1, 1), "SAME"),
    "same": ((4, 8, 7, 16), (3, 3, 16, 32), (1, 1), "SAME"),
    "uneven padding": ((4, 8, 9, 16), (4, 3, 16, 32), (1, 1), ((3, 1), (0, 2))),
    "kernel larger than the output": ((4, 4, 4, 32), (3, 3, 32, 33), (1, 1), "VALID"),
    "strided": ((4, 9, 10, 16), (3, 3, 16, 32), (2, 2), "SAME"),
    "strided, uneven": ((4, 11, 10, 16), (3, 5, 16, 32), (3, 2), "VALID"),
    "strides larger than the kernel": ((4, 11, 10, 16), (1, 2, 16, 32), (3, 3), "VALID"),
    "strided, many channels": ((4, 9, 10, 128), (3, 3, 128, 32), (2, 2), "SAME"),
    "strided, very many channels": ((2, 9, 10, 512), (3, 3, 512, 32), (2, 2), "SAME"),
    "kernel covers the image": ((4, 5, 4, 32), (5, 4, 32, 33), (1, 1), "VALID"),
    "1x1": ((4, 5, 4, 32), (1, 1, 32, 33), (1, 1), "VALID"),
}


def arrays(problem, dtype, times=1):
    """Image, kernel, cotangent, with that many times the images; numbers that bfloat16 can hold."""
    image, kernel, strides, padding = problem
    image = (times * image[0], *image[1:])
    output = jax.eval_shape(
        lambda x, w: plain(x, w, strides, padding), jnp.zeros(image), jnp.zeros(kernel)
    )
    random = np.random.default_rng(0)
    return [
        jnp.asarray(random.normal(size=shape), "bfloat16").astype(dtype)
        for shape in (image, kernel, output.shape)
    ]


def three(convolution, problem, image, kernel, cotangent):
    value, vjp = jax.vjp(lambda x, w: convolution(x, w, *problem[2:]), image, kernel)
    return value, *vjp(cotangent)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_passes_are_those_of_lax(problem):
    with jax.enable_x64(True):
        image, kernel, cotangent = arrays(problem, "float64")
        g = conv.geometry(image, kernel, *problem[2:], None)

        @jax.jit
        def found():
            return (
                bfloat16.forward(g, image, kernel),
                bfloat16.image_gradient(g, cotangent, kernel),
                bfloat16.kernel_gradient(g, cotangent, image),
            )

        expected = jax.jit(lambda: three(plain, problem, image, kernel, cotangent))()
        for a, b in zip(found(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


@needs_bfloat16
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_products_are_added_in_float32_and_rounded_once(problem):
    """A number of bfloat16 has 8 bits, so that rounding moves it by up to 2**-9 of itself.

    Sums in bfloat16 would be wrong by 2**-9 of each partial sum. The image's gradient may add products
    over channels that are rounded already, so its bound is relative to the sum of magnitudes.
    """
    numbers = arrays(problem, "bfloat16", 32)  # XLA leaves small matmuls to its own loops
    step = parallel.jit(lambda *numbers: three(fast, problem, *numbers), "bfloat16")
    compiled = step.lower(*numbers).compile()
    found = compiled(*numbers)
    with jax.enable_x64(True):
        exact = arrays(problem, "float64", 32)
        expected = map(np.asarray, three(plain, problem, *exact))
        sums = map(np.asarray, three(plain, problem, *map(jnp.abs, exact)))
    for a, b, magnitude, share in zip(found, expected, sums, (1e-6, 2**-9, 1e-6), strict=True):
        assert a.dtype == jnp.bfloat16
        bound = 2**-8 * np.abs(b) + share * magnitude
        assert (np.abs(np.asarray(a, np.float64) - b) <= bound).all()


@needs_bfloat16
def test_onednn_computes_all_three_passes_in_bfloat16_and_none_in_float32():
    problem = PROBLEMS["same"]

    def calls(dtype):
        numbers = arrays(problem, dtype, 32)
        step = parallel.jit(lambda *numbers: three(fast, problem, *numbers), dtype)
        text = step.lower(*numbers).compile().as_text()
        return text.count('"__onednn$convolution"'), text.count('"__onednn$matmul"')

    assert calls("bfloat16") == (2, 3)  # the kernel's gradient is a matmul for each of its rows
    assert calls("float32") == (0, 0)


@needs_bfloat16
def test_a_bias_gradient_in_bfloat16_is_added_in_float32():
    y, b = jnp.zeros((128, 12, 12, 8), "bfloat16"), jnp.zeros(8, "bfloat16")
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=y.shape), "bfloat16")
    step = parallel.jit(lambda ct: jax.vjp(lambda b: channels.add(y, b), b)[1](ct)[0], "bfloat16")
    exact = np.asarray(cotangent, np.float64)
    bound = 2**-8 * np.abs(exact.sum((0, 1, 2))) + 1e-4  # rounded once
    error = np.abs(np.asarray(step(cotangent), np.float64) - exact.sum((0, 1, 2)))
    assert (error <= bound).all()


@pytest.mark.parametrize(
    ("version", "features", "expected"),
    [
        ("0.12.0.1", {"avx512f", "avx512_bf16"}, True),
        ("0.12.0.1", {"avx512f", "amx_bf16"}, True),
        ("0.12.0.1", {"avx2", "avx512f"}, False),
        ("0.12.0.1", set(), False),
        ("0.11.2", {"amx_bf16"}, False),
        ("1.0.0", {"amx_bf16"}, True),
    ],
)
def test_where_they_are_used(monkeypatch, version, features, expected):
    """In programs of `parallel.jit` in bfloat16 alone: others are not compiled with oneDNN."""
    monkeypatch.setattr(cpu, "features", lambda: features)
    monkeypatch.setattr(cpu.jaxlib, "__version__", version)
    seen = []

    def look(x):
        seen.append(bfloat16.used())
        return x

    image = jax.ShapeDtypeStruct((1,), "float32")
    # JAX keeps the trace of a function that it has seen.
    parallel.jit(lambda x: look(x), "bfloat16").trace(image)
    parallel.jit(lambda x: look(x), "float32").trace(image)
    jax.jit(lambda x: look(x)).trace(image)
    assert seen == [expected, False, False]
