"""The cache of results that can be computed again: decoded datasets, compiled programs.

CNN_JAX_CACHE_DIR names the folder; the default is ~/.cache/cnn_jax, or XDG_CACHE_HOME/cnn_jax. With
CNN_JAX_CACHE=off, only the embedded dataset is written and read.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

from cnn_jax.common import cpu
from cnn_jax.common.files import user_path

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The cache's folder; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get("CNN_JAX_CACHE_DIR") or f"{home}/cnn_jax").absolute()


def cache_enabled() -> bool:
    return os.environ.get("CNN_JAX_CACHE", "on").lower() not in ("off", "0", "false")


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs between runs. Call it before the first JAX computation.

    Each type of processor has its own folder, because machines can share a home folder: a program
    compiled for AVX-512 would crash or run wrongly on a machine without it.
    """
    if not cache_enabled() or jax.config.jax_compilation_cache_dir:
        return
    machine = hashlib.sha256(cpu.identity().encode()).hexdigest()[:12]
    folder = cache_dir() / "compiled" / f"jaxlib-{jaxlib.__version__}-{machine}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The default minimum is one second; small networks compile faster, but several times a run.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    warnings.showwarning = _Mending(folder, warnings.showwarning)


class _Mending:
    """Shows JAX's warnings about the compilation cache in `folder` as one line; repairs the cache.

    JAX keeps an entry that it cannot read, and warns about it at every start. JAX writes the entry
    again if it is removed. The warning names the program, and its entries' names begin with that.
    """

    def __init__(self, folder: Path, show: Callable[..., None]):
        self._folder, self._show, self._told = folder, show, False

    def __call__(self, message: Warning | str, *place: Any, **options: Any) -> None:
        start = r"Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)"
        found = re.match(start, str(message), re.DOTALL)
        if not found:
            self._show(message, *place, **options)
            return
        if found[1] == "writing" and "std::bad_alloc" in found[3]:
            return  # jaxlib has no form for a program that calls oneDNN: it is compiled at each start
        entries = [*self._folder.glob(f"{found[2]}-*-cache")] if found[1] == "reading" else []
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        if not self._told:
            what = (
                "a damaged entry is removed; its program is compiled anew"
                if entries
                else "cannot be used; set CNN_JAX_CACHE_DIR to another folder, or CNN_JAX_CACHE=off"
            )
            reason = " ".join(found[3].split())[:120]
            log.warning("warning: compilation cache %s: %s (%s)", self._folder, what, reason)
        self._told = True
