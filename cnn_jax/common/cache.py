"""Where results that can be made again are kept between runs: decoded datasets, compiled programs.

CNN_JAX_CACHE_DIR names the folder, by default ~/.cache/cnn_jax (XDG_CACHE_HOME is honoured);
CNN_JAX_CACHE=off writes and reads nothing but the embedded dataset.
"""

import hashlib
import os
from pathlib import Path

import jax
import jaxlib

from cnn_jax.common import cpu


def cache_dir() -> Path:
    """The cache's folder; it need not exist."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CNN_JAX_CACHE_DIR") or home / "cnn_jax").absolute()


def cache_enabled() -> bool:
    return os.environ.get("CNN_JAX_CACHE", "on").lower() not in ("off", "0", "false")


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs between runs. Call it before the first JAX computation.

    The folder is named after the processor: a program compiled for AVX-512 and read on a machine
    without it, from a shared home, would crash or run wrongly.
    """
    if not cache_enabled() or jax.config.jax_compilation_cache_dir:
        return
    machine = hashlib.sha256(cpu.identity().encode()).hexdigest()[:12]
    folder = cache_dir() / "compiled" / f"jaxlib-{jaxlib.__version__}-{machine}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small networks compile in less than the default of one second, several times a run.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
