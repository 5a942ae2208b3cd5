"""Several processes of one run: how a process joins, and the error line when one is lost."""

import contextlib
import ctypes
import os
import re
import signal
import threading
from collections.abc import Iterator

import jax
from jax._src import distributed  # its key-value store is not public in jax.distributed

from cnn_jax.common.errors import CnnJaxError, ConfigError
from cnn_jax.train import parallel

_ADVICE = (
    "its own last lines say why. Start all processes again with the same commands: the run "
    "continues from its newest checkpoint"
)
_HANDLERS: list = []


def start_processes(coordinator: str, processes: int, process: int, heartbeat_seconds: int) -> None:
    """Joins this process to the others of one run; call it before the first JAX computation.

    Args:
      coordinator: host:port of process 0.
      processes: their number.
      process: the number of this one, from 0.
      heartbeat_seconds: a process that is silent for so long counts as dead; the others end.

    Raises:
      ConfigError: coordinator or process is invalid.
    """
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process}: must be from 0 to {processes - 1}")
    if not re.fullmatch(r".+:[0-9]+", coordinator or ""):
        raise ConfigError(f"--coordinator={coordinator or ''}: must be host:port of process 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds
    )
    # The first exchange connects the processes. Gloo allows 30 seconds for that, which is too short
    # later, when one process may still decode images.
    parallel.largest(0)
    _add_last_line_to_aborts()


def _add_last_line_to_aborts() -> None:
    """Prints a last line when JAX aborts this process.

    JAX aborts it in a C++ thread, after a long message, if another process is silent or the
    coordinator cannot be reached. Python's handlers would be too late: they run between two
    bytecodes of the main thread.
    """
    lost = "another process has ended (the lines above name it)"
    if jax.process_count() == 2:
        lost = f"process {1 - jax.process_index()} has ended"
    line = f"error: JAX ended this process, most likely because {lost}; {_ADVICE}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def print_line(_: int) -> None:
        os.write(2, line)
        os._exit(CnnJaxError.exit_code)

    _HANDLERS.append(print_line)  # C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, print_line)


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """If an exchange with the other processes fails, names the lost one and says what to do.

    Raises:
      CnnJaxError: names the process.
    """
    try:
        yield
    except Exception as error:
        if not (
            parallel.is_one_of_several() and re.search(r"\b(gloo|nccl)", str(error), re.IGNORECASE)
        ):
            raise
        lost = ", ".join(map(str, _missing()))
        raise CnnJaxError(
            f"process {lost} of the {jax.process_count()} processes of this run has ended; {_ADVICE}"
        ) from error


def _missing() -> list[int]:
    """The processes that do not answer a roll call; all others must call this at the same time."""
    me, everyone = jax.process_index(), set(range(jax.process_count()))
    if len(everyone) == 2:
        return sorted(everyone - {me})
    client, pause = distributed.global_state.client, threading.Event()
    missing = {0}
    with contextlib.suppress(Exception):  # process 0, which keeps the list, may be lost
        client.key_value_set(f"cnn_jax/roll_call/{me}", "here")
        for _ in range(50):
            here = client.key_value_dir_get("cnn_jax/roll_call")
            missing = everyone - {int(key.rpartition("/")[2]) for key, _ in here}
            if len(missing) == 1:
                break
            pause.wait(0.1)
        if me == 0:
            pause.wait(1)  # until the others have read the list
    return sorted(missing)
