"""Checks the environment of Python, JAX and XLA before a bad value can stop them."""

import difflib
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxlib

from cnn_jax.common.errors import ConfigError

# XLA ends any process in which it reads wrong flags.
_READ_XLA_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"


def take_any_text() -> None:
    """Lets standard output and standard error take every character, and be closed.

    An ASCII or Latin-1 stream shows a class name in another script as \\u escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller, as in `./launch.sh list >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def import_jax() -> None:
    """Imports JAX, which reads its environment variables at import.

    Raises:
      ConfigError: JAX does not accept the value of one of them.
    """
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise ConfigError(f"JAX refuses an environment variable: {error}") from error


def check_devices() -> None:
    """Starts JAX on the platform of JAX_PLATFORMS, or else on the best available one.

    Raises:
      ConfigError: JAX cannot start on the platform that JAX_PLATFORMS names.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        if not asked:
            raise
        reason = " ".join(str(error).split()).removesuffix(
            " (set JAX_PLATFORMS='' to automatically choose an available backend)"
        )
        raise ConfigError(
            f"JAX_PLATFORMS={asked}: JAX cannot start on this platform "
            f"({reason or 'the packages for it are not installed'}); set JAX_PLATFORMS=cpu, or unset "
            "it: then JAX chooses the best platform"
        ) from error


def check_xla_flags() -> None:
    """Refuses flags for which XLA would end the process, with a page of text, when JAX starts.

    XLA has no function that checks flags. A subprocess tries them, which takes a third of a second;
    it is skipped if XLA_FLAGS is not set.

    Raises:
      ConfigError: a flag is unknown (names the nearest known one) or its value is wrong.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    if not given:
        return
    if not given[0].startswith("-"):  # XLA takes it as the name of a file
        raise ConfigError(f"XLA_FLAGS={given[0]}: must be flags, which start with --")
    tried = subprocess.run(
        [sys.executable, "-P", "-c", _READ_XLA_FLAGS],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if tried.returncode == 0:
        return
    if found := re.search(r"Unknown flags? in XLA_FLAGS: (.*)", tried.stderr):
        raise ConfigError(
            f"XLA_FLAGS: this version of XLA does not know {found[1]}{_nearest(found[1])}"
        )
    if found := re.search(r"Couldn't interpret value (.*) for flag (\w+)", tried.stderr):
        raise ConfigError(f"XLA_FLAGS: --{found[2]}={found[1]}: XLA does not accept this value")
    if "parse_flags_from_env" in tried.stderr:
        raise ConfigError(
            f"XLA_FLAGS={' '.join(given)}: must be flags that this version of XLA knows"
        )


def _nearest(flags: str) -> str:
    """The known flags most similar to these, as the end of a message; empty if there are none.

    XLA prints only a part of its list. Its libraries contain the names of all flags.
    """
    known = set()
    for library in Path(jaxlib.__file__).parent.glob("*.so"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            known |= {name.decode() for name in re.findall(rb"xla_[a-z0-9_]+(?=\0)", text)}
    names = [flag.lstrip("-").partition("=")[0] for flag in flags.split()]
    near = [difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in names]
    shown = ", ".join(f"--{name}" for names in near for name in names)
    return f"; nearest: {shown}" if shown else ""
