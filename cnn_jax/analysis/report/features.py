"""The output of each layer for an image, after the activation that follows it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import images
from cnn_jax.models.convolutional import replaces
from cnn_jax.models.summary import Layer, Summary
from cnn_jax.train import parallel
from cnn_jax.train.apply import forward
from cnn_jax.train.preprocess import normalise

MAPS = 8
MOST_UNITS = 1024
UNITS_A_ROW = 64
TILE, ROW = 88, 24  # pixels
# Layers that are drawn of a deep network: the first, the last and some between.
MOST_LAYERS = 12

ACTIVATIONS: dict[str, Callable] = {
    "ReLU": nn.relu,
    "GELU": lambda x: nn.gelu(x, approximate=False),
    "GELU (tanh)": nn.gelu,
    "SiLU": nn.silu,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
    "ELU": nn.elu,
    "leaky ReLU": nn.leaky_relu,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """The output of a layer for a few images.

    Attributes:
      name: of the layer.
      kind: what it is, as in "Conv 3x3 /2".
      shape: of its output, without the batch.
      activation: already applied to `output`; empty if there is none, or an unknown one.
      output: float32 [N, *shape].
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    activation: str
    output: np.ndarray


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer's call on a few images.

    Attributes:
      layer: as in the summary.
      module: the layer itself.
      given: its input, [N, ...].
      output: float32 [N, *layer.shape].
    """

    layer: Layer
    module: nn.Module
    given: Any
    output: np.ndarray


def follow(run: RestoredRun, layers: Summary, image: np.ndarray) -> list[Stage]:
    """Sends images through the network and keeps the output of each layer in `layers`.

    Args:
      run: the restored model.
      layers: the summary of its layers.
      image: uint8 [N, H, W, C].

    Returns:
      The layers in order; empty if they cannot be intercepted, as under nn.scan.
    """
    found, _ = calls(run, layers, image)
    stages = []
    for call, following in itertools.zip_longest(found, found[1:]):
        activation, output = _activated(call.output, following.given if following else None)
        layer = call.layer
        stages.append(Stage(layer.name, layer.kind, layer.shape, activation, output))
    return stages


def calls(run: RestoredRun, layers: Summary, image: np.ndarray) -> tuple[list[Call], np.ndarray]:
    """The calls of the layers in `layers` on images, and the model's output; as `follow`."""
    modules: list[nn.Module] = []
    arrays: list[tuple[Any, jax.Array]] = []

    def record(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        layer = context.module
        called = context.method_name == "__call__" and layer.path and hasattr(output, "shape")
        if called and not replaces(layer, output):
            modules.append(layer)
            arrays.append((args[0] if args else None, output))
        return output

    def followed(variables: Any, image: jax.Array) -> tuple[list, jax.Array]:
        with nn.intercept_methods(record):
            output = forward(run.model, variables, normalise(image, run.data))
        return arrays, output

    try:
        traced, output = jax.device_get(parallel.jit(followed)(run.variables, image))
    except jax.errors.UnexpectedTracerError:
        return [], np.empty(0, np.float32)
    found, place = [], 0
    for layer in layers.layers:
        # In the summary's order: a module that is called twice appears twice.
        while (
            "/".join(modules[place].path) != layer.name or traced[place][1].shape[1:] != layer.shape
        ):
            place += 1
        given, result = traced[place]
        found.append(Call(layer, modules[place], given, result.astype(np.float32)))
        place += 1
    return found, output


def _activated(after: np.ndarray, following: Any) -> tuple[str, np.ndarray]:
    """The activation between a layer and the next one, if it is known, and the output after it."""
    if not hasattr(following, "size") or following.size != after.size:
        return "", after
    given = np.asarray(following, np.float32).reshape(after.shape)
    if np.array_equal(given, after):
        return "", after
    for name, function in ACTIVATIONS.items():
        if np.allclose(function(after), given, rtol=1e-4, atol=1e-5):
            return name, given
    return "", after


def shown(stages: list[Stage]) -> list[Stage]:
    """At most MOST_LAYERS of them, evenly spread."""
    if len(stages) <= MOST_LAYERS:
        return stages
    places = np.linspace(0, len(stages) - 1, MOST_LAYERS).round().astype(int)
    return [stages[i] for i in places]


def draw(stage: Stage) -> list[np.ndarray]:
    """A strip for each image: uint8 [h, w, 4].

    For maps, the MAPS channels that vary most over the images, each scaled to its range over all
    images. For a vector, its values row by row.
    """
    output = stage.output
    if output.ndim == 4 and output.shape[1] * output.shape[2] > 1:
        spread = output.std((0, 1, 2))
        best = np.argsort(-spread, kind="stable")[:MAPS]
        return [_maps(maps) for maps in _scaled(output[..., best], (0, 1, 2))]
    vectors = output.reshape(len(output), -1)[:, :MOST_UNITS]
    return [_vector(vector) for vector in _scaled(vectors, (0, 1))]


def _scaled(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Scales to [0, 1] over `axes`; constant values become 0."""
    low, high = values.min(axes, keepdims=True), values.max(axes, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1)


def _maps(maps: np.ndarray) -> np.ndarray:
    """[h, w, channels] in [0, 1] -> channels side by side."""
    return images.tiles(_colour(np.moveaxis(maps, -1, 0)), MAPS, TILE)


def _vector(values: np.ndarray) -> np.ndarray:
    """[units] in [0, 1] -> rows of cells; the last row ends in transparent cells."""
    rows = -(-len(values) // UNITS_A_ROW)
    columns = -(-len(values) // rows)
    cells = np.zeros((rows * columns, 4), np.uint8)
    cells[: len(values), :3] = _colour(values)
    cells[: len(values), 3] = 255
    width = MAPS * TILE
    cells = cells.reshape(rows, columns, 4).repeat(ROW, 0)
    return cells[:, np.arange(width) * columns // width]


def _colour(values: np.ndarray) -> np.ndarray:
    """In 32 shades: the eye sees no difference, and the files are small."""
    return images.colour(np.round(values * 31) / 31, images.SEQUENTIAL)
