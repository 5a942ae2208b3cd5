"""The summary of an architecture: layers, output shapes, parameters, FLOPs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cnn_jax.models.convolutional import replaces
from cnn_jax.models.layers import Flatten, MaxPool
from cnn_jax.models.receptive_field import Call, Field, follow
from cnn_jax.models.shapes import takes_no, too_small


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
      name: of the module, as in its parameters.
      kind: what it is, as in "Conv 5x5".
      shape: of its output, without the batch.
      parameters: how many it has; 0 if they were counted in an earlier call.
      flops: of one image forward; a multiplication with addition counts as two.
      field: which pixels an output sees; None where that is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    field: Field | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A model on images of one shape.

    Attributes:
      model: the name of its class.
      image_shape: (H, W, C).
      layers: in the order of their calls.
      parameters: of the whole model, also those outside of these layers.
      field: which pixels an output of the model sees; None where that is not known.
    """

    model: str
    image_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    parameters: int
    field: Field | None

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


def summarise(model: nn.Module, image_shape: tuple[int, int, int]) -> Summary:
    """Follows an image of `image_shape` (H, W, C) through `model`; nothing is computed.

    Raises:
      ConfigError: the model does not take such images.
    """
    layers: list[Layer] = []
    calls: list[Call] = []
    ends: dict[str, tuple[Call, bool]] = {}

    def record(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        given: Any = args[0] if args else None
        if context.method_name != "__call__" or not module.path or not hasattr(given, "shape"):
            return call(*args, **kwargs)
        enter, leave = (f"cnn_jax {len(ends)} {end}" for end in ("in", "out"))
        this = Call(module, given.shape, ())
        ends.update({enter: (this, False), leave: (this, True)})
        output = call(checkpoint_name(given, enter), *args[1:], **kwargs)
        if not hasattr(output, "shape") or replaces(module, output):
            return output
        own = module.variables.get("params", {})
        arrays = {name: leaf for name, leaf in own.items() if hasattr(leaf, "shape")}
        if own and not arrays:
            return output
        this.output = output.shape
        layer = _layer(module, arrays, given.shape, output.shape)
        if any(earlier.name == layer.name for earlier in layers):
            layer = dataclasses.replace(layer, parameters=0)
        layers.append(layer)
        calls.append(this)
        return checkpoint_name(output, leave)

    def run(image: jax.Array) -> tuple[jax.Array, Mapping[str, Any]]:
        with nn.intercept_methods(record):
            return model.init_with_output(jax.random.key(0), image)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        program, (_, variables) = jax.make_jaxpr(run, return_shape=True)(image)
    except Exception as error:
        raise takes_no(image_shape, model, error) from error
    if any(0 in layer.shape for layer in layers):
        raise too_small(image_shape, model)
    output, *_ = follow(program.jaxpr, [Field(image_shape[:2])], ends)
    return Summary(
        type(model).__name__,
        image_shape,
        tuple(
            dataclasses.replace(layer, field=call.field)
            for layer, call in zip(layers, calls, strict=True)
        ),
        sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {}))),
        output if isinstance(output, Field) else None,
    )


def _layer(module: nn.Module, arrays: dict, before: tuple, after: tuple) -> Layer:
    parameters = sum(int(np.prod(array.shape)) for array in arrays.values())
    kind, flops = type(module).__name__, 0
    if "kernel" in arrays:
        shape = arrays["kernel"].shape
        # A kernel is applied at each place of the output; a transposed one, of the input.
        times = np.prod(after[1:]) // np.prod(getattr(module, "features", after[-1]))
        if isinstance(module, nn.ConvTranspose):
            times = np.prod(before[1:-1])
        elif isinstance(module, nn.ConvLocal):  # a kernel of its own for each place
            times = 1
        flops = 2 * int(np.prod(shape) * times)
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
    return Layer("/".join(module.path), kind, after[1:], parameters, flops)
