"""Which pixels of the image an output of a layer sees.

Through a layer of kernel k, stride s and p pixels of padding before the map, a window of `size` pixels
grows to size + (k - 1) * stride, starts p * stride pixels earlier, and neighbouring windows move
s times as far apart (Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019).
"""

import dataclasses
import math

import flax.linen as nn
from flax.linen.linear import canonicalize_padding
from jax import lax

from cnn_jax.models.layers import Dropout, MaxPool

Pair = tuple[int, int]
# They treat each place of a map by itself.
ELEMENTWISE = (nn.BatchNorm, nn.Dense, nn.Dropout, nn.LayerNorm, Dropout)


@dataclasses.dataclass(frozen=True)
class Field:
    """The windows that the outputs of a layer see, each as (height, width).

    Attributes:
      places: how many outputs there are.
      size: of a window, in pixels; what exceeds the image is padding.
      stride: pixels between the windows of neighbouring outputs.
      start: the first pixel of the first window; negative where it begins in the padding.
    """

    places: Pair
    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    start: Pair = (0, 0)

    def through(self, kernel: Pair, strides: Pair, before: Pair, places: Pair) -> "Field":
        """The field behind a layer of this kernel and stride, with `before` pixels of padding."""
        axes = range(2)
        return Field(
            places,
            tuple(self.size[i] + (kernel[i] - 1) * self.stride[i] for i in axes),
            tuple(self.stride[i] * strides[i] for i in axes),
            tuple(self.start[i] - before[i] * self.stride[i] for i in axes),
        )

    def origin(self, row: int, column: int) -> Pair:
        """The first row and column of the window that output (row, column) sees."""
        return self.start[0] + row * self.stride[0], self.start[1] + column * self.stride[1]

    def shown(self) -> tuple[str, str, str]:
        """Size, stride and start as text, in one number where height and width agree."""
        start = f"{self.start[0]},{self.start[1]}"
        return (
            "x".join(map(str, self.size)),
            "x".join(map(str, dict.fromkeys(self.stride))),
            str(self.start[0]) if self.start[0] == self.start[1] else start,
        )

    def inside(self, image: Pair) -> tuple[range, range]:
        """Rows and columns of the outputs whose windows lie in an image of this size altogether."""
        return tuple(
            range(
                max(0, math.ceil(-start / stride)),
                min(places, max(0, (length - size - start) // stride + 1)),
            )
            for places, size, stride, start, length in zip(
                self.places, self.size, self.stride, self.start, image, strict=True
            )
        )


def behind(field: Field | None, module: nn.Module, given: tuple, output: tuple) -> Field | None:
    """The field behind a layer.

    Layers are taken for a chain, each behind the one called before, as long as their shapes allow it.
    Of branches side by side over maps of one size it is what they would see one behind the other.

    Args:
      field: that of the layer called before; for the first one, that of the image.
      module: the layer.
      given: the shape of its input, [N, H, W, C] or [N, units].
      output: the shape of its output.

    Returns:
      None where it is not known: the layers are no chain, or of a kind that is not looked through.
    """
    if field is None or (len(given) == 4 and given[1:3] != field.places):
        return None
    if len(output) == 2:  # a flattened map is seen whole, as by a convolution of its size
        return field.through(field.places, (1, 1), (0, 0), (1, 1))
    if isinstance(module, ELEMENTWISE):
        return field
    if len(output) != 4 or (geometry := _geometry(module, given[1:3])) is None:
        return None
    return field.through(*geometry, output[1:3])


def _geometry(module: nn.Module, given: Pair) -> tuple[Pair, Pair, Pair] | None:
    """Kernel, strides and the padding before the map, of a convolution or pooling over such a map."""
    if isinstance(module, MaxPool):
        return module.window, module.window, (0, 0)
    if not isinstance(module, nn.Conv) or _pair(module.input_dilation) != (1, 1):
        return None
    size = module.kernel_size
    if isinstance(size, int) or len(size) != 2:
        return None
    dilation = _pair(module.kernel_dilation)
    kernel = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    strides = _pair(module.strides)
    padding = canonicalize_padding(module.padding, 2)
    if isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            return None
        padding = lax.padtype_to_pads(given, kernel, strides, padding)
    return kernel, strides, tuple(int(before) for before, _ in padding)


def _pair(value: int | Pair | None) -> Pair:
    return (value or 1,) * 2 if isinstance(value, int | None) else tuple(value)
