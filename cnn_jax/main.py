"""./launch.sh COMMAND --flags: one command, one function call, one exit code."""

import os
import signal
import sys

if __name__ == "__main__":  # for the imports below, until `run` sets its own handler
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

import logging
import re
from collections.abc import Sequence

from absl import logging as absl_logging

from cnn_jax.common import environment
from cnn_jax.common.errors import CnnJaxError
from cnn_jax.train import signals

log = logging.getLogger("cnn_jax")


def main(argv: Sequence[str]) -> int:
    """Runs `argv[0]` with the flags after it; returns the process's exit code."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    # Errors in Orbax's threads are raised here too, and printed in one line.
    absl_logging.set_verbosity(absl_logging.FATAL)
    # Of several writes that fail at once Orbax raises the first; asyncio prints the others.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    debug = any(re.fullmatch(r"--?debug(=(true|t|1))?", text, re.IGNORECASE) for text in argv)
    code = 128 + signal.SIGPIPE  # if the reader of our output closes it early
    try:
        environment.import_jax()
        from cnn_jax.cli import commands
        from cnn_jax.common import cache, malloc

        name, *rest = argv or ["help"]
        if name in ("help", "--help", "-h"):
            print(commands.overview())
            return 0
        command = commands.find(name)
        if {"--help", "-h"} & set(rest):
            print(command.usage())
            return 0
        values = command.parse(rest)
        environment.check_xla_flags()
        cache.enable_compilation_cache()
        malloc.keep_freed()
        malloc.compute_in_calling_thread()
        code = command.run(values) or 0
        sys.stdout.flush()
        return code
    except CnnJaxError as error:
        log.error("error: %s", _one_line(error), exc_info=debug)
        return error.exit_code
    except BrokenPipeError:  # `./launch.sh list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code
    except KeyboardInterrupt:
        log.error("error: interrupted")
        return 130
    except Exception as error:
        hint = "" if debug else " (--debug shows where)"
        kind = type(error).__name__
        log.error("error: %s: %s%s", kind, _one_line(error), hint, exc_info=debug)
        return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _on_unraisable(stray: "sys.UnraisableHookArgs") -> None:
    """Drops the tracebacks of callbacks after a failed save; `main` prints why it failed.

    Orbax stops at the first failure. Each unfinished write then finds the event loop closed and
    prints a traceback.
    """
    if str(stray.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(stray)


def _end(code: int) -> None:
    """Ends this process, which may be one of several of a run.

    If it fails alone, the others wait for it. JAX's shutdown would wait for the others, for minutes.
    Without a shutdown they notice the missing heartbeat sooner.
    """
    parallel = sys.modules.get("cnn_jax.train.parallel")  # not imported: there are no others
    alone = code not in (0, *signals.EXIT_CODES.values())
    if alone and parallel and parallel.is_one_of_several():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def run() -> None:
    """The entry point of `cnn_jax`, `python -m cnn_jax` and ./launch.sh."""
    sys.unraisablehook = _on_unraisable
    signals.end_at_once()
    environment.take_any_text()
    _end(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
