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


# Writing one value to memory and reading it again takes as long as this many multiplications.
_MOVE = 100


def formulations_for(g: Geometry) -> Formulations:
    """The rule: which formulation computes which pass on CPU.

    1. A kernel of one pixel, or as large as the image, is a dense layer.
    2. 3x3, stride 1, 128 channels and more on both sides, 6x6 and more: Winograd, but for the kernel's
       gradient, where it gains nothing.
    3. Otherwise XLA's own convolution, but for
       - the forward pass from few channels, where Eigen has too little to work on at a time: a sum
         over the kernel's pixels from one channel, im2col from a few;
       - the image's gradient, where it multiplies the zeros between and around the cotangents and,
         where the kernel is larger than the output, is a scalar loop. "rows" multiplies fewer of
         them and "offsets" none, but writes more: the cheaper one by count.

    GFLOP/s of the direct algorithm on two Zen 4 cores (AVX-512; matmul 195), batch 128, float32, from
    process time, as the machine was shared; the rule's choice is marked. Zen 3 (AVX2) ranks them alike.

    | layer                 | forward: xla, other      | kernel | image: xla, rows, offsets, winograd |
    |-----------------------|--------------------------|--------|-------------------------------------|
    | 28x28   1->6   k5     |   5, offsets *63*        |   21   |                                     |
    | 28x28   1->32  k3     |  19, offsets *130*       |   21   |                                     |
    | 28x28   1->32  k7     |  53, offsets *61*        |   69   |                                     |
    | 32x32   3->32  k3     |  44, patches *67*        |   51   |                                     |
    | 32x32   3->24  k2     |  18, patches *52*        |   20   |                                     |
    | 14x14   6->16  k5     | *60*                     |   60   |  18,  *74*,   25                    |
    | 22x22  32->64  k7     | *179*                    |  150   |  89, *130*,   71                    |
    | 16x16  64->128 k7     | *185*                    |  173   |  69, *125*,  105                    |
    | 10x10 128->256 k7     | *151*                    |  176   |   3,   79, *115*                    |
    | 26x26  32->64  k3     | *165*                    |   90   | 130, *133*,  127                    |
    | 12x12  64->128 k3     | *175*                    |  149   | 107, *139*,  143                    |
    | 10x10 128->256 k3     | 163, winograd *260*      |  173   | 108,  137,   165,  *258*            |
    |  4x4  256->512 k3     | *188*                    |  150   |   2,   76, *122*                    |
    | 26x26  32->64  k3 s2  | *126*                    |   66   |  50,   64, *120*                    |
    | 14x14 128->256 k3 s2  | *179*                    |  160   | 146,   88, *177*                    |
    |  8x8  512->1024 k3 s2 | *192*                    |  180   | 168,   94, *178*                    |
    | 14x14  64->128 k3 p   | *185*                    |  139   | 143, *148*,  121                    |
    |  7x7  256->512 k3 p   | 185, winograd *290*      |  187   | 170,  189,   172,  *184*            |
    |  8x8  256->512 k3 p   | 187, winograd *361*      |  175   | 171,  193,   167,  *273*            |
    |  7x7  256->256 k3 p   | 177, winograd *247*      |  165   | 187,  190,   183,  *224*            |
    """
    if applies("dense", g):
        return Formulations("dense", "dense", "dense")
    channels = min(g.in_channels, g.out_channels)
    if applies("winograd", g) and channels >= 128 and min(g.out) >= 6:
        return Formulations("winograd", "winograd", "xla")
    forward = "offsets" if g.in_channels == 1 else "patches" if g.in_channels < 5 else "xla"
    # The cost of each multiplication of the direct algorithm.
    offsets = 1 + _MOVE / g.out_channels
    rows = g.image[1] / g.out[1] * (1 + _MOVE / (g.out_channels * g.kernel[1]))
    return Formulations(forward, "rows" if rows < offsets else "offsets", "xla")


def applies(formulation: str, g: Geometry) -> bool:
    """Whether a formulation can compute a convolution of this geometry."""
    if formulation == "dense":
        covers = g.kernel == g.image or g.kernel == g.strides == (1, 1)
        return covers and g.pads == ((0, 0), (0, 0))
    if formulation == "winograd":
        return g.kernel == (3, 3) and g.strides == (1, 1)
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


def _winograd(g: Geometry, image: Array, kernel: Array) -> Array:
    """Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): 16 multiplications for 4 x 9.

    Tiles of 4x4 pixels, two apart, become 2x2 pixels of the output. The transforms are sums and
    differences along the height, then along the width; between them stand 16 matmuls. Errors are
    about 1e-6 of the largest output in float32.
    """
    n, (oh, ow) = image.shape[0], g.out
    th, tw = -(-oh // 2), -(-ow // 2)  # tiles
    (top, _), (left, _) = g.pads
    after = [
        2 * t + 2 - size - lo for t, size, lo in zip((th, tw), g.image, (top, left), strict=True)
    ]
    image = lax.pad(
        image,
        jnp.zeros((), image.dtype),
        ((0, 0, 0), (top, after[0], 0), (left, after[1], 0), (0, 0, 0)),
    )
    image = image.reshape(n, th + 1, 2, tw + 1, 2, -1)
    rows = _tile_transform([image[:, i // 2 : i // 2 + th, i % 2] for i in range(4)])
    sums = []
    for row, weights in zip(rows, _kernel_transform(kernel), strict=True):
        tiles = _tile_transform([row[:, :, j // 2 : j // 2 + tw, j % 2] for j in range(4)])
        tiles = lax.optimization_barrier(tiles)  # each written once, for the matmul alone
        products = map(functools.partial(_matmul, g), tiles, _kernel_transform(weights))
        sums.append(_output_transform(*products))
    (y00, y10), (y01, y11) = (_output_transform(*column) for column in zip(*sums, strict=True))
    y = jnp.stack([jnp.stack([y00, y01], 3), jnp.stack([y10, y11], 3)], 2)
    return y.reshape(n, 2 * th, 2 * tw, -1)[:, :oh, :ow]  # [N, OH, OW, O]


def _tile_transform(d: Sequence[Array]) -> tuple[Array, ...]:
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _kernel_transform(k: Array) -> tuple[Array, ...]:
    """Along the first axis."""
    return k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]


def _output_transform(m0: Array, m1: Array, m2: Array, m3: Array) -> tuple[Array, Array]:
    return m0 + m1 + m2, m1 - m2 - m3


FORMULATIONS: dict[str, Callable[[Geometry, Array, Array], Array]] = {
    "xla": _xla,
    "dense": _dense,
    "offsets": _offsets,
    "rows": _rows,
    "patches": _patches,
    "winograd": _winograd,
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
    """[N, H, W, C], [KH, KW, C, O] -> [N, OH, OW, O]."""
    return _run(formulations_for(g).forward, lambda convolution: convolution, g, image, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(g: Geometry, cotangent: Array, kernel: Array) -> Array:
    """[N, OH, OW, O], [KH, KW, C, O] -> [N, H, W, C]."""
    shape = (cotangent.shape[0], *g.image, g.in_channels)

    def transposed(convolution: Callable) -> Callable:
        return lambda cotangent, kernel: _transpose(
            lambda image: convolution(image, kernel), shape, cotangent
        )

    return _run(formulations_for(g).image_gradient, transposed, g, cotangent, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(g: Geometry, cotangent: Array, image: Array) -> Array:
    """[N, OH, OW, O], [N, H, W, C] -> [KH, KW, C, O]."""
    shape = (*g.kernel, g.in_channels, g.out_channels)

    def transposed(convolution: Callable) -> Callable:
        return lambda cotangent, image: _transpose(
            lambda kernel: convolution(image, kernel), shape, cotangent
        )

    return _run(formulations_for(g).kernel_gradient, transposed, g, cotangent, image)


def _transpose(linear: Callable, shape: tuple[int, ...], cotangent: Array) -> Array:
    argument = jax.ShapeDtypeStruct(shape, cotangent.dtype)
    return jax.linear_transpose(linear, argument)(cotangent)[0]


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
