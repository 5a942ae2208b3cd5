"""Dense layers compared with convolutions, numbers of parameters, receptive fields."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.analysis.explain.explanation import Explanation, Grid, number, pair, whole_numbers
from cnn_jax.common.errors import ConfigError
from cnn_jax.models.layers import Conv, Dense, Flatten
from cnn_jax.models.receptive_field import Field
from cnn_jax.models.summary import Summary

MOST_WEIGHTS = 10_000_000


def dense(size: int, channels: int, filters: int) -> Explanation:
    """A dense layer on a flattened map is a convolution of the map's size; on a vector, 1x1."""
    inputs = size * size * channels
    if inputs * filters > MOST_WEIGHTS:
        raise ConfigError(
            f"--filters={filters}: must be at most {MOST_WEIGHTS // inputs} for {inputs:,} inputs"
        )
    data, kernel, bias = whole_numbers(size, size, channels, filters)
    image, added = jnp.asarray(data)[None], jnp.asarray(bias)
    flat = {"kernel": jnp.asarray(kernel.reshape(-1, filters)), "bias": added}
    by_dense = Dense(filters).apply({"params": flat}, Flatten().apply({}, image))[0]
    params = {"kernel": jnp.asarray(kernel), "bias": added}
    convolved: Any = Conv(filters, (size, size)).apply({"params": params}, image)
    by_conv = convolved[0, 0, 0]
    difference = float(jnp.abs(by_dense - by_conv).max())
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (flat, params)]
    table = (
        ("layer", "computed as", "parameters"),
        (
            f"dense {inputs:,} -> {filters:,}",
            f"{inputs:,} x {filters} + {filters}",
            f"{counts[0]:,}",
        ),
        (
            f"conv {size}x{size}",
            f"{size} x {size} x {channels} x {filters} + {filters}",
            f"{counts[1]:,}",
        ),
    )
    rows: tuple[tuple[Grid, ...], ...] = ()
    lines = []
    if inputs <= 12 and filters <= 6:
        output = np.asarray(by_conv)[None]
        rows = (
            (
                Grid("data", data.reshape(1, -1), "", (1, inputs)),
                Grid("kernel", kernel.reshape(-1, filters), "*", (inputs, 1)),
                Grid("bias", bias[None], "+", (1, 1)),
                Grid("output", output, "=", (1, 1)),
            ),
        )
        for f in range(filters):
            products = zip(data.ravel(), kernel[..., f].ravel(), strict=True)
            terms = " + ".join(f"{number(v)}*{number(w)}" for v, w in products)
            lines.append(f"m{f + 1} = {terms} + {number(bias[f])} = {output[0, f]:g}")
    lines.append(f"largest difference between the outputs of the two layers: {difference:g}")
    kind = "a 1x1 convolution" if size == 1 else f"a convolution of {pair((size, size))}"
    title = f"dense {inputs:,} -> {filters:,} is {kind} over {size}x{size}x{channels}"
    return Explanation(title, rows, tuple(lines), table)


def parameters(size: int, kernel: int, channels: int, filters: int) -> Explanation:
    """Counts those of a convolution and of a dense layer with as many inputs and outputs."""
    if kernel > size:
        raise ConfigError(f"--kernel={kernel}: must be at most the size, {size}")
    out = size - kernel + 1
    inputs, outputs = size * size * channels, out * out * filters
    by_conv = _count(Conv(filters, (kernel, kernel)), (1, size, size, channels))
    by_dense = _count(Dense(outputs), (1, inputs))
    table = (
        ("layer", "computed as", "parameters"),
        (
            f"conv {kernel}x{kernel}, {filters} filter{'s' if filters > 1 else ''}",
            f"({kernel} x {kernel} x {channels} + 1) x {filters}",
            f"{by_conv:,}",
        ),
        (f"dense {inputs:,} -> {outputs:,}", f"({inputs:,} + 1) x {outputs:,}", f"{by_dense:,}"),
    )
    rows: tuple[tuple[Grid, ...], ...] = ()
    if inputs <= 16 and outputs <= 16:  # few enough to draw
        _, weights, bias = whole_numbers(1, kernel, channels, filters)
        flat, biases = whole_numbers(1, 1, inputs, outputs)[1:]
        rows = (
            (
                Grid("convolution's kernel", weights.reshape(-1, kernel * filters)),
                Grid("bias", bias[None], "+"),
            ),
            (Grid("dense kernel", flat[0, 0]), Grid("bias", biases[None], "+")),
        )
    lines = (
        "A convolution has the same weights at all places: the size of the data does not count.",
        f"The dense layer has {by_dense / by_conv:,.1f} times as many parameters.",
    )
    title = f"parameters from {size}x{size}x{channels} to {out}x{out}x{filters}"
    return Explanation(title, rows, lines, table)


def receptive_field(network: Summary) -> Explanation:
    """How the window that an output sees grows from layer to layer."""
    table = [("layer", "kind", "outputs", "sees", "step", "from")]
    windows: list[tuple[str, Field]] = []
    for layer in network.layers:
        if layer.field is None:
            break
        table.append((layer.name, layer.kind, pair(layer.field.places), *layer.field.shown()))
        if not windows or windows[-1][1].size != layer.field.size:
            windows.append((f"{layer.name}: {pair(layer.field.size)}", layer.field))
    lines = [
        "A layer with kernel k, stride s and padding p changes what the layer before it sees:",
        "sees becomes sees + (k - 1) step; step becomes s step; it starts p steps earlier.",
        "Flatten and the dense layers see all that the outputs of the last map see.",
    ]
    image = network.image_shape[:2]
    if windows and any(a > b for a, b in zip(windows[-1][1].size, image, strict=True)):
        lines.append(f"What is seen beyond the image of {pair(image)} is padding.")
    title = f"{network.model} on {pair(image)}: the pixels that an output of each layer sees"
    return Explanation(title, (), tuple(lines), tuple(table), tuple(windows), image)


def _count(layer: Conv | Dense, shape: tuple[int, ...]) -> int:
    data = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), data)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))
