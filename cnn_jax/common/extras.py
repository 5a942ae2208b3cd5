"""Packages that only some runs need: what adds them."""

import logging
import os
import sys

from cnn_jax import CHECKOUT, PROGRAM

log = logging.getLogger(__name__)


def command_that_adds(extra: str) -> str:
    """The command that installs an extra of setup.cfg."""
    return f"{PROGRAM} setup --with={extra}" if CHECKOUT else f"pip install 'cnn_jax[{extra}]'"


def add_tensorflow() -> None:
    """Restarts this program with TensorFlow if ./launch.sh started it; otherwise returns.

    ./launch.sh replaces this process, installs TensorFlow and runs the same command again, because
    packages must not change under a running program. In a run of several processes this function
    returns, because the other processes would wait forever.
    """
    import jax  # not at the top: processes that only decode images import this file

    launcher = os.environ.get("CNN_JAX_LAUNCHER")  # not set if launch.sh has just added it
    if launcher and not jax.distributed.is_initialized():
        log.info("TensorFlow is needed, and is installed now")
        sys.stdout.flush()
        os.execv(launcher, [launcher, "--with=prepare", *sys.argv[1:]])
