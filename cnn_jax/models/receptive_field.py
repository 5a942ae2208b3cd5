"""Which pixels of the image an output of a layer sees.

Through a layer of kernel k, stride s and p pixels of padding before the map, a window of `size` pixels
grows to size + (k - 1) * stride, starts p * stride pixels earlier, and neighbouring windows move
s times as far apart (Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019).

`follow` reads the order of the layers, and the functions between them, from the program that JAX
traces. After a step that it does not know, or whose windows form no such grid, no field is known.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from flax.linen.linear import canonicalize_padding
from jax import lax
from jax.extend import core

from cnn_jax.common.pairs import pair
from cnn_jax.models.layers import BatchNorm, Dropout, Flatten, MaxPool

Pair = tuple[int, int]
# Layers that treat each place of a map separately.
ELEMENTWISE = (BatchNorm, nn.BatchNorm, nn.Dense, nn.Dropout, Dropout)
KNOWN = (*ELEMENTWISE, nn.Conv, MaxPool, Flatten)
# Primitives of JAX that treat each element separately.
POINTWISE = frozenset(
    """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg
    nextafter not optimization_barrier or pow reduce_precision rem round rsqrt select_n sign sin sinh
    sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)
REDUCTIONS = frozenset(
    [
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
    ]
)
LOOPS = frozenset(["cond", "scan", "while"])


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
            pair(self.size[i] + (kernel[i] - 1) * self.stride[i] for i in axes),
            pair(self.stride[i] * strides[i] for i in axes),
            pair(self.start[i] - before[i] * self.stride[i] for i in axes),
        )

    def origin(self, row: int, column: int) -> Pair:
        """The first row and column of the window that output (row, column) sees."""
        return self.start[0] + row * self.stride[0], self.start[1] + column * self.stride[1]

    def whole(self) -> "Field":
        """The field of one output that sees all of these."""
        return self.through(self.places, (1, 1), (0, 0), (1, 1))

    def joined(self, other: "Field") -> "Field | None":
        """The field of outputs that see both windows; None if these form no regular grid."""
        if self.places != other.places or (self.stride != other.stride and self.places != (1, 1)):
            return None
        start = pair(map(min, self.start, other.start))
        ends = [
            max(one.start[i] + one.size[i] for one in (self, other)) - start[i] for i in range(2)
        ]
        return Field(self.places, pair(ends), self.stride, start)

    def shown(self) -> tuple[str, str, str]:
        """Size, stride and start as text; the last two as one number if height and width agree."""
        start = f"{self.start[0]},{self.start[1]}"
        return (
            "x".join(map(str, self.size)),
            "x".join(map(str, dict.fromkeys(self.stride))),
            str(self.start[0]) if self.start[0] == self.start[1] else start,
        )

    def inside(self, image: Pair) -> tuple[range, range]:
        """Rows and columns of the outputs whose windows lie completely in an image of this size."""
        return pair(
            range(
                max(0, math.ceil(-start / stride)),
                min(places, max(0, (length - size - start) // stride + 1)),
            )
            for places, size, stride, start, length in zip(
                self.places, self.size, self.stride, self.start, image, strict=True
            )
        )


def behind(field: Field | None, module: nn.Module, given: tuple, output: tuple) -> Field | None:
    """The field of a layer's output.

    Args:
      field: of its input.
      module: the layer.
      given: the shape of its input, [N, H, W, C] or [N, units].
      output: the shape of its output.

    Returns:
      None if it is not known: the input's field is not, or the kind of layer is not.
    """
    if field is None or (len(given) == 4 and given[1:3] != field.places):
        return None
    if len(output) == 2:  # a flattened map is seen whole, as by a convolution of its size
        return field.whole()
    if isinstance(module, ELEMENTWISE):
        return field
    if len(output) != 4 or (geometry := _geometry(module, given[1:3])) is None:
        return None
    return field.through(*geometry, output[1:3])


def _geometry(module: nn.Module, given: Pair) -> tuple[Pair, Pair, Pair] | None:
    """Kernel, strides and the padding before the map, of a convolution or pooling; else None."""
    if isinstance(module, MaxPool):
        return module.window, module.window, (0, 0)
    if not isinstance(module, nn.Conv) or _pair(module.input_dilation) != (1, 1):
        return None
    size = module.kernel_size
    if isinstance(size, int) or len(size) != 2:
        return None
    dilation = _pair(module.kernel_dilation)
    kernel = pair((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    strides = _pair(module.strides)
    padding = canonicalize_padding(module.padding, 2)
    if isinstance(padding, str):
        if padding not in ("SAME", "SAME_LOWER", "VALID"):
            return None
        padding = lax.padtype_to_pads(given, kernel, strides, padding)
    return kernel, strides, pair(int(before) for before, _ in padding)


def _pair(value: int | Sequence[int] | None) -> Pair:
    return (value or 1,) * 2 if isinstance(value, int | None) else pair(value)


@dataclasses.dataclass
class Call:
    """A layer's call in a traced program, in which its input and its output have names.

    Attributes:
      module: the layer.
      given: the shape of its input.
      output: the shape of its output.
      before: the field of its input; set by `follow`.
      field: the field of its output; set by `follow`; None if it is not known.
    """

    module: nn.Module
    given: tuple[int, ...]
    output: tuple[int, ...]
    before: Field | None = None
    field: Field | None = None


def follow(
    program: core.Jaxpr, inputs: list[Field | str | None], calls: dict[str, tuple[Call, bool]]
) -> list[Field | str | None]:
    """Follows the fields of an image's pixels through a program.

    Args:
      program: traced from a model, on images [1, H, W, C].
      inputs: the field of each argument; "none" if it does not depend on the image.
      calls: by the name that jax.ad_checkpoint.checkpoint_name gave an array: the call of a layer, and
        whether the array is its output. The fields of the calls are filled in.

    Returns:
      The field of each result; "none" if it does not depend on the image, None if it is not known.
    """
    known = dict(zip(program.invars, inputs, strict=True))

    def field_of(atom: core.Var | core.Literal) -> Field | str | None:
        return "none" if isinstance(atom, core.Literal) else known.get(atom, "none")

    for step in program.eqns:
        given = [field_of(atom) for atom in step.invars]
        found = [_behind_step(step, given, calls)] * len(step.outvars)
        inner = [p for p in map(_program, step.params.values()) if p is not None]
        called = len(inner) == 1 and step.primitive.name not in LOOPS
        if called and len(inner[0].invars) == len(given):
            found = follow(inner[0], given, calls)
        known |= zip(step.outvars, found, strict=True)
    return [field_of(atom) for atom in program.outvars]


def _program(value: Any) -> core.Jaxpr | None:
    value = getattr(value, "jaxpr", value)  # a ClosedJaxpr or a Jaxpr
    return value if hasattr(value, "eqns") else None


def _behind_step(step: core.JaxprEqn, given: list, calls: dict) -> Field | str | None:
    """The field of a primitive's result."""
    if step.primitive.name == "name" and step.params["name"] in calls:
        call, is_output = calls[step.params["name"]]
        field = given[0] if isinstance(given[0], Field) else None
        if not is_output:
            call.before = field
            return given[0]
        if isinstance(call.module, KNOWN):
            field = behind(call.before, call.module, call.given, call.output)
        call.field = field
        return field
    fields = {
        atom: field for atom, field in zip(step.invars, given, strict=True) if field != "none"
    }
    if not fields:
        return "none"
    if None in fields.values():
        return None
    field, *others = fields.values()
    for other in others:
        field = field and field.joined(other)
    shapes = {_shape(atom) for atom in fields}
    alike = len({(len(shape), shape[: _places(shape)]) for shape in shapes}) == 1
    if field is None or not alike:
        return None
    return _through(step, field, max(shapes), _shape(step.outvars[0]), len(fields))


def _shape(atom: Any) -> tuple[int, ...]:
    """Of an array in a program. The type of its `aval` is wider than what arrays have."""
    return atom.aval.shape


def _places(shape: tuple) -> int:
    """How many first axes of [N, H, W, ...] or [N, units] are not channels."""
    return 3 if len(shape) > 2 else 1


def _through(
    step: core.JaxprEqn, field: Field, before: tuple, after: tuple, arguments: int
) -> Field | None:
    """The field after a primitive whose arguments have `field`, and one shape but for channels."""
    name, options = step.primitive.name, step.params
    channels = set(range(_places(before), len(before)))
    kept = (
        _places(before) == _places(after) and before[: _places(before)] == after[: _places(after)]
    )
    if name in POINTWISE:
        return field if kept else None
    if name in REDUCTIONS:
        axes = set(options["axes"])
        return field if axes <= channels else field.whole() if {1, 2} <= axes <= {1, 2, 3} else None
    if name == "broadcast_in_dim":
        dimensions = options["broadcast_dimensions"]
        return field if kept and tuple(dimensions[:3]) == tuple(range(len(before)))[:3] else None
    if name in ("concatenate", "split"):
        return field if options.get("dimension", options.get("axis")) in channels else None
    if name == "transpose":
        order = options["permutation"]
        return field if tuple(order[:3]) == tuple(range(len(before)))[:3] else None
    if name == "dot_general":
        (left, right), (batch, _) = options["dimension_numbers"]
        last = arguments == 1 and not batch and tuple(left) == (len(before) - 1,)
        return field if last and kept and len(right) == 1 else None
    if name in ("reshape", "squeeze", "expand_dims"):
        if kept:
            return field
        return field.whole() if len(before) == 4 and len(after) == 2 else None
    return None
