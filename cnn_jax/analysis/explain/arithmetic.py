"""Convolution, pooling and padding, with the sum or maximum of every output."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_jax.analysis.explain.explanation import Explanation, Grid, number, pair, whole_numbers
from cnn_jax.common.errors import ConfigError
from cnn_jax.models.layers import Conv, MaxPool

MOST_SUMS = 16
LARGEST = 16  # pixels of data with padding


def conv(
    size: int, kernel: int, stride: int, padding: str, channels: int, filters: int
) -> Explanation:
    """Each output as a sum of products."""
    pads = _pads(size, kernel, stride, padding)
    data, weights, bias = whole_numbers(size, kernel, channels, filters)
    layer = Conv(filters, (kernel, kernel), strides=stride, padding=(pads, pads))
    output = _convolved(layer, data, weights, bias)
    padded = np.pad(data, (pads, pads, (0, 0)))
    out = len(output)
    rows = []
    for f in range(filters):
        row = _data(padded, pads, kernel)
        for c in range(channels):
            title, sign = f"kernel{_of(f, filters)}{_of(c, channels)}", "*" if c == 0 else ""
            row.append(Grid(title, weights[:, :, c, f], sign, (kernel, kernel)))
        row.append(Grid("bias", bias[f].reshape(1, 1), "+", (1, 1)))
        row.append(Grid(f"output{_of(f, filters)}", output[:, :, f], "=", (1, 1)))
        rows.append(tuple(row))
    places = [*itertools.product(range(filters), range(out), range(out))]
    lines = [
        f"output size: {_size(size, pads, kernel, stride, out)}",
        f"m1 = {_letters(size, pads[0], kernel, channels)}",
    ]
    for m, (f, i, j) in enumerate(places[:MOST_SUMS], 1):
        window = padded[i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        products = zip(window.ravel(), weights[..., f].ravel(), strict=True)
        terms = " + ".join(f"{number(v)}*{number(w)}" for v, w in products)
        lines.append(f"m{m} = {terms} + {number(bias[f])} = {output[i, j, f]:g}")
    lines += _rest(len(places))
    count = weights.size + bias.size
    lines += [
        f"parameters: {kernel} x {kernel} x {channels} x {filters} weights + {filters} for the "
        f"bias = {count}",
        f"shapes: data {(1, *data.shape)}, kernel {weights.shape}, output {(1, *output.shape)}",
    ]
    title = f"conv {kernel}x{kernel}, stride {stride}, padding {padding}: "
    title += f"{size}x{size}x{channels} -> {out}x{out}x{filters}"
    return Explanation(title, tuple(rows), tuple(lines))


def pool(size: int, kernel: int) -> Explanation:
    """Each output as a maximum."""
    if kernel > size:
        raise ConfigError(f"--kernel={kernel}: must be at most the size, {size}")
    data = whole_numbers(size, kernel, 1, 1)[0]
    output = np.asarray(MaxPool((kernel, kernel)).apply({}, jnp.asarray(data)[None]))[0]
    out, dropped = len(output), size % kernel
    lines = [f"output size: {size} // {kernel} = {out}, as the windows lie beside each other"]
    if dropped:
        lines.append(f"rows and columns that no window reaches, and that are dropped: {dropped}")
    places = [*itertools.product(range(out), range(out))]
    for m, (i, j) in enumerate(places[:MOST_SUMS], 1):
        window = data[i * kernel : (i + 1) * kernel, j * kernel : (j + 1) * kernel]
        values = ", ".join(map(number, window.ravel()))
        lines.append(f"m{m} = max({values}) = {output[i, j, 0]:g}")
    lines += _rest(len(places))
    lines += ["parameters: none", f"shapes: data {(1, *data.shape)}, output {(1, *output.shape)}"]
    grids = (*_data(data, (0, 0), kernel), Grid("strongest", output[..., 0], "->", (1, 1)))
    title = f"max pooling {kernel}x{kernel}: {size}x{size} -> {out}x{out}"
    return Explanation(title, (grids,), tuple(lines))


def padding(size: int, kernel: int, stride: int) -> Explanation:
    """Compares 'valid' with 'same'."""
    if kernel > size:
        raise ConfigError(f"--kernel={kernel}: must be at most the size, {size}")
    data, weights, bias = whole_numbers(size, kernel, 1, 1)
    rows, table = [], [("padding", "zeros before", "after", "output", "computed as")]
    for name in ("valid", "same"):
        pads = _pads(size, kernel, stride, name)
        layer = Conv(1, (kernel, kernel), strides=stride, padding=name.upper())
        output = _convolved(layer, data, weights, bias)[..., 0]
        (grid,) = _data(np.pad(data, (pads, pads, (0, 0))), pads, kernel, name)
        rows.append((grid, Grid(f"output {pair(output.shape)}", output, "->", (1, 1))))
        formula = _size(size, pads, kernel, stride, len(output))
        before, after = map(str, pads)
        table.append((name, before, after, pair(output.shape), formula))
    lines = [
        "'valid' adds nothing; 'same' adds zeros until there are size / stride outputs, rounded up."
    ]
    if pads[0] != pads[1]:
        lines.append("Of an odd number of zeros, the one more comes after the data, as in Keras.")
    title = f"padding of {size}x{size} for a kernel of {kernel}x{kernel}, stride {stride}"
    return Explanation(title, tuple(rows), tuple(lines), tuple(table))


def _convolved(layer: Conv, data: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    params = {"kernel": jnp.asarray(weights), "bias": jnp.asarray(bias)}
    return np.asarray(layer.apply({"params": params}, jnp.asarray(data)[None]))[0]


def _pads(size: int, kernel: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros before and after the data, on each side."""
    if padding in ("valid", "same"):
        ((before, after),) = lax.padtype_to_pads((size,), (kernel,), (stride,), padding.upper())
        pads = (int(before), int(after))
    elif re.fullmatch(r"\d|1[0-2]", padding, re.ASCII):
        pads = (int(padding),) * 2
    else:
        raise ConfigError(f"--padding={padding}: must be same, valid, or from 0 to 12")
    if size + sum(pads) > LARGEST:
        raise ConfigError(
            f"--size={size}: with padding {size + sum(pads)}, must be at most {LARGEST} pixels"
        )
    if kernel > size + sum(pads):
        raise ConfigError(
            f"--kernel={kernel}: larger than the data with its padding, {size + sum(pads)} pixels"
        )
    return pads


def _data(
    padded: np.ndarray, pads: tuple[int, int], kernel: int, name: str | None = None
) -> list[Grid]:
    """A grid for each channel, with the window of the first output marked."""
    name = name or ("data, padded" if any(pads) else "data")
    channels = padded.shape[2]
    return [
        Grid(f"{name}{_of(c, channels)}", padded[..., c], "", (kernel, kernel), pads)
        for c in range(channels)
    ]


def _of(i: int, total: int) -> str:
    return f" {i + 1}" if total > 1 else ""


def _letters(size: int, before: int, kernel: int, channels: int) -> str:
    """The first output's sum in letters: the data are v1, v2, ... row by row; padding is 0."""
    terms = []
    places = itertools.product(range(kernel), range(kernel), range(channels))
    for w, (i, j, c) in enumerate(places, 1):
        row, column = i - before, j - before
        inside = 0 <= row < size and 0 <= column < size
        terms.append(f"v{(row * size + column) * channels + c + 1}*w{w}" if inside else f"0*w{w}")
    return " + ".join([*terms, "b"])


def _size(size: int, pads: tuple[int, int], kernel: int, stride: int, out: int) -> str:
    return f"({size} + {pads[0]} + {pads[1]} - {kernel}) // {stride} + 1 = {out}"


def _rest(total: int) -> list[str]:
    return [f"... and {total - MOST_SUMS} more"] if total > MOST_SUMS else []
