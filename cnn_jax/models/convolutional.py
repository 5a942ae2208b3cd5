"""Converts networks that end in flatten + dense to networks of convolutions only."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.layers import Conv, Flatten


class Convolutional(nn.Module):
    """Runs `model` with its dense layers as convolutions, on images of any larger size.

    Source: lecture, 1x1 Convolution. A dense layer over a flattened HxWxC map is a convolution whose
    kernel is HxW, and the dense layers after it are 1x1 convolutions. The parameters have the
    model's names and values; a kernel [H * W * C, units] becomes [H, W, C, units]. Input [N, H, W, C]
    float32, output logits [N, h, w, num_classes]. On images of the model's own size, h = w = 1 and
    the logits are the model's.

    Attributes:
      model: passes its last map to `layers.Flatten`.
      window: height and width of that map on images of the model's own size.

    Raises:
      ValueError: the last map of the image is smaller than `window`.
    """

    model: nn.Module
    window: tuple[int, int]

    def setup(self) -> None:
        nn.share_scope(self, self.model)  # adds no level to the parameters' names

    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        kernel = (1, 1)  # after Flatten, the first dense layer has self.window

        def convolve(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            nonlocal kernel
            layer = context.module
            if context.method_name == "__call__" and args and jnp.ndim(args[0]) == 4:
                if isinstance(layer, Flatten):
                    self._check(image, args[0])
                    kernel = self.window
                    return args[0]
                if isinstance(layer, nn.Dense):
                    size, kernel = kernel, (1, 1)
                    # In the dense layer's scope, so that the parameters keep its name.
                    options: dict[str, Any] = {"parent": layer.scope}
                    options |= {"use_bias": layer.use_bias, "dtype": layer.dtype}
                    return Conv(layer.features, size, **options)(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(convolve):
            return self.model(image, train)

    def _check(self, image: jax.Array, map_: jax.Array) -> None:
        if any(size < least for size, least in zip(map_.shape[1:3], self.window, strict=True)):
            (height, width), (h, w) = image.shape[1:3], map_.shape[1:3]
            raise ValueError(
                f"{type(self.model).__name__} leaves a map of {h}x{w} of images of {height}x{width}; "
                f"its first dense layer, made a convolution, needs {self.window[0]}x{self.window[1]}"
            )


def replaces(layer: nn.Module, output: Any) -> bool:
    """Whether `Convolutional` replaced the call of this layer that gave `output`."""
    if jnp.ndim(output) != 4:
        return False
    kernel: Any = layer.variables.get("params", {}).get("kernel")
    return isinstance(layer, Flatten) or (isinstance(layer, nn.Dense) and jnp.ndim(kernel) == 4)


def gives_class_map(model: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether the model gives a map of scores, so that it takes an image of any size."""
    return _logits(model, image_shape).ndim == 4


def convolutional(model: nn.Module, image_shape: tuple[int, int, int]) -> Convolutional:
    """Converts `model`, built for images of `image_shape` (H, W, C), to convolutions only.

    Raises:
      ValueError: it gives a class map already, or its head is not `layers.Flatten` and dense layers.
    """
    maps = []

    def record(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, Flatten) and context.method_name == "__call__":
            maps.append(args[0].shape[1:3])
        return call(*args, **kwargs)

    name = type(model).__name__
    with nn.intercept_methods(record):
        logits = _logits(model, image_shape)
    if logits.ndim == 4:
        raise ValueError(f"{name} is convolutional already: it takes any larger size as it is")
    if len(maps) == 1:
        made = Convolutional(model, maps[0])
        if _logits(made, image_shape).shape[:3] == (1, 1, 1):
            return made
    raise ValueError(f"{name} has no head of layers.Flatten and dense layers alone")


def _logits(model: nn.Module, image_shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
