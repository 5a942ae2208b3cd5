"""Signals that ask a run to save and end: SIGTERM and SIGUSR1 (preemption), SIGINT (Ctrl-C)."""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


class StopSignals:
    """Notes the first such signal instead of dying of it; further ones change nothing.

    The run looks at `exit_code` between two steps. If it has not ended `grace_seconds` after the
    signal, the process ends without it: the last checkpoint that was complete is what remains.
    """

    def __init__(self, grace_seconds: float):
        self.exit_code = 0
        self._grace_seconds = grace_seconds
        self._timer: threading.Timer | None = None
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            return
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        self._timer = threading.Timer(self._grace_seconds, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self) -> None:
        log.error("error: grace_seconds=%g are over: ended without saving", self._grace_seconds)
        os._exit(self.exit_code)
