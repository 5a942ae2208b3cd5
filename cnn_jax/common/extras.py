"""TensorFlow, which only some datasets need, is added when one of them is asked for."""

import logging
import os
import sys

import jax

log = logging.getLogger(__name__)


def add_tensorflow() -> None:
    """Starts this program again, with TensorFlow, where ./launch.sh started it; else returns.

    ./launch.sh installs TensorFlow and then runs the same command in this process's place: packages
    are not changed under a running program. One process of several returns: the others would wait for
    it in vain.
    """
    launcher = os.environ.get("CNN_JAX_LAUNCHER")  # not set where launch.sh has just added it
    if launcher and not jax.distributed.is_initialized():
        log.info("TensorFlow is needed, and is installed now")
        sys.stdout.flush()
        os.execv(launcher, [launcher, "--with=prepare", *sys.argv[1:]])
