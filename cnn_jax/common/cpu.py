"""The processor: its name for tables and records, its instruction sets, the usable cores."""

import os
import platform
from pathlib import Path

import jaxlib

_CPUINFO = Path("/proc/cpuinfo")


def cores() -> int:
    """How many cores this process may use; taskset and batch systems can limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def features() -> set[str]:
    """Its instruction sets, by the kernel's names; empty if the kernel does not list them."""
    lines = _cpuinfo()
    return {
        word for line in lines if line.startswith(("flags", "Features")) for word in line.split()
    }


def multiplies_bfloat16() -> bool:
    """Whether XLA can multiply bfloat16 in hardware: by AVX512_BF16 or AMX, through oneDNN.

    Versions of jaxlib before 0.12 contain oneDNN and do not use it.
    """
    version = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    return version >= (0, 12) and bool({"avx512_bf16", "amx_bf16"} & features())


def identity() -> str:
    """Name and instruction sets, which must be equal for a compiled program to run."""
    keys = ("model name", "flags", "Features", "CPU part")
    lines = sorted({line for line in _cpuinfo() if line.startswith(keys)})
    return "\n".join(lines) or f"{platform.machine()} {platform.processor()}"


def description() -> str:
    """`name` and the number of usable cores."""
    return f"{name()}, {cores()} core" + ("" if cores() == 1 else "s")


def name() -> str:
    """Its name, family and instruction sets."""
    facts: dict[str, str] = {}
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    about = []
    if "cpu family" in facts:
        about.append(f"family {facts['cpu family']} model {facts.get('model', '?')}")
    known = {"avx2": "AVX2", "avx512f": "AVX-512"}
    sets = [name for feature, name in known.items() if feature in features()]
    about += [", ".join(sets)] if sets else []
    name = facts.get("model name") or platform.processor() or platform.machine() or "unknown"
    return f"{name} ({'; '.join(about)})" if about else name


def _cpuinfo() -> list[str]:
    try:
        return _CPUINFO.read_text().splitlines()
    except OSError:  # not Linux
        return []
