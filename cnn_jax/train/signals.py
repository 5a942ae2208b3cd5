"""Signals that ask a run to save and end.

SIGTERM and SIGUSR1 (preemption), SIGINT (Ctrl-C), SIGHUP (terminal closed; ignored under nohup).
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

log = logging.getLogger(__name__)
EXIT_CODES: dict[int, int] = {
    signal.SIGTERM: 143,
    signal.SIGUSR1: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 129,
}


def handle(handler: Callable[[int, FrameType | None], None]) -> dict:
    """Installs `handler` for these signals; returns the earlier handlers, for signal.signal.

    SIGHUP stays ignored under nohup.
    """
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = EXIT_CODES.keys() - ({signal.SIGHUP} if nohup else set())
    return {number: signal.signal(number, handler) for number in numbers}


def end_at_once() -> None:
    """From now on such a signal ends this process with one line, also in imports and at exit.

    A KeyboardInterrupt is not enough: C++ code ignores it, or crashes. A later `StopSignals` or
    `handle` replaces this while it is active.
    """
    StopSignals("interrupted").__enter__()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)  # the parent may have blocked them


class StopSignals:
    """Records the first such signal in `exit_code`; ignores later ones.

    There are two phases. At first there is nothing to save, and a signal ends the process at once.
    After `let_finish`, the run reads `exit_code` between two steps, saves and ends. If this takes
    longer than `grace_seconds`, the process ends without saving. The last checkpoint remains.
    `late_message` is what it says then.

    A separate thread receives the signals through a pipe. Python's handlers run in the main thread
    between two bytecodes, so a minute of compilation would delay them.
    """

    def __init__(
        self, message: str = "stopped by a signal before training; run the same command again"
    ) -> None:
        self.exit_code = 0
        self._message = message
        self._grace_seconds = 0.0
        self.late_message = ""
        self._handlers: dict = {}

    def let_finish(self, grace_seconds: float) -> None:
        """From now on, the run has `grace_seconds` after a signal to save and end."""
        self._grace_seconds = grace_seconds
        self.late_message = (
            f"saving took longer than grace_seconds={grace_seconds:g}: ended without saving"
        )

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python handles signals only in the main thread
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = handle(_ignore)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)
        self._listener.join()
        os.close(self._reading)

    def _listen(self) -> None:
        """Reads signal numbers from the pipe until `__exit__` closes it."""
        deadline = None
        while True:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._reading], [], [], patience)[0]:
                log.error("error: %s", self.late_message)
                os._exit(self.exit_code)
            number = os.read(self._reading, 1)
            if not number:
                return
            if number[0] not in EXIT_CODES or self.exit_code:
                continue
            self.exit_code = EXIT_CODES[signal.Signals(number[0])]
            if not self._grace_seconds:
                log.error("error: %s", self._message)
                os._exit(self.exit_code)
            deadline = time.monotonic() + self._grace_seconds


def _ignore(number: int, frame: object) -> None:
    """A handler that does nothing: Python only writes the signal's number to the pipe."""
