"""What an architecture is made of: layers, output shapes, parameters, FLOPs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.models.convolutional import replaces
from cnn_jax.models.layers import Flatten, MaxPool
from cnn_jax.models.receptive_field import Field, behind
from cnn_jax.models.shapes import takes_no, too_small


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
      name: of the module, as in its parameters.
      kind: what it is, as in "Conv 5x5".
      shape: of its output, without the batch.
      parameters: how many it has.
      flops: of one image forward: two for each multiplication with addition.
      field: which pixels an output sees; None where the layers are no chain.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    field: Field | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model on images of one shape."""

    model: str
    image_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """Of one image's forward pass and both gradients, by the direct algorithm.

        The first layer's input gradient is not needed, and not counted.
        """
        own = (layer.flops for layer in self.layers if layer.parameters and layer.flops)
        return 3 * self.flops - next(own, 0)

    @property
    def field(self) -> Field | None:
        """Which pixels an output of the model sees; None where that is not known."""
        return self.layers[-1].field if self.layers else None


def summarise(model: nn.Module, image_shape: tuple[int, int, int]) -> Summary:
    """Follows an image of `image_shape` (H, W, C) through `model`; nothing is computed.

    Raises:
      ConfigError: the model does not take such images.
    """
    layers: list[Layer] = []
    field: Field | None = Field(image_shape[:2])

    def record(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal field
        output = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.path and hasattr(output, "shape"):
            if replaces(module, output):
                return output
            own = module.variables.get("params", {})
            arrays = {name: leaf for name, leaf in own.items() if hasattr(leaf, "shape")}
            if arrays or not own:
                field = behind(field, module, args[0].shape, output.shape)
                layers.append(_layer(module, arrays, args[0].shape, output.shape, field))
        return output

    def run(image: jax.Array) -> jax.Array:
        with nn.intercept_methods(record):
            return model.init_with_output(jax.random.key(0), image)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        jax.eval_shape(run, image)
    except Exception as error:
        raise takes_no(image_shape, model, error) from error
    if any(0 in layer.shape for layer in layers):
        raise too_small(image_shape, model)
    return Summary(type(model).__name__, image_shape, tuple(layers))


def _layer(
    module: nn.Module, arrays: dict, before: tuple, after: tuple, field: Field | None
) -> Layer:
    parameters = sum(int(np.prod(array.shape)) for array in arrays.values())
    kind, flops = type(module).__name__, 0
    if "kernel" in arrays:
        shape = arrays["kernel"].shape
        # A kernel's multiplications, once for each place of the output.
        flops = 2 * int(np.prod(shape)) * int(np.prod(after[1:-1]))
        if len(shape) == 4:
            strides = (
                module.strides if isinstance(module.strides, int) else max(module.strides or (1,))
            )
            padding = f" {module.padding.lower()}" if isinstance(module.padding, str) else ""
            kind += f" {shape[0]}x{shape[1]}" + (f" /{strides}" if strides != 1 else "") + padding
    elif isinstance(module, MaxPool):
        kind += f" {module.window[0]}x{module.window[1]}"
    elif not isinstance(module, Flatten):
        flops = int(np.prod(before[1:]))
    return Layer("/".join(module.path), kind, after[1:], parameters, flops, field)
