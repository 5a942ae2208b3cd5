"""Reads what XLA compiled: a program's text, computation by computation."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation|branch_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
# Instructions that do nothing when the program runs, or only call others.
_FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "call",
        "while",
    ),
    *("conditional", "partition-id", "replica-id", "opt-barrier", "async-update"),
}
COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    "collective-broadcast",
}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: as in "f32".
      dims: its sizes.
      order: its dimensions in memory, from the one that changes fastest.
      space: the memory that it is in; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without the padding that a device's tiles add."""
        bits = re.search(r"\d+", self.dtype)
        width = {"pred": 8, "token": 0}.get(self.dtype, int(bits[0]) if bits else 0)
        return math.prod(self.dims) * width // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      arrays: its result.
      opcode: as in "fusion".
      operands: the names of its operands.
      text: what follows the operands: attributes and metadata.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls."""
        found = [one or several for one, several in _CALLED.findall(self.text)]
        return tuple(name.strip("% ") for names in found for name in names.split(","))

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function, "" if XLA made it."""
        return self.attribute("op_name")

    @property
    def kind(self) -> str:
        """The opcode without the suffix of an asynchronous one."""
        return self.opcode.removesuffix("-start")

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str:
        """The value of an attribute that is a word or a quoted string, "" without it."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|([^\s,}}]+))', self.text)
        return (found[1] or found[2] or "") if found else ""


class Program:
    """A compiled program.

    Attributes:
      head: the first line: the name, aliases, layouts.
      computations: the instructions of each computation, in order.
      entry: the name of the computation that runs.
    """

    def __init__(self, text: str):
        """Reads a program in XLA's text form, as `jax.stages.Compiled.as_text` gives it."""
        self.head = text.partition("\n")[0]
        self.has_float64 = re.search(r"\b(f64|c128)\[", text) is not None
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = _instruction(found[1], line[found.end() :])

    @property
    def aliased(self) -> int:
        """How many outputs reuse the memory of an argument."""
        return len(re.findall(r"-alias\)", self.head))

    def launched(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, int, str]]:
        """The instructions that the device runs, how often, and the computation each is in.

        A loop's body counts as often as XLA knows that it runs, else once.
        """
        name = name or self.entry
        for instruction in self.computations[name].values():
            opcode = instruction.opcode
            if opcode in ("call", "while", "conditional"):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
                for called in instruction.called:
                    yield from self.launched(called, times * int(trips[1] if trips else 1))
            elif opcode not in _FREE and not opcode.endswith("-done"):
                yield instruction, times, name

    def every(self) -> Iterator[tuple[Instruction, int, str]]:
        """`launched`, and after a fusion the instructions in it."""
        for instruction, times, name in self.launched():
            yield instruction, times, name
            yield from self._inside(instruction, times)

    def _inside(
        self, instruction: Instruction, times: int
    ) -> Iterator[tuple[Instruction, int, str]]:
        if instruction.opcode in ("fusion", "async-start"):
            for called in instruction.called:
                for inner in self.computations[called].values():
                    yield inner, times, called
                    yield from self._inside(inner, times)

    def operands(self, instruction: Instruction, computation: str) -> list[Array]:
        """The arrays that an instruction reads."""
        known = self.computations[computation]
        return [a for name in instruction.operands if name in known for a in known[name].arrays]


def _instruction(name: str, text: str) -> Instruction:
    """Reads what follows "NAME = "."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _closing(rest, 0, depth=1)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close]))
    return Instruction(name, arrays(text[:end]), opcode, operands, rest[close + 1 :])


def _closing(text: str, start: int, depth: int = 0) -> int:
    """The place of the parenthesis that closes the first one from `start` on."""
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis: {text}")


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape such as "(f32[8,4]{1,0}, s32[])"."""
    found = []
    for dtype, dims, order, tiles in _SHAPE.findall(shape):
        space = re.search(r"S\((\d+)\)", tiles)
        found.append(Array(dtype, _numbers(dims), _numbers(order), int(space[1]) if space else 0))
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
