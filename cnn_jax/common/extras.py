"""Packages that only some runs need."""

import importlib.util
import logging
import os
import sys

from cnn_jax import CHECKOUT, PROGRAM
from cnn_jax.common.errors import ConfigError

log = logging.getLogger(__name__)


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


def missing(package: str, extra: str = "") -> str:
    """The end of a message: what is needed, and the command that adds it.

    Args:
      package: its name, as the user knows it.
      extra: the name in setup.cfg of what has it; "" if nothing of this project does.
    """
    adds = f"{PROGRAM} setup --with={extra}" if CHECKOUT else f"pip install 'cnn_jax[{extra}]'"
    return f"needs {package}, which is missing" + f"; {adds} adds it" * bool(extra)


def need(module: str, flag: str, extra: str) -> None:
    """Checks that a package of an extra of setup.cfg is installed.

    Args:
      module: the name by which it is imported.
      flag: what needs it, for the message.
      extra: the name in setup.cfg.

    Raises:
      ConfigError: it is missing; names the command that adds it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a folder of that name, as W&B leaves where it ran
        raise ConfigError(f"{flag}: {missing(module, extra)}")
