"""Runs a network on windows cut out of a large image, to compare them with a class map.

Each score of a class map sees one window, its `receptive_field.Field`. If the layers have no padding,
the window is at most as large as the training images. With 'same' padding it is larger: beyond the
border of a training image the layers read zeros, inside a larger image they read its pixels. So

- a score equals the network's output on its window without the padding of all layers, because the
  window contains the pixels that take the place of padding. This holds for every network and for
  every window inside the image;
- if the layers have no padding, a score also equals the output on a window as large as the training
  images. With 'same' padding it differs: there the window is padded with zeros.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common.pairs import pair
from cnn_jax.models.receptive_field import Field
from cnn_jax.train import parallel
from cnn_jax.train.apply import forward
from cnn_jax.train.preprocess import normalise

# Of more windows, a sample is taken: networks without strides have a score for each pixel.
MOST_WINDOWS = 4096
BATCH = 64

Windows = Callable[[np.ndarray, np.ndarray, tuple[int, int]], np.ndarray]


def on_whole_images(run: RestoredRun) -> Callable[[np.ndarray], np.ndarray]:
    """The network as a compiled function: uint8 [N, H, W, C] -> its logits as float32."""

    @parallel.jit
    def logits(variables: Any, image: jax.Array) -> jax.Array:
        return forward(run.model, variables, normalise(image, run.data))

    variables = jax.device_put(run.variables)
    return lambda image: np.asarray(logits(variables, image))


def on_windows(run: RestoredRun, padding: bool = True) -> Windows:
    """The network as a compiled function of windows.

    Args:
      run: its network gives one score for a window: [N, classes] or [N, 1, 1, classes].
      padding: False leaves out the padding of all convolutions.

    Returns:
      windows(image, origins, size): uint8 [H, W, C], int [N, 2] -> logits [N, classes].
    """

    @parallel.jit
    def logits(variables: Any, image: jax.Array) -> jax.Array:
        image = normalise(image, run.data)
        if padding:
            return forward(run.model, variables, image)
        with nn.intercept_methods(_without_padding):
            return forward(run.model, variables, image)

    variables = jax.device_put(run.variables)

    def windows(image: np.ndarray, origins: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        found = []
        for start in range(0, len(origins), BATCH):
            # The last window fills up the last batch: with one shape, jit compiles once.
            rows = np.minimum(np.arange(start, start + BATCH), len(origins) - 1)
            parts = [image[r : r + size[0], c : c + size[1]] for r, c in origins[rows]]
            found.append(np.asarray(logits(variables, np.stack(parts))).reshape(BATCH, -1))
        return np.concatenate(found)[: len(origins)]

    return windows


def frames(field: Field, alone: Field, size: tuple[int, int]) -> Field:
    """For each score, the window of the training images' size that belongs to it.

    A training image in this place gets this score. The first window may not start at 0: with a
    stride, 'same' padding starts one pixel earlier on odd maps than on even ones.

    Args:
      field: of the scores of a larger image.
      alone: of the one score of a training image.
      size: that of the training images.
    """
    start = pair(whole - own for whole, own in zip(field.start, alone.start, strict=True))
    return dataclasses.replace(field, size=size, start=start)


def spread(ranges: Sequence[range]) -> np.ndarray:
    """(row, column) of all places in two ranges, or of MOST_WINDOWS evenly spread: int [N, 2]."""
    rows, columns = ranges
    total = math.prod(map(len, ranges))
    chosen = np.linspace(0, total - 1, min(total, MOST_WINDOWS)).round().astype(int)
    row, column = np.divmod(chosen, len(columns))
    return np.stack([row + rows.start, column + columns.start], -1)


def _without_padding(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
    layer = context.module
    if not isinstance(layer, nn.Conv) or layer.padding == "VALID":
        return call(*args, **kwargs)
    bare = layer.clone(parent=None, name=None, padding="VALID")
    return bare.apply({"params": layer.variables["params"]}, *args)
