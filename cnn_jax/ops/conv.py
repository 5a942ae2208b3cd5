"""2-D convolution in the formulation that is fastest on CPU for the shape at hand.

`conv_general_dilated` takes the place of `jax.lax.conv_general_dilated` in `flax.linen.nn.Conv` (its
field of that name). A convolution is bilinear in the image and the kernel, so one function of both,
differentiated by transposition, gives the forward pass and both gradients. `FORMULATIONS` holds
several such functions, equal but for rounding; `formulations_for` is the rule that chooses one for
each of the three passes on CPU. On GPU and TPU all three are XLA's own convolution.

Forward-mode differentiation (`jax.jvp`) of the covered shapes is not offered, as the three passes are
`jax.custom_vjp` functions that are each other's gradients; reverse mode works to any order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_DIMENSIONS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO
_DTYPES = ("bfloat16", "float16", "float32", "float64")


class Geometry(NamedTuple):
    """What is static about one convolution: sizes are (height, width), `pads` are (before, after)."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    out: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    in_channels: int
    out_channels: int
    precision: lax.PrecisionLike


class Formulations(NamedTuple):
    """Names of the formulations that serve the three passes."""

    forward: str
    image_gradient: str
    kernel_gradient: str


# Moving one value to memory and back takes as long as this many multiplications and additions.
_MOVE = 100


def formulations_for(g: Geometry) -> Formulations:
    """The rule: which formulation computes which pass on CPU."""
    if applies("dense", g):
        return Formulations("dense", "dense", "dense")
    forward = "offsets" if g.in_channels == 1 else "xla"
    # Per multiplication that the direct algorithm needs.
    offsets = 1 + _MOVE / g.out_channels
    rows = g.image[1] / g.out[1] * (1 + _MOVE / (g.out_channels * g.kernel[1]))
    return Formulations(forward, "rows" if rows < offsets else "offsets", "xla")


def applies(formulation: str, g: Geometry) -> bool:
    """Whether a formulation can compute a convolution of this geometry."""
    if formulation == "dense":
        covers = g.kernel == g.image or g.kernel == g.strides == (1, 1)
        return covers and g.pads == ((0, 0), (0, 0))
    return True


def _xla(g: Geometry, image: Array, kernel: Array) -> Array:
    """XLA's own convolution; on CPU, Eigen's."""
    return lax.conv_general_dilated(
        image,
        kernel,
        g.strides,
        g.pads,
        dimension_numbers=_DIMENSIONS,
        precision=g.precision,
    )


def _dense(g: Geometry, image: Array, kernel: Array) -> Array:
    """One matmul: the kernel is 1x1 or covers the whole image."""
    n = image.shape[0]
    image = image.reshape(n, *g.out, -1)
    return _matmul(g, image, kernel.reshape(-1, g.out_channels))


def _offsets(g: Geometry, image: Array, kernel: Array) -> Array:
    """One matmul for each position in the kernel, on the pixels it meets, and their sum."""
    image = _pad(g, image)
    return sum(
        _matmul(g, _window(g, image, i, j), kernel[i, j])
        for i in range(g.kernel[0])
        for j in range(g.kernel[1])
    )


def _rows(g: Geometry, image: Array, kernel: Array) -> Array:
    """im2col along the height, and XLA's convolution along the width."""
    kh, kw = g.kernel
    image = _im2col(_pad(g, image, axes=(True, False)), 1, kh, g.out[0], g.strides[0])
    kernel = kernel.swapaxes(0, 1).reshape(1, kw, kh * g.in_channels, g.out_channels)
    flat = g._replace(
        image=image.shape[1:3],
        kernel=(1, kw),
        strides=(1, g.strides[1]),
        pads=((0, 0), g.pads[1]),
        in_channels=kh * g.in_channels,
    )
    return _xla(flat, image, kernel)


def _patches(g: Geometry, image: Array, kernel: Array) -> Array:
    """im2col, along the height and then along the width, and one matmul."""
    image = _im2col(_pad(g, image), 1, g.kernel[0], g.out[0], g.strides[0])
    image = _im2col(image, 2, g.kernel[1], g.out[1], g.strides[1])  # [N, OH, OW, KW * KH * C]
    kernel = kernel.swapaxes(0, 1).reshape(-1, g.out_channels)
    return _matmul(g, image, kernel)


def _folded(g: Geometry, image: Array, kernel: Array) -> Array:
    """One matmul to each row of the output, the width folded into the channels.

    With few channels a row of the image is one vector and a row of the kernel a banded matrix: kernel
    width / image width of what it multiplies is not zero, but it is a matmul of a good size.
    """
    (_h, w), (kh, kw), (oh, ow) = g.image, g.kernel, g.out
    start = jnp.arange(ow) * g.strides[1] - g.pads[1][0]
    meets = jnp.arange(w)[:, None, None] == start[:, None] + jnp.arange(kw)  # [W, OW, KW]
    band = jnp.einsum("wvj,ijco->iwcvo", meets.astype(kernel.dtype), kernel)
    image = _pad(g, image, axes=(True, False)).reshape(image.shape[0], -1, 1, w * g.in_channels)
    image = _im2col(image, 1, kh, oh, g.strides[0])  # [N, OH, 1, KH * W * C]
    rows = _matmul(g, image, band.reshape(kh * w * g.in_channels, -1))
    return rows.reshape(-1, oh, ow, g.out_channels)


FORMULATIONS: dict[str, Callable[[Geometry, Array, Array], Array]] = {
    "xla": _xla,
    "dense": _dense,
    "offsets": _offsets,
    "rows": _rows,
    "patches": _patches,
    "folded": _folded,
}


def _matmul(g: Geometry, a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=g.precision)


def _pad(g: Geometry, image: Array, axes: tuple[bool, bool] = (True, True)) -> Array:
    pads = [pad if axis else (0, 0) for pad, axis in zip(g.pads, axes, strict=True)]
    return jnp.pad(image, ((0, 0), *pads, (0, 0)))


def _im2col(padded: Array, axis: int, size: int, out: int, stride: int) -> Array:
    """The windows of `size` pixels along one axis, side by side in the channels."""
    windows = [
        lax.slice_in_dim(padded, i, i + (out - 1) * stride + 1, stride, axis) for i in range(size)
    ]
    return jnp.concatenate(windows, axis=3)


def _window(g: Geometry, padded: Array, i: int, j: int) -> Array:
    """[N, OH, OW, C]: the pixels that position (i, j) of the kernel meets."""
    (oh, ow), (sh, sw) = g.out, g.strides
    return padded[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]


# The three passes. Each is linear in both arguments, and the gradients of each are the other two.
def _run(
    formulation: str, bilinear: Callable[[Callable], Callable], g: Geometry, a: Array, b: Array
) -> Array:
    """Evaluates `bilinear(convolution)(a, b)`, on CPU with the given formulation of the convolution."""
    wide = jnp.promote_types(a.dtype, jnp.float32)

    def fast(a: Array, b: Array) -> Array:
        # Sums of many terms that XLA's convolution accumulates in float32 itself.
        convolution = functools.partial(FORMULATIONS[formulation], g)
        return bilinear(convolution)(a.astype(wide), b.astype(wide)).astype(a.dtype)

    plain = bilinear(functools.partial(_xla, g))
    if formulation == "xla":
        return plain(a, b)
    return lax.platform_dependent(a, b, cpu=fast, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(g: Geometry, image: Array, kernel: Array) -> Array:
    return _run(formulations_for(g).forward, lambda convolution: convolution, g, image, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    shape = (cotangent.shape[0], *g.image, g.in_channels)

    def bilinear(convolution: Callable) -> Callable:
        def gradient(cotangent: Array, kernel: Array) -> Array:
            image = jax.ShapeDtypeStruct(shape, cotangent.dtype)
            return jax.linear_transpose(lambda image: convolution(image, kernel), image)(cotangent)[
                0
            ]

        return gradient

    return _run(formulations_for(g).image_gradient, bilinear, g, cotangent, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(g: Geometry, cotangent: Array, image: Array) -> Array:
    shape = (*g.kernel, g.in_channels, g.out_channels)

    def bilinear(convolution: Callable) -> Callable:
        def gradient(cotangent: Array, image: Array) -> Array:
            kernel = jax.ShapeDtypeStruct(shape, cotangent.dtype)
            return jax.linear_transpose(lambda kernel: convolution(image, kernel), kernel)(
                cotangent
            )[0]

        return gradient

    return _run(formulations_for(g).kernel_gradient, bilinear, g, cotangent, image)


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


def _geometry(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    precision: lax.PrecisionLike,
) -> Geometry:
    image, kernel = lhs.shape[1:3], rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image, kernel, window_strides, padding)
    pads = tuple((int(lo), int(hi)) for lo, hi in padding)
    out = tuple(
        (size + sum(pad) - k) // s + 1
        for size, k, s, pad in zip(image, kernel, window_strides, pads, strict=True)
    )
    strides = tuple(map(int, window_strides))
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

    Args and result are those of `jax.lax.conv_general_dilated`. Whatever the fast formulations do not
    cover goes to it: dilation, groups, layouts other than NHWC/HWIO, other than two spatial axes,
    integers and mixed dtypes, `preferred_element_type`, negative padding, empty arrays.

    Args:
      lhs: [N, H, W, C] image.
      rhs: [KH, KW, C, O] kernel.

    Returns:
      [N, OH, OW, O].
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    covered = (
        numbers == _DIMENSIONS
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
        g = _geometry(lhs, rhs, window_strides, padding, precision)
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
