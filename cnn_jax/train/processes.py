"""Several processes of one run: how a process joins, and the error line when one is lost."""

import contextlib
import ctypes
import os
import re
import signal
import threading
from collections.abc import Iterator

import jax
from jax._src import distributed  # its store of keys, which jax.distributed does not show

from cnn_jax.common.errors import CnnJaxError, ConfigError
from cnn_jax.train import parallel

_ADVICE = (
    "its own last lines say why. Start all processes again with the same commands: the run goes on "
    "from its newest checkpoint"
)
_HANDLERS: list = []


def start_processes(coordinator: str, processes: int, process: int, heartbeat_seconds: int) -> None:
    """Joins this process to the others of one run; call it before the first JAX computation.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: which one this is, from 0.
      heartbeat_seconds: silence after which one is taken for dead, and the others end.

    Raises:
      ConfigError: the three do not go together.
    """
    if processes < 1:
        raise ConfigError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process}: must be from 0 to {processes - 1}")
    if not re.fullmatch(r".+:[0-9]+", coordinator or ""):
        raise ConfigError(f"--coordinator={coordinator or ''}: must be host:port of process 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds
    )
    # The first exchange connects them, for which Gloo gives 30 seconds: now, while they are together.
    # Later, one may still be decoding images.
    parallel.largest(0)
    _add_last_line_to_aborts()


def _add_last_line_to_aborts() -> None:
    """Has a line printed where JAX aborts this process.

    It does so from a thread in C++, after a page about its reason, where another process is silent or
    the coordinator cannot be reached. Python's own handlers run between two bytecodes of the main
    thread, which is too late.
    """
    lost = "another is gone, which the lines above name"
    if jax.process_count() == 2:
        lost = f"process {1 - jax.process_index()} is gone"
    line = f"error: JAX ended this process, most likely because {lost}; {_ADVICE}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def print_line(_: int) -> None:
        os.write(2, line)
        os._exit(CnnJaxError.exit_code)

    _HANDLERS.append(print_line)  # C keeps no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, print_line)


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Says which process is gone, and what to do, where an exchange with the others fails.

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
            f"gone: process {lost} of the {jax.process_count()} of this run; {_ADVICE}"
        ) from error


def _missing() -> list[int]:
    """The processes that do not answer a roll call, which all others hold at the same time."""
    me, everyone = jax.process_index(), set(range(jax.process_count()))
    if len(everyone) == 2:
        return sorted(everyone - {me})
    client, pause = distributed.global_state.client, threading.Event()
    missing = {0}
    with contextlib.suppress(Exception):  # no answer from process 0, which keeps the list
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
