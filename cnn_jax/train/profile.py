"""A trace of some training steps by jax.profiler, and the operations that take longest in it."""

import collections
import re
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import written

LONGEST = 10


class Profile:
    """Traces the steps START to STOP - 1 of a run, counted from 0, into profile/ of its workdir."""

    def __init__(self, steps: str, folder: Path):
        """
        Args:
          steps: "START:STOP".
          folder: the workdir.

        Raises:
          ConfigError: `steps` is not two whole numbers, the second one larger.
        """
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", steps, re.ASCII)
        self._start, self._stop = map(int, found.groups()) if found else (0, 0)
        if self._start >= self._stop:
            raise ConfigError(
                f"--profile={steps}: must be START:STOP, two steps counted from 0, as in 100:120"
            )
        self._folder, self._first, self._done = folder / "profile", -1, 0

    def before(self, step: int, state: Any, last: bool = False) -> list[str]:
        """Starts or ends the trace.

        Args:
          step: the one that follows. A run that resumes between START and STOP traces the rest.
          state: that it takes; the steps before must not reach into the trace.
          last: no step follows.

        Returns:
          What to print.

        Raises:
          CheckpointError: the trace cannot be written.
        """
        if self._first < 0 and self._start <= step < self._stop and not last:
            jax.block_until_ready(state)
            with written(self._folder, CheckpointError):
                self._folder.mkdir(exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # not shown here, and it slows what is measured
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._first = step
        self._done = step
        # A call may do several steps, and so pass over STOP.
        if self._first < 0 or not (last or step >= self._stop):
            return []
        jax.block_until_ready(state)
        return self._end()

    def close(self) -> list[str]:
        """Ends a trace that is open, as when the run stops early; what to print, also without one."""
        if self._first >= 0:
            return self._end()
        if self._start == self._stop:  # ended already
            return []
        steps = f"{self._start}:{self._stop}"
        return [f"--profile={steps}: no trace, as the run did none of these steps"]

    def _end(self) -> list[str]:
        """Ends the trace and returns a table of the longest operations."""
        jax.profiler.stop_trace()
        steps, self._first = max(1, self._done - self._first), -1
        self._start = self._stop  # not again
        path = max(self._folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        spent = operations(path)
        total = sum(spent.values()) or 1
        return [
            f"profile of {steps} steps in {path.parent}; the longest operations, ms a step:",
            *(
                f"{nanoseconds / 1e6 / steps:9.3f}  {nanoseconds / total:6.1%}  {name}"
                for name, nanoseconds in spent.most_common(LONGEST)
            ),
        ]


def operations(path: Path) -> collections.Counter:
    """Nanoseconds by operation of the compiled programs, over all devices and threads.

    Args:
      path: of an .xplane.pb file.
    """
    spent: collections.Counter = collections.Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    spent[f"{stats['hlo_op']} of {stats.get('hlo_module', '?')}"] += (
                        event.duration_ns
                    )
    return spent
