"""2-D convolution in the formulation that is fastest on CPU for the shape at hand.

`conv_general_dilated` takes the place of `jax.lax.conv_general_dilated` in `flax.linen.nn.Conv` (its
field of that name). A convolution is bilinear in the image and the kernel, so one function of both,
differentiated by transposition, gives the forward pass and both gradients. `formulations.py` holds
several such functions; `rule.py` chooses one for each of the three passes on CPU. On GPU and TPU all
three are XLA's own convolution.

Forward-mode differentiation (`jax.jvp`) does not work for the covered shapes, as the three passes are
`jax.custom_vjp` functions. The gradients of each are the other two: reverse mode works to any order.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from cnn_jax.common.pairs import pair
from cnn_jax.ops import bfloat16
from cnn_jax.ops.formulations import DIMENSIONS, FORMULATIONS, Geometry, xla
from cnn_jax.ops.rule import formulations_for

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def compute(name: str, convolution: Callable, g: Geometry, a: Array, b: Array) -> Array:
    """One of the three passes, by the formulation `convolution` of an image and a kernel.

    Args:
      name: forward, image_gradient or kernel_gradient.
      convolution: of [N, H, W, C] and [KH, KW, C, O]; gives [N, OH, OW, O].
      g: the geometry of the convolution.
      a: the image in the forward pass, in the two others the cotangent [N, OH, OW, O].
      b: the kernel; in kernel_gradient the image.
    """
    if name == "forward":
        return convolution(a, b)
    if name == "image_gradient":
        shape = (a.shape[0], *g.image, g.in_channels)
        return _transpose(lambda image: convolution(image, b), shape, a)
    shape = (*g.kernel, g.in_channels, g.out_channels)
    return _transpose(lambda kernel: convolution(b, kernel), shape, a)


def _transpose(linear: Callable, shape: tuple[int, ...], cotangent: Array) -> Array:
    argument = jax.ShapeDtypeStruct(shape, cotangent.dtype)
    return jax.linear_transpose(linear, argument)(cotangent)[0]


def _run(name: str, g: Geometry, a: Array, b: Array) -> Array:
    """The pass `name` as `compute` gives it, on CPU in the formulation that the rule chooses."""
    formulation = getattr(formulations_for(g), name)
    wide = jnp.promote_types(a.dtype, jnp.float32)

    def fast(a: Array, b: Array) -> Array:
        # At least float32 for sums of many terms, as XLA's convolution does itself.
        convolution = functools.partial(FORMULATIONS[formulation], g)
        return compute(name, convolution, g, a.astype(wide), b.astype(wide)).astype(a.dtype)

    plain = functools.partial(compute, name, functools.partial(xla, g), g)
    if a.dtype == jnp.bfloat16 and bfloat16.used():
        narrow = functools.partial(getattr(bfloat16, name), g)
        return lax.platform_dependent(a, b, cpu=narrow, default=plain)
    if formulation == "xla":
        return plain(a, b)
    return lax.platform_dependent(a, b, cpu=fast, default=plain)


# The three passes. Each is linear in both arguments, and the gradients of each are the other two.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(g: Geometry, image: Array, kernel: Array) -> Array:
    """[N, H, W, C], [KH, KW, C, O] -> [N, OH, OW, O]."""
    return _run("forward", g, image, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """[N, OH, OW, O], [KH, KW, C, O] -> [N, H, W, C]."""
    return _run("image_gradient", g, cotangent, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(g: Geometry, cotangent: Array, image: Array) -> Array:
    """[N, OH, OW, O], [N, H, W, C] -> [KH, KW, C, O]."""
    return _run("kernel_gradient", g, cotangent, image)


def _with_residuals(function: Callable) -> Callable:
    return lambda g, a, b: (function(g, a, b), (a, b))


_forward.defvjp(
    _with_residuals(_forward),
    lambda g, saved, ct: (_image_gradient(g, ct, saved[1]), _kernel_gradient(g, ct, saved[0])),
)
_image_gradient.defvjp(
    _with_residuals(_image_gradient),
    lambda g, saved, ct: (_forward(g, ct, saved[1]), _kernel_gradient(g, saved[0], ct)),
)
_kernel_gradient.defvjp(
    _with_residuals(_kernel_gradient),
    lambda g, saved, ct: (_forward(g, saved[1], ct), _image_gradient(g, saved[0], ct)),
)


def geometry(
    lhs: Array | jax.ShapeDtypeStruct,
    rhs: Array | jax.ShapeDtypeStruct,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    precision: lax.PrecisionLike = None,
) -> Geometry:
    """What is static about a convolution; the arguments are those of `conv_general_dilated`."""
    precision = precision or jax.config.jax_default_matmul_precision
    image, kernel = pair(lhs.shape[1:3]), pair(rhs.shape[:2])
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, kernel, window_strides, padding)
    pads = pair((int(lo), int(hi)) for lo, hi in padding)
    out = pair(
        (size + sum(pad) - k) // s + 1
        for size, k, s, pad in zip(image, kernel, window_strides, pads, strict=True)
    )
    strides = pair(map(int, window_strides))
    return Geometry(image, kernel, out, strides, pads, rhs.shape[2], rhs.shape[3], precision)


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Array:
    """`jax.lax.conv_general_dilated`, faster on CPU for 2-D NHWC convolutions.

    Args and result are those of `jax.lax.conv_general_dilated`. It computes what the fast
    formulations do not cover: dilation, groups, layouts other than NHWC/HWIO, other than two spatial
    axes, integers and mixed dtypes, `preferred_element_type`, negative padding, empty arrays.

    Args:
      lhs: [N, H, W, C] image.
      rhs: [KH, KW, C, O] kernel.

    Returns:
      [N, OH, OW, O].
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    covered = (
        numbers == DIMENSIONS
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and lhs.dtype == rhs.dtype
        and lhs.dtype.name in _DTYPES
        and lhs.shape[3] == rhs.shape[2]
        and len(window_strides) == 2
        and (isinstance(padding, str) or min(map(min, padding)) >= 0)
        and 0 not in lhs.shape
        and 0 not in rhs.shape
    )
    if covered:
        g = geometry(lhs, rhs, window_strides, padding, precision)
        if min(g.out) > 0:
            return _forward(g, lhs, rhs)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
