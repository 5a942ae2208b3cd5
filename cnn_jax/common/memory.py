"""The memory that this process may still take."""

import os
import resource
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What the machine, a container or batch system (cgroup), and `ulimit -v` leave.

    Files that the kernel keeps in memory count as available, as it drops them when needed.
    """
    left = [_machine()]
    limit = _number(_CGROUP / "memory.max")  # of a container; None if there is none
    used = _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        left.append(limit - used + _fields(_CGROUP / "memory.stat").get("inactive_file", 0))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        left.append(limit - _fields(_PROC / "self/status").get("VmSize", 0) * 1024)
    return max(0, min(left))


def _machine() -> int:
    kilobytes = _fields(_PROC / "meminfo").get("MemAvailable")
    if kilobytes is None:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return kilobytes * 1024


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file with lines such as "MemAvailable:  123 kB"."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
