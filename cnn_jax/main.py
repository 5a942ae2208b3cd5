"""./launch.sh COMMAND --flags: one command, one function call, one exit code."""

import logging
import os
import sys
from collections.abc import Sequence

from absl import flags
from absl import logging as absl_logging

from cnn_jax import cache, commands
from cnn_jax.errors import CnnJaxError, ConfigError

log = logging.getLogger("cnn_jax")


def main(argv: Sequence[str]) -> int:
    """Runs `argv[0]` with the flags after it; returns the process's exit code."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.ERROR)
    debug = "--debug" in argv
    try:
        name, *rest = argv or ["help"]
        if name in ("help", "--help", "-h"):
            print(commands.overview())
            return 0
        command = commands.find(name)
        if {"--help", "-h"} & set(rest):
            print(command.usage())
            return 0
        values = command.parse(rest)
        cache.enable_compilation_cache()
        return command.run(values) or 0
    except CnnJaxError as error:
        if debug:
            raise
        log.error("error: %s", error)
        return error.exit_code
    except flags.Error as error:
        log.error("error: %s", ConfigError(" ".join(str(error).split())))
        return ConfigError.exit_code
    except BrokenPipeError:  # `./launch.sh list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        log.error("error: interrupted")
        return 130
    except Exception as error:
        if debug:
            raise
        log.error("error: %s: %s (--debug shows where)", type(error).__name__, error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
