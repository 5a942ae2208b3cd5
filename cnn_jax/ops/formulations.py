"""2-D convolution written in several ways, equal but for rounding and different in speed.

Each takes the static geometry, the image [N, H, W, C] and the kernel [KH, KW, C, O], and gives
[N, OH, OW, O]. Each is bilinear, so that its transposition gives a gradient in the same formulation.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cnn_jax.common.pairs import pair
from cnn_jax.ops import dense

DIMENSIONS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO


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


# Of one matmul: on AVX-512, Eigen multiplies 16 columns at a time; more than 16 are faster.
_FEWEST_OUTPUTS = 24


def applies(formulation: str, g: Geometry) -> bool:
    """Whether a formulation can compute a convolution of this geometry."""
    if formulation in ("dense", "dense_columns"):
        covers = g.kernel == g.image or g.kernel == g.strides == (1, 1)
        return covers and g.pads == ((0, 0), (0, 0))
    if formulation in ("winograd", "winograd_tiles"):
        return g.kernel == (3, 3) and g.strides == (1, 1)
    if formulation in ("fourier", "fourier_patches"):
        # Wider images need many small operations, which are slow to compile.
        return g.strides == (1, 1) and g.image[1] + sum(g.pads[1]) <= 32
    return True


def xla(g: Geometry, image: Array, kernel: Array) -> Array:
    """XLA's own convolution; on CPU, Eigen's."""
    return lax.conv_general_dilated(
        image,
        kernel,
        g.strides,
        g.pads,
        dimension_numbers=DIMENSIONS,
        precision=g.precision,
    )


def _xla_apart(g: Geometry, image: Array, kernel: Array) -> Array:
    """`xla` on arrays that are written to memory, for the kernel's gradient.

    XLA computes that as a convolution of transposed arrays. Without barriers, the loop that transposes
    an array also recomputes it, element by element: a bias and a ReLU, a pooling, Winograd's sums.
    """
    return lax.optimization_barrier(xla(g, lax.optimization_barrier(image), kernel))


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
    image = pad(g, image)
    return total(
        _matmul(g, _window(g, image, i, j), kernel[i, j])
        for i in range(g.kernel[0])
        for j in range(g.kernel[1])
    )


def _rows(g: Geometry, image: Array, kernel: Array) -> Array:
    """im2col along the height, and XLA's convolution along the width."""
    kh, kw = g.kernel
    image = im2col(pad(g, image, axes=(True, False)), 1, kh, g.out[0], g.strides[0])
    kernel = kernel.swapaxes(0, 1).reshape(1, kw, kh * g.in_channels, g.out_channels)
    flat = g._replace(
        image=pair(image.shape[1:3]),
        kernel=(1, kw),
        strides=(1, g.strides[1]),
        pads=((0, 0), g.pads[1]),
        in_channels=kh * g.in_channels,
    )
    return xla(flat, image, kernel)


def _patches(g: Geometry, image: Array, kernel: Array) -> Array:
    """im2col along the height and then along the width, and one matmul.

    A kernel of few outputs is repeated, each copy one stride further, for as many columns of the output
    as fill Eigen's registers. A patch then spans all of them; each copy is zero outside its kernel.
    """
    (kh, kw), stride, (oh, ow) = g.kernel, g.strides[1], g.out
    columns = max(1, min(ow, _FEWEST_OUTPUTS // g.out_channels))
    blocks, wide = -(-ow // columns), (columns - 1) * stride + kw
    image = im2col(pad(g, image), 1, kh, oh, g.strides[0])
    missing = (blocks - 1) * columns * stride + wide - image.shape[2]
    image = jnp.pad(image, ((0, 0), (0, 0), (0, max(0, missing)), (0, 0)))
    image = im2col(image, 2, wide, blocks, columns * stride)  # [N, OH, blocks, wide * KH * C]
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
        xla(column, _weighted_sum(a, columns), _weighted_sum(b, kernel.swapaxes(0, 1))[:, None])
        for a, b in zip(_WINOGRAD_IMAGE, _WINOGRAD_KERNEL, strict=True)
    ]
    y = jnp.stack([_weighted_sum(row, products) for row in _WINOGRAD_OUTPUT], 3)
    return y.reshape(n, oh, 4 * tiles, -1)[:, :, :ow]  # [N, OH, OW, O]


def _weighted_sum(weights: Sequence[float], terms: Array | Sequence[Array]) -> Array:
    return total(weight * term for weight, term in zip(weights, terms, strict=True) if weight)


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
        tiles = lax.optimization_barrier(tiles)  # writes each to memory once, for the matmul
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
    g: Geometry, image: Array, kernel: Array, convolution: Callable[..., Array] = xla
) -> Array:
    """Fourier's transform along the width, and for each frequency a convolution along the height.

    The transform of W real columns has W / 2 + 1 complex ones. Each needs three real products
    (Gauss): about 1.5 W convolutions along the height in place of KW * OW. Nothing wraps around, as
    the padded image has all pixels that the kernel meets. W is small, so the transform is a matmul by
    a constant. Errors are about 1e-6 of the largest output in float32.
    """
    image = pad(g, image)
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
    """Matrices to the real and imaginary part of each frequency, and from there to `out` columns."""
    frequency = np.arange(width // 2 + 1)
    angle = 2 * np.pi / width * frequency[:, None] * np.arange(width)
    waves = np.stack([np.cos(angle), -np.sin(angle)], 1)  # [frequencies, 2, width]
    once = np.isin(2 * frequency, (0, width))  # the others stand for their conjugates too
    weights = np.where(once, 1, 2)[:, None, None] / width
    return waves.reshape(-1, width), (weights * waves).reshape(-1, width)[:, :out].T


FORMULATIONS: dict[str, Callable[[Geometry, Array, Array], Array]] = {
    "xla": xla,
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


def total(terms: Iterable[Array]) -> Array:
    """The sum of at least one array; sum() may also give the number 0."""
    return functools.reduce(operator.add, terms)


def _matmul(g: Geometry, a: Array | np.ndarray, b: Array) -> Array:
    return jnp.matmul(a, b, precision=g.precision)


def pad(g: Geometry, image: Array, axes: tuple[bool, bool] = (True, True)) -> Array:
    pads = [pad if axis else (0, 0) for pad, axis in zip(g.pads, axes, strict=True)]
    return jnp.pad(image, ((0, 0), *pads, (0, 0)))


def im2col(padded: Array, axis: int, size: int, out: int, stride: int) -> Array:
    """The windows of `size` pixels along one axis, side by side in the channels."""
    windows = [
        lax.slice_in_dim(padded, i, i + (out - 1) * stride + 1, stride, axis) for i in range(size)
    ]
    return jnp.concatenate(windows, axis=3)


def _window(g: Geometry, padded: Array, i: int, j: int) -> Array:
    """[N, OH, OW, C]: the pixels that position (i, j) of the kernel meets."""
    (oh, ow), (sh, sw) = g.out, g.strides
    return padded[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw]
