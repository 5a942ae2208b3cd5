"""The kernel of a model that can be drawn as images."""

from typing import Any

import flax.linen as nn
import numpy as np

from cnn_jax.models.summary import summarise


def first_kernel(
    model: nn.Module, image_shape: tuple[int, int, int], params: Any
) -> tuple[str, np.ndarray] | None:
    """The kernel of the first layer that has one.

    Args:
      model: the module.
      image_shape: (H, W, C) of its images.
      params: its parameters.

    Returns:
      The layer's name and its kernel [h, w, C, filters]; a dense one over the flattened image as
      [H, W, C, units]. None if there is no kernel of these shapes.
    """
    for layer in summarise(model, image_shape).layers:
        own = params
        for name in layer.name.split("/"):
            own = own.get(name, {}) if hasattr(own, "get") else {}
        if not hasattr(own, "get") or own.get("kernel") is None:
            continue
        kernel = np.asarray(own["kernel"], np.float32)
        if kernel.ndim == 2 and len(kernel) == np.prod(image_shape):
            kernel = kernel.reshape(*image_shape, -1)
        return (layer.name, kernel) if kernel.ndim == 4 else None
    return None
