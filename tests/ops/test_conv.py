"""The fast convolution against lax's own: values, gradients, transformations, platforms."""

import functools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cnn_jax.ops import conv
from cnn_jax.ops.formulations import FORMULATIONS, applies
from cnn_jax.ops.rule import Formulations, formulations_for
from tests.quick import quick_jit

pytestmark = pytest.mark.oldest

NHWC = ("NHWC", "HWIO", "NHWC")
fast = functools.partial(conv.conv_general_dilated, dimension_numbers=NHWC)
plain = functools.partial(lax.conv_general_dilated, dimension_numbers=NHWC)


def normal(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def passes(convolution, image, kernel, cotangent):
    """The value and both gradients."""
    value, vjp = jax.vjp(convolution, image, kernel)
    return value, *vjp(cotangent)


def assert_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


@st.composite
def problems(draw, largest_image=9, largest_kernel=5):
    """(image shape, kernel shape, strides, padding) with a non-empty output."""
    kernel = draw(st.tuples(*[st.integers(1, largest_kernel)] * 2))
    strides = draw(st.tuples(*[st.integers(1, 3)] * 2))
    pads = st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * 2)
    padding = draw(st.sampled_from(["SAME", "VALID"]) | pads)
    smallest = [1, 1]
    if padding == "VALID":
        smallest = kernel
    elif padding != "SAME":
        smallest = [max(k - sum(pad), 1) for k, pad in zip(kernel, padding, strict=True)]
    size = [draw(st.integers(low, max(low, largest_image))) for low in smallest]
    n, c, o = (draw(st.integers(1, 3)) for _ in range(3))
    return (n, *size, c), (*kernel, c, o), strides, padding


# At least one problem for each branch of `formulations_for`.
BRANCHES = {
    "kernel covers the image": ((4, 3, 4, 3), (3, 4, 3, 5), (1, 1), "VALID"),
    "1x1": ((4, 3, 4, 3), (1, 1, 3, 5), (1, 1), "VALID"),
    "winograd": ((2, 7, 6, 128), (3, 3, 128, 128), (1, 1), "SAME"),
    "winograd forward": ((2, 9, 11, 64), (3, 3, 64, 65), (1, 1), "VALID"),
    "winograd in tiles": ((2, 4, 6, 128), (3, 3, 128, 128), (1, 1), "VALID"),
    "fourier": ((2, 9, 8, 32), (5, 5, 32, 33), (1, 1), "VALID"),
    "fourier, an odd width": ((2, 6, 9, 32), (5, 5, 32, 33), (1, 1), ((1, 0), (0, 2))),
    "one channel": ((4, 8, 7, 1), (3, 2, 1, 5), (1, 1), "SAME"),
    "few channels": ((4, 8, 7, 3), (3, 2, 3, 5), (1, 2), "SAME"),
    "fourier, a kernel higher than the output": ((2, 6, 9, 32), (5, 5, 32, 33), (1, 1), "VALID"),
    "few channels and outputs, strided": ((2, 9, 12, 2), (3, 5, 2, 6), (1, 2), "SAME"),
    "large kernel": ((2, 12, 11, 1), (8, 7, 1, 5), (1, 1), "VALID"),
    "kernel larger than the output": ((4, 4, 4, 5), (3, 3, 5, 3), (1, 1), "VALID"),
    "strided": ((4, 8, 7, 5), (3, 3, 5, 80), (2, 2), "SAME"),
    "others": ((4, 7, 7, 5), (3, 3, 5, 6), (1, 1), "SAME"),
}


def geometry(problem):
    image, kernel, strides, padding = problem
    empty = jax.ShapeDtypeStruct
    return conv.geometry(empty(image, "float32"), empty(kernel, "float32"), strides, padding, None)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(problem=problems())
def test_every_formulation_agrees_with_lax_in_float64(problem):
    image_shape, kernel_shape, strides, padding = problem
    g = geometry(problem)
    with jax.enable_x64(True):
        image, kernel = normal(image_shape, 0, "float64"), normal(kernel_shape, 1, "float64")
        cotangent = normal((image_shape[0], *g.out, kernel_shape[3]), 2, "float64")
        names = [name for name in FORMULATIONS if applies(name, g)]

        @quick_jit
        def every(image, kernel, cotangent):
            # What the rule chooses, and each formulation that can serve this shape.
            found = [passes(lambda x, w: fast(x, w, strides, padding), image, kernel, cotangent)]
            for name in names:
                formulation = functools.partial(FORMULATIONS[name], g)
                found.append(passes(formulation, image, kernel, cotangent))
            expected = passes(lambda x, w: plain(x, w, strides, padding), image, kernel, cotangent)
            return found, expected

        found, expected = every(image, kernel, cotangent)
        for each in found:
            assert_close(each, expected, 1e-12)


def chosen(*problem):
    return formulations_for(geometry(problem))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("problem", BRANCHES.values(), ids=BRANCHES)
def test_each_branch_of_the_rule(problem, dtype, tolerance):
    image_shape, kernel_shape, strides, padding = problem
    g = geometry(problem)
    image, kernel = normal(image_shape, 0, dtype), normal(kernel_shape, 1, dtype)
    cotangent = normal((image_shape[0], *g.out, kernel_shape[3]), 2, dtype)

    @jax.jit
    def both(image, kernel, cotangent):
        return [
            passes(lambda x, w, c=convolution: c(x, w, strides, padding), image, kernel, cotangent)
            for convolution in (fast, plain)
        ]

    found, expected = both(image, kernel, cotangent)
    assert_close(found, expected, tolerance)


def test_the_branches_are_all_reached():
    used = {name for problem in BRANCHES.values() for name in chosen(*problem)}
    assert used == set(FORMULATIONS)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_grad_of_grad_and_vmap(name, monkeypatch):
    """With one formulation for every pass, of an image that is small whatever the rule."""
    kernel_size = (5, 4) if name.startswith("dense") else (3, 3)
    problem = (2, 5, 4, 2), (*kernel_size, 2, 3), (1, 1), "VALID"
    image_shape, kernel_shape, strides, padding = problem
    assert applies(name, geometry(problem))
    monkeypatch.setattr(conv, "formulations_for", lambda g: Formulations(name, name, name))
    jax.clear_caches()
    with jax.enable_x64(True):
        image, kernel = normal(image_shape, 0, "float64"), normal(kernel_shape, 1, "float64")

        def penalty(convolution):
            def loss(image, kernel):
                return jnp.sum(jnp.sin(convolution(image, kernel, strides, padding)))

            def norm(image, kernel):
                gradients = jax.grad(loss, (0, 1))(image, kernel)
                return sum(jnp.sum(jnp.sin(each)) for each in gradients)

            return jax.grad(norm, (0, 1))

        def each_image(convolution):
            """Per-example kernel gradients."""
            return jax.vmap(
                lambda x: jax.grad(
                    lambda w: jnp.sum(jnp.sin(convolution(x[None], w, strides, padding)))
                )(kernel)
            )(image)

        def everything(convolution):
            return penalty(convolution)(image, kernel), each_image(convolution)

        found, expected = jax.jit(lambda: (everything(fast), everything(plain)))()
        assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("use_image_gradient", [True, False])
def test_an_image_gradient_that_nobody_asks_for_is_not_computed(use_image_gradient):
    """The first layer's."""
    image_shape, kernel_shape, strides, padding = BRANCHES["kernel larger than the output"]
    image, kernel = normal(image_shape, 0), normal(kernel_shape, 1)

    def loss(image, kernel):
        return jnp.sum(fast(image, kernel, strides, padding) ** 2)

    wanted = (0, 1) if use_image_gradient else 1
    text = jax.jit(jax.grad(loss, wanted)).lower(image, kernel).compile().as_text()
    products = len(re.findall(r" (?:dot|convolution)\(", text))
    assert products == 2 + use_image_gradient


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("problem", BRANCHES.values(), ids=BRANCHES)
def test_other_platforms_get_xlas_own_convolution(problem, platform):
    image_shape, kernel_shape, strides, padding = problem

    def lowered(convolution):
        def loss(image, kernel):
            return jnp.sum(convolution(image, kernel, strides, padding) ** 2)

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (image_shape, kernel_shape)]
        function = jax.jit(jax.grad(loss, (0, 1)))
        return jax.export.export(function, platforms=(platform,))(*shapes).mlir_module()

    def convolutions(text):
        return sorted(re.findall(r"stablehlo\.convolution.*?(dim_numbers.*?) loc", text))

    text = lowered(fast)
    assert convolutions(text) == convolutions(lowered(plain))
    assert len(convolutions(text)) == 3
    assert "stablehlo.dot_general" not in text


def test_the_cpu_program_has_no_branch_on_the_platform():
    image_shape, kernel_shape, strides, padding = BRANCHES["kernel larger than the output"]

    def loss(image, kernel):
        return jnp.sum(fast(image, kernel, strides, padding) ** 2)

    arrays = normal(image_shape, 0), normal(kernel_shape, 1)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
    assert "conditional" not in text


FALLBACKS = {
    "image dilation": {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
    "kernel dilation": {"rhs_dilation": (1, 2)},
    "groups": {"feature_group_count": 2, "kernel": (3, 3, 2, 4)},
    "batch groups": {"batch_group_count": 2},
    "preferred type": {"preferred_element_type": jnp.float64},
    "negative padding": {"padding": ((-1, 0), (0, 1))},
    "one axis": {
        "image": (2, 8, 4),
        "kernel": (3, 4, 4),
        "strides": (1,),
        "dimension_numbers": ("NWC", "WIO", "NWC"),
    },
    "three axes": {
        "image": (2, 5, 5, 5, 4),
        "kernel": (3, 3, 3, 4, 4),
        "strides": (1, 1, 1),
        "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC"),
    },
    "NCHW": {"image": (2, 4, 8, 8), "dimension_numbers": ("NCHW", "HWIO", "NCHW")},
    "OIHW": {"kernel": (4, 4, 3, 3), "dimension_numbers": ("NHWC", "OIHW", "NHWC")},
    "integers": {"dtype": "int32"},
    "no image": {"image": (0, 8, 8, 4)},
    "no output": {"image": (2, 2, 8, 4)},
}


@pytest.mark.parametrize("case", FALLBACKS.values(), ids=FALLBACKS)
def test_what_it_does_not_cover_goes_to_lax(case, monkeypatch):
    case = {
        "image": (2, 8, 8, 4),
        "kernel": (3, 3, 4, 4),
        "strides": (1, 2),
        "padding": "VALID",
    } | case
    dtype = case.pop("dtype", "float32")
    with jax.enable_x64(True):
        arrays = [
            normal(case.pop(name), seed).astype(dtype)
            for seed, name in enumerate(["image", "kernel"])
        ]
        positional = case.pop("strides"), case.pop("padding")
        case = {"dimension_numbers": NHWC} | case
        monkeypatch.delattr(conv, "_forward")  # the fast path would raise
        found = conv.conv_general_dilated(*arrays, *positional, **case)
        expected = lax.conv_general_dilated(*arrays, *positional, **case)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_mistakes_raise_what_lax_raises():
    image, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 5, 6))
    with pytest.raises(ValueError, match="feature"):
        fast(image, kernel, (1, 1), "SAME")
    with pytest.raises((TypeError, ValueError)):
        fast(image, kernel[:, :, :4], (1, 1, 1), "SAME")
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        fast(image, kernel[:, :, :4], (1, 1), "SOME")


def test_in_a_flax_layer():
    image = normal((2, 9, 9, 3), 0)
    layers = [
        nn.Conv(5, (3, 3), strides=2, conv_general_dilated=convolution)
        for convolution in (conv.conv_general_dilated, None)
    ]
    variables = layers[0].init(jax.random.key(0), image)
    found, expected = (layer.apply(variables, image) for layer in layers)
    assert_close(found, expected, 1e-6)
    # Flax makes these of other numbers of batch axes.
    assert layers[0].apply(variables, image[0]).shape == (5, 5, 5)
    assert layers[0].apply(variables, image[None]).shape == (1, 2, 5, 5, 5)


@pytest.mark.parametrize("problem", BRANCHES.values(), ids=BRANCHES)
def test_the_batch_stays_split_over_two_devices(problem):
    image_shape, kernel_shape, strides, padding = problem
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    image, kernel = normal((4, *image_shape[1:]), 0), normal(kernel_shape, 1)

    def gradients(image, kernel):
        def loss(image, kernel):
            return jnp.sum(jnp.sin(fast(image, kernel, strides, padding)))

        return jax.grad(loss, (0, 1))(image, kernel)

    step = jax.jit(gradients, in_shardings=(split, whole), out_shardings=(split, whole))
    compiled = step.lower(image, kernel).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    found = compiled(jax.device_put(image, split), jax.device_put(kernel, whole))
    # The cotangents follow from the output, whose rounding depends on the batch of a device.
    assert_close(found, jax.jit(gradients)(image, kernel), 3e-5)


@pytest.mark.parametrize("how", ["of the layer", "of its two arguments", "default"])
def test_the_highest_precision_leaves_out_winograd_and_fourier(how):
    precision = {
        "of the layer": lax.Precision.HIGHEST,
        "of its two arguments": (lax.Precision.DEFAULT, lax.Precision.HIGHEST),
        "default": None,
    }[how]
    for name in ("winograd", "winograd in tiles", "fourier"):
        image, kernel, strides, padding = BRANCHES[name]
        arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in (image, kernel)]
        with jax.default_matmul_precision("highest" if how == "default" else None):
            g = conv.geometry(*arrays, strides, padding, precision)
        rounding = {"winograd", "winograd_tiles", "fourier", "fourier_patches"}
        assert set(chosen(*BRANCHES[name])) & rounding
        assert not set(formulations_for(g)) & rounding
