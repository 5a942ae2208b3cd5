"""The last line of a process when another one of its run is lost: it names the lost one."""

import atexit
import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cnn_jax.common.errors import CnnJaxError, ConfigError
from cnn_jax.train import parallel

_CONTINUES = "the run continues from its newest checkpoint"
_ADVICE = (
    f"its own last lines say why. Start all processes again with the same commands: {_CONTINUES}"
)


class Watch:
    """Notes when each process was last alive, in JAX's key-value store, which process 0 keeps.

    JAX ends a process whose companion is silent, and tells which one only in a page of text.

    Attributes:
      beat: seconds between two signs of life.
    """

    def __init__(self, client: Any, process: int, processes: int, heartbeat_seconds: float):
        """Args:
        client: of the store.
        process: the number of this process.
        processes: how many there are.
        heartbeat_seconds: the silence after which JAX counts a process as dead.
        """
        self._client, self.process, self.processes = client, process, processes
        self.beat = heartbeat_seconds / 8
        self._counts = dict.fromkeys(set(range(processes)) - {process}, "")
        self._alive = dict.fromkeys(self._counts, time.monotonic())
        self._asked = 0.0  # when, if the store has not answered yet
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Watches until this process ends."""
        self._thread.start()
        atexit.register(self._stop)  # runs before JAX disconnects, which is registered earlier

    def lost(self) -> list[int]:
        """The processes that have been silent longest, and too long; empty if there is none."""
        now = time.monotonic()
        if self._asked and now - self._asked > 2 * self.beat:
            return [0]
        longest = min(self._alive.values())
        if now - longest < 4 * self.beat:
            return []
        return sorted(i for i, seen in self._alive.items() if seen < longest + self.beat)

    def line(self, lost: list[int]) -> str:
        """The last line; of two processes it is the other one that is lost."""
        names = [1 - self.process] if self.processes == 2 else lost
        return (
            f"process {' and '.join(map(str, names))} of the {self.processes} processes of this run "
            f"has ended; {_ADVICE}"
        )

    def line_at_abort(self) -> str:
        """The last line if JAX aborts this process.

        It does so at once, before anybody is silent too long, for two reasons. A process that joins
        with a number that is taken makes JAX end all, process 0 too. And the end of process 0, the
        coordinator, ends the others.
        """
        lost = self.lost()
        if self.process == 0 and not lost:
            return (
                "two processes of this run have the same --process, or one was started again while the "
                f"others went on. End all, and start each once, with its own --process: {_CONTINUES}"
            )
        return self.line(lost or [0])

    def _stop(self) -> None:
        self._end.set()
        self._thread.join(self.beat)

    def _run(self) -> None:
        count = 0
        while not self._end.wait(self.beat):
            count += 1
            self._asked = time.monotonic()
            # If process 0 cannot be reached, `_asked` remains.
            with contextlib.suppress(Exception):
                key = f"cnn_jax/alive/{self.process}"
                self._client.key_value_set(key, str(count), allow_overwrite=True)
                self._note(self._client.key_value_dir_get("cnn_jax/alive"))
                self._asked = 0.0
            if self._asked:
                return

    def _note(self, entries: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, count in entries:
            process = int(key.rpartition("/")[2])
            if count != self._counts.get(process, count):
                self._counts[process], self._alive[process] = count, now


_WATCHES: list[Watch] = []  # one, while this process is one of several
_HANDLERS: list = []


def say_if_nobody_comes(processes: int, process: int, coordinator: str, seconds: float) -> None:
    """From now on a last line says why JAX aborts this process: it could not join the others.

    Args:
      processes: their number.
      process: that of this one.
      coordinator: where they meet.
      seconds: how long JAX waits for them.
    """
    began = time.monotonic()

    def line() -> str:
        if time.monotonic() - began < 0.9 * seconds:
            return f"--process={process}: another process has joined the run with this number"
        return (
            f"--coordinator={coordinator}: the {processes} processes of this run did not all come "
            f"there within {seconds} s (3 x heartbeat_seconds); start all, each with the same "
            f"--coordinator and --processes and with its own --process (here {process}; if all were "
            "started, another one has this number)"
        )

    _print_at_abort(line, ConfigError.exit_code)


def watch(client: Any, process: int, processes: int, heartbeat_seconds: int) -> None:
    """Watches the others; from now on a last line names the lost one if JAX aborts this process."""
    watch = Watch(client, process, processes, heartbeat_seconds)
    watch.start()
    _WATCHES[:] = [watch]
    _print_at_abort(watch.line_at_abort, CnnJaxError.exit_code)


def _print_at_abort(line: Callable[[], str], exit_code: int) -> None:
    """Prints a line when JAX aborts this process, and ends it with this exit code.

    JAX aborts it in a C++ thread, after a long message, if another process is silent or the
    coordinator cannot be reached. Python's handlers would be too late: they run between two
    bytecodes of the main thread.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def print_line(_: int) -> None:
        os.write(2, f"error: {line()}\n".encode())
        os._exit(exit_code)

    _HANDLERS.append(print_line)  # C holds no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, print_line)


@contextlib.contextmanager
def named() -> Iterator[None]:
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
        watch, pause, lost = _WATCHES[0], threading.Event(), []
        # An exchange fails at once. Only silence shows who is lost; if it takes longer, JAX aborts.
        while watch.processes > 2 and not (lost := watch.lost()):
            pause.wait(0.1)
        if watch.process == 0:
            pause.wait(watch.beat)  # until the others know too: it keeps the store
        raise CnnJaxError(watch.line(lost)) from error
