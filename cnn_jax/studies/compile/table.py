"""What was compiled, in words: lines for the terminal, a table for RESULTS.md."""

import collections
from collections.abc import Sequence

from cnn_jax.studies.compile.programs import Compiled
from cnn_jax.studies.compile.targets import Target

HEAD = (
    "training step",
    "batch",
    "compiled in s",
    "peak MB",
    "GFLOP",
    "traffic MB",
    "bound us",
    "all-reduces",
    "kernels",
    "convolutions",
    "copies",
    "transpositions",
    "scatters",
)


def lines(compiled: Compiled, target: Target) -> list[str]:
    """What was found in a step's program on one device, line by line, for the terminal."""
    found, memory, rates = compiled.findings, compiled.memory, target.rates
    devices = f"{compiled.devices} device{'s' * (compiled.devices > 1)} of {target.topology}"
    has = f" of {size(rates.memory)}" if rates else ""
    rest = "optimizer and other state" if compiled.name == "training" else "other variables"
    rows = {
        "compiled in": f"{compiled.seconds:.1f} s",
        "peak memory": f"{size(memory.peak)}{has}: arguments {size(memory.arguments)}, temporaries "
        f"{size(memory.temporaries)}",
        "parameters": f"{size(memory.parameters)}, {rest} {size(memory.state)}",
        "arithmetic": f"{number(compiled.flops)}FLOP, {compiled.flops / found.traffic:.1f} a byte of "
        f"the {size(found.traffic)} from and to memory",
        "roofline": _roofline(bounds(compiled, target)) if rates else "",
        "collectives": listed([f"{name} of {size(count)}" for name, count in found.collectives]),
        "kernels": f"{found.kernels:,}, of them {found.fusions:,} fusions",
        "convolutions": convolutions(compiled),
        "other calls": listed([f"{n} {name}" for name, n in found.library.items()]),
        "copies": counted(found.copies),
        "transpositions": counted(found.transpositions),
        "scatters": listed(found.scatters),
        "in place": f"{found.aliased:,} of {compiled.outputs:,} outputs reuse an argument's memory",
        "on the host": listed(found.host),
        "float64": "yes" if found.float64 else "none",
    }
    return [
        f"{compiled.name}, batch {compiled.batch_size:,} on {devices}; on each of them:",
        *(f"  {name:16}{value}" for name, value in rows.items() if value),
    ]


def cells(experiment: str, compiled: Compiled, target: Target) -> list[str]:
    """The training step of an experiment as a row below HEAD."""
    found, parts = compiled.findings, bounds(compiled, target)
    longest = max(parts, key=parts.__getitem__)
    return [
        experiment,
        f"{compiled.batch_size:,}",
        f"{compiled.seconds:.1f}",
        f"{compiled.memory.peak / 1e6:,.0f}",
        f"{compiled.flops / 1e9:,.2f}",
        f"{found.traffic / 1e6:,.1f}",
        f"{1e6 * parts[longest]:,.0f} ({longest})",
        counted([count for _, count in found.collectives]),
        f"{found.kernels:,}",
        convolutions(compiled),
        counted(found.copies),
        counted(found.transpositions),
        listed([source.split()[0] for source in found.scatters]),
    ]


def convolutions(compiled: Compiled) -> str:
    """As in "5 cuDNN (NHWC)": how many, by whom, and the order of their results in memory."""
    found = compiled.findings.convolutions
    return listed([f"{n} {name} ({order})" for (name, order), n in found.items()])


def bounds(compiled: Compiled, target: Target) -> dict[str, float]:
    """The seconds that a step needs at least for each of what it does, at the device's peak rates.

    A roofline: the longest of them is a bound, not a forecast.
    An all-reduce over n devices sends 2 (n - 1) / n of its bytes from each device, any other
    collective at least (n - 1) / n.
    """
    rates, n, found = target.rates, compiled.devices, compiled.findings
    assert rates is not None, "of a device that is described"
    sent = sum(count * (1 + (name == "all-reduce")) for name, count in found.collectives)
    return {
        "arithmetic": compiled.flops
        / rates.arithmetic(compiled.compute_dtype, compiled.matmul_precision),
        "memory": found.traffic / rates.memory_bandwidth,
        "exchange": sent * (n - 1) / n / rates.interconnect_bandwidth,
    }


def _roofline(parts: dict[str, float]) -> str:
    longest = max(parts, key=parts.__getitem__)
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
    return f"at least {duration(parts[longest])} a step ({each})"


def counted(sizes: Sequence[int]) -> str:
    """[1000, 2000] bytes -> "2 (3 kB)"; "none" of nothing."""
    return f"{len(sizes):,} ({size(sum(sizes))})" if sizes else "none"


def listed(names: Sequence[str]) -> str:
    """["a", "b", "a"] -> "2 x a, b"; "none" of nothing."""
    counts = collections.Counter(names)
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items()) or "none"


def size(count: float) -> str:
    """Bytes: 2345678 -> "2.35 MB"."""
    return f"{number(count)}B"


def duration(seconds: float) -> str:
    """0.0000123 -> "12.3 us"."""
    return f"{number(seconds)}s"


def number(value: float) -> str:
    """Three digits and a prefix: 2345678 -> "2.35 M"."""
    if not value:
        return "0 "
    prefixes = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "u", 1e-9: "n"}
    scale = next((scale for scale in prefixes if value >= 0.9995 * scale), 1e-9)
    return f"{value / scale:.3g} {prefixes[scale]}"
