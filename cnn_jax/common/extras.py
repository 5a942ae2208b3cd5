"""Packages that only some commands need, and that are installed when they do."""

import importlib.util
import logging
import os
import sys

import jax

from cnn_jax.common.errors import DataError

log = logging.getLogger(__name__)


def require_tensorflow(purpose: str, install: bool) -> None:
    """Returns where TensorFlow can be imported.

    Else ./launch.sh, if it started this program, installs TensorFlow and starts the program again with
    the same arguments: an environment is not changed under a running program.

    Args:
      purpose: what needs it, the beginning of the error's line.
      install: whether it may be installed, as --download says.

    Raises:
      DataError: it is missing and may not or cannot be installed; names the command that does.
    """
    if importlib.util.find_spec("tensorflow"):
        return
    launcher = os.environ.get("CNN_JAX_LAUNCHER")  # launch.sh sets it unless it has just tried
    alone = not jax.distributed.is_initialized()  # the other processes of a run would wait in vain
    if launcher and install and alone:
        log.info("%s needs TensorFlow, which is installed now", purpose)
        sys.stdout.flush()
        os.execv(launcher, [launcher, "--with=prepare", *sys.argv[1:]])
    command = (
        f"{launcher} setup --with=prepare"
        if launcher
        else f"{sys.executable} -m pip install tensorflow"
    )
    raise DataError(f"{purpose} needs TensorFlow, which is not installed; install it: {command}")
