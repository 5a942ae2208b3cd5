"""What a compiled program contains: kernels, traffic, collectives, convolutions, copies, scatters."""

import collections
import dataclasses
import re

from cnn_jax.studies.compile import hlo

# On a TPU, copies into the memory on the chip, beside the computation.
_PREFETCHES = ("copy-start", "slice-start")
_LETTERS = {"b": "N", "f": "C", "0": "H", "1": "W"}
# What JAX puts between the names of a layer and of its operation.
_WRAPPERS = re.compile(r"cond|branch_\d+_fun|transpose\(\)|jvp\(\)|custom_\w+")


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of one step on one device.

    Attributes:
      kernels: how many operations on arrays the device runs, fusions included; prefetches into faster
        memory, which run beside them, are none.
      fusions: of them, those that XLA fused from several operations.
      traffic: bytes that the kernels read from and write to the device's main memory.
      collectives: (name, bytes) of each exchange between devices.
      convolutions: how often, by who computes them and by the order in memory, as in
        ("cuDNN", "NHWC").
      library: calls of libraries by name, without those convolutions.
      copies: the bytes of each copy of an array, without prefetches.
      transpositions: of those, and of transpositions, that change the order in memory.
      scatters: where each is from, as in "MaxPool_0 select_and_scatter".
      host: the exchanges with the host's memory.
      aliased: how many outputs reuse the memory of an argument.
      float64: whether there are arrays of 64-bit floating-point numbers.
    """

    kernels: int
    fusions: int
    traffic: int
    collectives: tuple[tuple[str, int], ...]
    convolutions: dict[tuple[str, str], int]
    library: dict[str, int]
    copies: tuple[int, ...]
    transpositions: tuple[int, ...]
    scatters: tuple[str, ...]
    host: tuple[str, ...]
    aliased: int
    float64: bool


def find(program: hlo.Program) -> Findings:
    """Reads a program."""
    kernels = fusions = traffic = 0
    collectives, scatters, host = [], [], []
    copies, transpositions = [], []
    convolutions: collections.Counter[tuple[str, str]] = collections.Counter()
    library: collections.Counter[str] = collections.Counter()
    for instruction, times, name in program.launched():
        is_fusion = instruction.opcode == "fusion"
        is_scalar = not any(array.dims for array in instruction.arrays)
        if is_fusion or not (is_scalar or instruction.opcode in _PREFETCHES):
            kernels += times
        fusions += times * is_fusion
        results = _results(instruction)
        moved = [*results, *program.operands(instruction, name)]
        if instruction.kind in ("slice", "dynamic-slice"):  # reads no more than it returns
            moved = [*results, *(dataclasses.replace(array, space=0) for array in results)]
        traffic += times * sum(array.bytes for array in moved if not array.space)
        if instruction.kind in hlo.COLLECTIVES:
            collectives += [(instruction.kind, sum(array.bytes for array in results))] * times
    for instruction, times, name in program.every():
        kind, source = instruction.kind, source_of(instruction.op_name)
        target = instruction.attribute("custom_call_target")
        if _is_on_host(instruction, target):
            host.append(target or kind)
        if layout := _convolution(instruction):
            convolutions[_library(target) or "XLA", layout] += times
        elif target and _library(target):
            library[_library(target)] += times
        elif kind in ("scatter", "select-and-scatter"):
            scatters += [source] * times
        elif instruction.opcode in ("copy", "transpose") and _extents(instruction.arrays[0]):
            size = instruction.arrays[0].bytes
            copies += [size] * times * (kind == "copy")
            transpositions += [size] * times * _reorders(program, instruction, name)
    return Findings(
        kernels,
        fusions,
        traffic,
        tuple(collectives),
        dict(convolutions),
        dict(library),
        tuple(copies),
        tuple(transpositions),
        tuple(scatters),
        tuple(host),
        program.aliased,
        program.has_float64,
    )


def source_of(op_name: str) -> str:
    """ "jit(f)/transpose(jvp(LeNet))/MaxPool_1/cond/scatter" -> "MaxPool_1 scatter"."""
    parts = [p for p in re.split(r"/", op_name) if not _WRAPPERS.fullmatch(p)]
    names = [part.rstrip(")").rpartition("(")[2] for part in parts]
    return " ".join(names[-2:]) or "(made by XLA)"


def _results(instruction: hlo.Instruction) -> tuple[hlo.Array, ...]:
    """The results, without the operands that the start of an asynchronous operation hands on."""
    arrays = instruction.arrays
    if instruction.opcode == "copy-start":  # (copy, original, context)
        return arrays[:1]
    if instruction.opcode == "slice-start":  # (original, slice, context)
        return arrays[1:2]
    if instruction.opcode.endswith("-start"):
        return arrays[len(arrays) // 2 :]
    return arrays


def _is_on_host(instruction: hlo.Instruction, target: str) -> bool:
    moves = instruction.kind in ("infeed", "outfeed", "send", "recv") or "callback" in target
    # XLA's number of the host's memory.
    return moves or "MoveTo" in target or any(array.space == 5 for array in instruction.arrays)


def _library(target: str) -> str:
    """The library that a custom call calls, "" for code of XLA's own."""
    known = {"__cudnn": "cuDNN", "__cublas": "cuBLAS", "__onednn": "oneDNN", "__eigen": "Eigen"}
    return next((name for start, name in known.items() if target.startswith(start)), "")


def _convolution(instruction: hlo.Instruction) -> str:
    """The order in memory of a convolution's result, as in "NHWC"; "" of a matmul."""
    labels = instruction.attribute("dim_labels")
    if not re.search(r"\d", labels):
        return ""
    # "b01f_o01i->b01f" names the dimensions of image, kernel and result. Without a library, a kernel's
    # gradient is a convolution of the channels, "f01b_i01o->01bf".
    array = instruction.arrays[0]
    match = re.match(r"(\w+)_(\w+)->(\w+)", labels)
    assert match is not None, labels
    image, _, result = match.groups()
    letters = [_LETTERS.get(label, label) for label in result]
    if len(letters) != len(array.order) or image == "f01b":
        letters = []
    return (
        "".join(letters[place] for place in reversed(array.order)) if letters else "kernel gradient"
    )


def _extents(array: hlo.Array) -> list[int]:
    """The dimensions of which there is more than one place, from the one that changes slowest."""
    return [place for place in reversed(array.order) if array.dims[place] > 1]


def _reorders(program: hlo.Program, instruction: hlo.Instruction, computation: str) -> bool:
    """Whether a copy or a transposition changes the order in memory."""
    operands = program.operands(instruction, computation)
    if not operands:
        return False
    before, after = _extents(operands[0]), _extents(instruction.arrays[0])
    if instruction.opcode == "transpose":
        match = re.search(r"dimensions=\{([\d,]*)\}", instruction.text)
        assert match is not None, instruction.text
        order = match[1].split(",")
        after = [int(order[place]) for place in after]
    return before != after
