"""Runs commands of this project one after another, each in its own process.

A run's memory and devices are free when its process ends, and a crash does not stop other runs.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from cnn_jax.common.errors import Preempted
from cnn_jax.train.signals import EXIT_CODES, handle

PACKAGE = Path(__file__).resolve().parent.parent
ADVICE = "stopped by a signal; run the same command again to go on"

# The exit codes of a process that a signal ended, whether or not it handled the signal.
STOPPED = {*EXIT_CODES.values(), *(-number for number in EXIT_CODES)}


class CommandFailed(Exception):
    """A command ended with an error; has its error message and its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """Runs the commands; use it as a context manager.

    A stop signal is passed on to the command, which saves and ends; then Preempted is raised.
    """

    def __init__(self) -> None:
        self._running: subprocess.Popen | None = None
        self._stopped_by = 0
        self._handlers: dict = {}

    def __enter__(self) -> "Processes":
        if threading.current_thread() is threading.main_thread():
            self._handlers = handle(self._stop)
            self._wakeup = signal.set_wakeup_fd(-1)  # its reader would end this process at once
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._running is not None:  # an error of this process, such as a broken pipe
            self._running.terminate()
            self._running.wait()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, *arguments: str, quiet: bool = False) -> None:
        """Runs `./launch.sh ARGUMENTS`; passes on its standard error, except its error line.

        Args:
          *arguments: a command and its flags.
          quiet: drops its standard output.

        Raises:
          CommandFailed: it ended with an error.
          Preempted: a signal stopped it, or this process.
        """
        self._check_stopped("")
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cnn_jax.main", *arguments],
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C reaches only this process, which passes it on
        )
        self._running = process
        if self._stopped_by:  # a signal came after the check
            process.send_signal(self._stopped_by)
        reason = ""
        assert process.stderr is not None, "it is a pipe"
        with process.stderr:
            for line in process.stderr:
                if line.startswith("error: "):
                    reason = line.removeprefix("error: ").strip()
                else:
                    sys.stderr.write(line)
        code = process.wait()
        self._running = None
        self._check_stopped(reason)
        if code in STOPPED:  # a signal was sent to the command itself
            raise Preempted(reason or ADVICE, EXIT_CODES.get(-code, code))
        if code < 0:
            raise CommandFailed(f"killed by {signal.Signals(-code).name}", 1)
        if code:
            raise CommandFailed(reason or f"ended with exit code {code}", code)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_by:
            return
        self._stopped_by = number
        if self._running is not None:
            self._running.send_signal(number)

    def _check_stopped(self, reason: str) -> None:
        if self._stopped_by:
            raise Preempted(reason or ADVICE, EXIT_CODES[self._stopped_by])
