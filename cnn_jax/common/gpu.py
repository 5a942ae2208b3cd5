"""Warns about a GPU that JAX does not use."""

import functools
import importlib.util
import logging
import os
import subprocess
from pathlib import Path

import jax

from cnn_jax import CHECKOUT, PROGRAM

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
