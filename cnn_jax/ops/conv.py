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
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnn_jax.ops import dense

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


# Of one matmul: Eigen multiplies 16 columns at a time on AVX-512, and best more than one such group.
_FEWEST_OUTPUTS = 24
# Writing one value to memory and reading it again takes as long as this many multiplications.
_MOVE = 100


def formulations_for(g: Geometry) -> Formulations:
    """The rule: which formulation computes which pass on CPU.

    1. A kernel of one pixel, or as large as the image, is a dense layer; in the latter case the
       image's gradient has the batch in columns, as Eigen takes four times as long to multiply few
       rows by a transposed matrix (GFLOP/s at 7x7 256->512: 37, in columns 149; but at 14x14 64->64
       k1 170, in columns 62).
    2. 5 pixels wide and more, stride 1, 32 channels and more on both sides: Fourier along the width,
       and for the image's gradient patches along the height where the kernel is higher than the
       output.
    3. 3x3, stride 1, 64 channels and more on both sides (for the image's gradient 128): Winograd along
       the width from 6x6 on, in tiles on an even smaller output; the kernel's gradient gains nothing.
    4. Otherwise XLA's own convolution, but for
       - the forward pass from one to four channels, where Eigen has too little to work on at a time:
         patches, of several columns of the output where that has few channels as well (32x32 3->6 k5:
         XLA 7, patches of one column 9, of four 35);
       - the image's gradient, where it multiplies the zeros between and around the cotangents and,
         where the kernel is larger than the output, is a scalar loop. "rows" multiplies fewer of
         them and "offsets" none, but writes more: the cheaper one by count.

    GFLOP/s of the direct algorithm on two Zen 4 cores (AVX-512; matmul 190), batch 128, float32, from
    process time because the machine was shared; + marks the rule's choice, p padding "SAME":

    | layer                  | forward               | kernel | image: xla rows offsets winograd |
    |------------------------|-----------------------|--------|----------------------------------|
    | 28x28   1->6    k5   p | xla   6, patches  50+ |    18+ |                                  |
    | 28x28   1->32   k3     | xla  19, patches  71+ |    22+ |                                  |
    | 28x28   1->32   k7     | xla  52, patches  58+ |    72+ |                                  |
    | 32x32   3->32   k3   p | xla  40, patches  67+ |    50+ |                                  |
    | 32x32   3->24   k2     | xla  14, patches  48+ |    15+ |                                  |
    | 14x14   6->16   k5     | xla  53+              |    54+ |  16   48+   19                   |
    | 22x22  32->64   k7     | xla 172+              |   105+ |  83  134+   89                   |
    | 16x16  64->128  k7     | xla 180+              |   157+ |  64  116+   97                   |
    | 10x10 128->256  k7     | xla 184+              |   163+ |   3   75   120+                  |
    | 26x26  32->64   k3     | xla 161+              |    95+ | 127  118+  126                   |
    | 12x12  64->128  k3     | xla 174+              |   146+ | 103  133+  116                   |
    | 10x10 128->256  k3     | xla 185, winograd 309+|   131+ | 113  153   179      249+         |
    |  4x4  256->512  k3     | xla 162+              |   161+ |   2   84   133+                  |
    | 14x14  64->128  k3   p | xla 180+              |   120+ | 145  171+  125                   |
    |  7x7  256->512  k3   p | xla 174, winograd 263+|   157+ | 162  175   151      177+         |
    |  8x8  256->512  k3   p | xla 186, winograd 333+|   145+ | 168  182   163      263+         |
    |  7x7  256->256  k3   p | xla 177, winograd 239+|   153+ | 179  175   167      204+         |
    | 26x26  32->64   k3 s2  | xla 139+              |    57+ |  79   78   118+                  |
    | 14x14 128->256  k3 s2 p| xla 169+              |   135+ | 151  149   141+                  |
    |  8x8  512->1024 k3 s2 p| xla 192+              |   161+ | 171  164   159+                  |

    On two Zen 3 cores (AVX2; matmul 165), where "rows" was not measured, XLA and "offsets" gave 2 and
    136 at 4x4 256->512, 73 and 126 at 26x26 s2, 131 and 151 at 14x14 s2, and Winograd's forward pass
    285 at 10x10 128->256 (XLA 170) but 120 at 14x14 64->128 (XLA 176): hence 128 channels.

    Fourier, and Winograd on one tile, by wall time on the same Zen 4 cores; the rule's choice last:

    | layer                  | forward               | kernel gradient     | image gradient          |
    |------------------------|-----------------------|---------------------|-------------------------|
    | 22x22  32->64   k7     | xla 178, fourier 275  | xla 142 fourier 258 | rows 113, fourier 241   |
    | 16x16  64->128  k7     | xla 192, fourier 355  | xla 180 fourier 258 | rows 113, fourier 252   |
    | 10x10 128->256  k7     | xla 197, fourier 307  | xla 188 fourier 232 | offsets 103, fourier 161|
    | 26x26  32->64   k3     | fourier 62, xla 171   | fourier 55, xla 84  | fourier 55, rows 138    |
    |  4x4  256->512  k3     | xla 173, tiles 282    | tiles 74, xla 165   | offsets 129, tiles 178  |

    Winograd along the width, F(4, 3), likewise; in brackets in tiles, F(2x2, 3x3):

    | layer                  | forward               | kernel gradient     | image gradient          |
    |------------------------|-----------------------|---------------------|-------------------------|
    | 10x10 128->256  k3     | xla 185, 292 (185)    | 166, xla 155        | rows 153, 238 (152)     |
    |  8x8  256->512  k3   p | xla 206, 276 (223)    | 175, xla 179        | rows 195, 264 (196)     |
    |  7x7  256->512  k3   p | xla 192, 281 (187)    | 149, xla 170        | rows 190, 217 (145)     |
    | 15x15  64->64   k3   p | xla 144, 197 (80)     | 84, xla 84          | 167, rows 154           |
    | 14x14  64->128  k3   p | xla 167, 206 (101)    | 60, xla 82          | 110, rows 157           |
    | 12x12  64->128  k3     | xla 164, 169 (186)    | 103, xla 140        | 143, rows 134           |
    | 26x26  32->64   k3     | 140, xla 140 (65)     | 48, xla 63          | 137, rows 126           |
    """
    if applies("dense", g):
        return Formulations("dense", "dense_columns" if g.out == (1, 1) else "dense", "dense")
    channels = min(g.in_channels, g.out_channels)
    # The cost of each multiplication of the direct algorithm.
    offsets = 1 + _MOVE / g.out_channels
    rows = g.image[1] / g.out[1] * (1 + _MOVE / (g.out_channels * g.kernel[1]))
    image_gradient = "rows" if rows < offsets else "offsets"
    if math.prod(g.kernel) > 49:  # "offsets" would be hundreds of operations, slow to compile
        image_gradient = "rows"
    if applies("fourier", g) and g.kernel[1] >= 5 and channels >= 32:
        # Transposed, XLA's convolution is a scalar loop where the kernel is higher than the output.
        higher = g.kernel[0] > g.out[0]
        return Formulations("fourier", "fourier_patches" if higher else "fourier", "fourier")
    if applies("winograd", g) and channels >= 64:
        if min(g.out) >= 6:
            return Formulations(
                "winograd", "winograd" if channels >= 128 else image_gradient, "xla_apart"
            )
        if channels >= 128 and not any(size % 2 for size in g.out):
            return Formulations("winograd_tiles", "winograd_tiles", "xla_apart")
    few = g.in_channels < 5 and math.prod(g.kernel) <= 49
    return Formulations("patches" if few else "xla", image_gradient, "xla_apart")


def applies(formulation: str, g: Geometry) -> bool:
    """Whether a formulation can compute a convolution of this geometry."""
    if formulation in ("dense", "dense_columns"):
        covers = g.kernel == g.image or g.kernel == g.strides == (1, 1)
        return covers and g.pads == ((0, 0), (0, 0))
    if formulation in ("winograd", "winograd_tiles"):
        return g.kernel == (3, 3) and g.strides == (1, 1)
    if formulation in ("fourier", "fourier_patches"):
        # Wider, its many small operations would be slow to compile.
        return g.strides == (1, 1) and g.image[1] + sum(g.pads[1]) <= 32
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


def _xla_apart(g: Geometry, image: Array, kernel: Array) -> Array:
    """`_xla` on arrays that stand in memory, for the kernel's gradient.

    XLA makes that a convolution of transposed arrays. Its transposing loop would compute again, element
    by element across memory, what made the array: a bias and a ReLU, a pooling, Winograd's sums.
    """
    return lax.optimization_barrier(_xla(g, lax.optimization_barrier(image), kernel))


def _dense(g: Geometry, image: Array, kernel: Array) -> Array:
    """One matmul: the kernel is 1x1 or covers the whole image."""
    n = image.shape[0]
    image = image.reshape(n, *g.out, -1)
    return _matmul(g, image, kernel.reshape(-1, g.out_channels))


def _dense_columns(g: Geometry, image: Array, kernel: Array) -> Array:
    """`_dense` with the batch in columns, for the image's gradient: see `dense.times_transposed`."""
    kernel = kernel.reshape(-1, g.out_channels)
    y = dense.times_transposed(image.reshape(-1, len(kernel)), kernel.T, g.precision)
    return y.reshape(image.shape[0], *g.out, -1)


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
    """im2col along the height and then along the width, and one matmul.

    A kernel of few outputs is repeated beside itself, one step on, for as many columns of the output
    as fill Eigen's registers: a patch then spans those columns, and meets zeros where it is too wide.
    """
    (kh, kw), stride, (oh, ow) = g.kernel, g.strides[1], g.out
    columns = max(1, min(ow, _FEWEST_OUTPUTS // g.out_channels))
    blocks, wide = -(-ow // columns), (columns - 1) * stride + kw
    image = _im2col(_pad(g, image), 1, kh, oh, g.strides[0])
    missing = (blocks - 1) * columns * stride + wide - image.shape[2]
    image = jnp.pad(image, ((0, 0), (0, 0), (0, max(0, missing)), (0, 0)))
    image = _im2col(image, 2, wide, blocks, columns * stride)  # [N, OH, blocks, wide * KH * C]
    kernel = kernel.swapaxes(0, 1).reshape(kw, -1, g.out_channels)
    shifts = [(i * stride, wide - kw - i * stride) for i in range(columns)]
    kernel = jnp.stack([jnp.pad(kernel, (shift, (0, 0), (0, 0))) for shift in shifts], 2)
    y = _matmul(g, image, kernel.reshape(-1, columns * g.out_channels))
    return y.reshape(-1, oh, blocks * columns, g.out_channels)[:, :, :ow]


# Winograd's F(4, 3), by the points 0, 1, -1, 2, -2 and infinity: six products for 4 x 3.
_WINOGRAD_IMAGE = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_WINOGRAD_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_WINOGRAD_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _winograd(g: Geometry, image: Array, kernel: Array) -> Array:
    """Winograd's F(4, 3) along the width (Lavin and Gray, arXiv 1509.09308), XLA's convolution along
    the height.

    Six columns of the image, four apart, become four of the output by six convolutions of 3x1 instead
    of twelve. Errors are about 3e-6 of the largest output in float32.
    """
    n, (height, width), (oh, ow) = image.shape[0], g.image, g.out
    tiles = -(-ow // 4)
    left = g.pads[1][0]
    border = ((0, 0, 0), (0, 0, 0), (left, 4 * tiles + 4 - width - left, 0), (0, 0, 0))
    image = lax.pad(image, jnp.zeros((), image.dtype), border)
    image = image.reshape(n, height, tiles + 1, 4, -1)
    columns = [image[:, :, i // 4 : i // 4 + tiles, i % 4] for i in range(6)]
    column = g._replace(
        image=(height, tiles), kernel=(3, 1), out=(oh, tiles), pads=(g.pads[0], (0, 0))
    )
    products = [
        _xla(column, _weighted_sum(a, columns), _weighted_sum(b, kernel.swapaxes(0, 1))[:, None])
        for a, b in zip(_WINOGRAD_IMAGE, _WINOGRAD_KERNEL, strict=True)
    ]
    y = jnp.stack([_weighted_sum(row, products) for row in _WINOGRAD_OUTPUT], 3)
    return y.reshape(n, oh, 4 * tiles, -1)[:, :, :ow]  # [N, OH, OW, O]


def _weighted_sum(weights: Sequence[float], terms: Sequence[Array]) -> Array:
    return sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)


def _winograd_tiles(g: Geometry, image: Array, kernel: Array) -> Array:
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


def _fourier(
    g: Geometry, image: Array, kernel: Array, convolution: Callable[..., Array] = _xla
) -> Array:
    """Fourier's transform along the width, and for each frequency a convolution along the height.

    The transform of W real columns has W / 2 + 1 complex ones, each of which needs three real
    products (Gauss): about 1.5 W convolutions along the height in place of KW * OW. As the image is
    as wide as all that the kernel meets, nothing wraps around. It is a matmul by a constant, as W is
    small. Errors are about 1e-6 of the largest output in float32.
    """
    image = _pad(g, image)
    n, height, width, _ = image.shape
    kh, kw = g.kernel
    to, back = _fourier_matrices(width, g.out[1])
    to, back = to.astype(image.dtype), back.astype(image.dtype)
    frequencies = len(to) // 2
    image = _matmul(g, to, image.transpose(2, 0, 1, 3).reshape(width, -1))
    image = image.reshape(frequencies, 2, n, height, 1, g.in_channels)
    kernel = _matmul(g, to[:, :kw], kernel.swapaxes(0, 1).reshape(kw, -1))
    kernel = kernel.reshape(frequencies, 2, kh, 1, g.in_channels, g.out_channels)
    column = g._replace(image=(height, 1), kernel=(kh, 1), out=(g.out[0], 1), pads=((0, 0), (0, 0)))
    parts = []
    for f in range(frequencies):
        # The convolution of machine learning is a correlation: image times the kernel's conjugate.
        (a, b), (c, d) = image[f], kernel[f]
        real = convolution(column, a, c)
        if 2 * f in (0, width):  # these two are real
            parts += [real, jnp.zeros_like(real)]
        else:
            imaginary = convolution(column, b, d)
            mixed = convolution(column, a + b, c - d)
            parts += [real + imaginary, mixed - real + imaginary]
    y = _matmul(g, back, jnp.stack(parts).reshape(2 * frequencies, -1))
    return y.reshape(g.out[1], n, g.out[0], -1).transpose(1, 2, 0, 3)


def _fourier_matrices(width: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """To real and imaginary parts of each frequency, in turn, and from them to `out` columns."""
    frequency = np.arange(width // 2 + 1)
    angle = 2 * np.pi / width * frequency[:, None] * np.arange(width)
    waves = np.stack([np.cos(angle), -np.sin(angle)], 1)  # [frequencies, 2, width]
    once = np.isin(2 * frequency, (0, width))  # the others stand for their conjugates too
    weights = np.where(once, 1, 2)[:, None, None] / width
    return waves.reshape(-1, width), (weights * waves).reshape(-1, width)[:, :out].T


FORMULATIONS: dict[str, Callable[[Geometry, Array, Array], Array]] = {
    "xla": _xla,
    "xla_apart": _xla_apart,
    "dense": _dense,
    "dense_columns": _dense_columns,
    "offsets": _offsets,
    "rows": _rows,
    "patches": _patches,
    "winograd": _winograd,
    "winograd_tiles": _winograd_tiles,
    "fourier": _fourier,
    "fourier_patches": functools.partial(_fourier, convolution=_patches),
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
