"""The GPUs of this machine: which CUDA shows, how processes share them, which JAX does not use."""

import ctypes
import functools
import importlib.util
import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from cnn_jax import CHECKOUT, PROGRAM
from cnn_jax.common.errors import ConfigError

log = logging.getLogger(__name__)

# JAX looks for a GPU only if one of these exists: Linux, containers, WSL.
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


@functools.cache
def tell_unused() -> None:
    """Warns once if nvidia-smi shows a GPU but JAX uses the CPU and the user did not choose it.

    Starts JAX's backend.
    """
    chosen = jax.config.jax_platforms or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if chosen or jax.default_backend() != "cpu":
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no driver, or a broken one
        return
    if shown.returncode == 0 and shown.stdout.strip():
        name, _, driver = shown.stdout.splitlines()[0].partition(", ")
        log.warning(
            "warning: nvidia-smi shows %s (driver %s), but JAX computes on the CPU: %s. "
            "Set JAX_PLATFORMS=cpu to hide this line.",
            name,
            driver,
            _reason(),
        )


def _reason() -> str:
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        command = f"{PROGRAM} setup" if CHECKOUT else "pip install 'jax[cuda13]' (or cuda12)"
        return f"JAX is installed without CUDA; {command} adds it"
    if not any(Path(name).exists() for name in DEVICE_FILES):
        return f"{DEVICE_FILES[0]} does not exist; a container must be started with its GPUs"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return " ".join(str(error).split()).removesuffix(".")
    return "JAX prefers the CPU"


def visible() -> list[str]:
    """The identities (UUID, in hex) of the GPUs that CUDA shows to this process, in CUDA's order.

    Unlike JAX's list, it does not start JAX's backend, after which JAX cannot be told which to use.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return []
    count, device, identity = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for i in range(count.value):
        cuda.cuDeviceGet(ctypes.byref(device), i)
        cuda.cuDeviceGetUuid_v2(identity, device)  # of a part of a GPU too
        found.append(identity.raw.hex())
    return found


def share(seen: Sequence[Sequence[str]], process: int) -> list[int] | None:
    """Which of the GPUs that it sees a process uses, so that each GPU has one process.

    Schedulers show a process all GPUs of the machine, or only its own.

    Args:
      seen: by process, the identities from `visible`.
      process: the number of the process.

    Returns:
      Their places in seen[process]; None for all.

    Raises:
      ConfigError: they cannot be shared out evenly.
    """
    mine = seen[process]
    sharing = [i for i, other in enumerate(seen) if set(other) & set(mine)]
    if len(sharing) < 2:
        return None
    each, left = divmod(len(mine), len(sharing))
    if left or any(set(seen[i]) != set(mine) for i in sharing):
        counts = ", ".join(f"process {i} sees {len(seen[i])}" for i in sharing)
        raise ConfigError(
            f"{len(sharing)} processes of one machine cannot share its GPUs evenly ({counts}, some of "
            "them the same): start one process for each GPU, or one for each machine"
        )
    # Sorted, because CUDA's order may differ from process to process.
    first = sharing.index(process) * each
    return sorted(mine.index(identity) for identity in sorted(mine)[first : first + each])
