"""The progress of a training run: a live bar on a terminal, one plain line per epoch in a log."""

import contextvars
import sys
import time
from types import TracebackType
from typing import Any

import rich.console
import rich.progress

# Of the lines of one of several runs in a process; they have no bar.
PREFIX = contextvars.ContextVar("PREFIX", default="")


class Progress:
    """Shows the epochs of a run on standard output; use it as a context manager."""

    def __init__(self, epochs: int, steps_per_epoch: int, batch_size: int):
        self._epochs, self._steps, self._batch_size = epochs, steps_per_epoch, batch_size
        self._prefix = PREFIX.get()
        self._live = sys.stdout.isatty() and not self._prefix
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=rich.console.Console(highlight=False, emoji=False),
            transient=True,
            disable=not self._live,
        )
        self._task: Any = None
        self._began = 0.0
        self._first_step = 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start_epoch(self, epoch: int, step: int) -> None:
        """Starts the bar of epoch `epoch`, counted from 0, after `step` of its steps."""
        if not self._live:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            "", total=self._steps, completed=step, epoch=epoch + 1, text=""
        )
        self._began, self._first_step = time.perf_counter(), step

    def update(self, step: int, loss: float | None = None, accuracy: float | None = None) -> None:
        """Shows that `step` steps of the epoch are done, and loss and accuracy so far if given."""
        if not self._live:
            return
        fields: dict[str, Any] = {}
        if loss is not None:
            seconds = max(time.perf_counter() - self._began, 1e-9)
            rate = (step - self._first_step) * self._batch_size / seconds
            text = f"loss {loss:.4f}  accuracy {accuracy:.4f}  {rate:,.0f} images/s"
            fields["text"] = text
        self._bar.update(self._task, completed=step, **fields)

    def message(self, text: str) -> None:
        """Prints one line, above the bar."""
        if self._live:
            self._bar.console.print(text, markup=False)
        else:
            print(self._prefix + text, flush=True)

    def end_epoch(self, line: dict[str, Any]) -> None:
        """Prints a line of metrics.jsonl in readable form."""
        parts = [f"epoch {line['epoch']}/{self._epochs}"]
        for split in ("train", "validation", "test"):
            if f"{split}_loss" in line:
                loss, accuracy = line[f"{split}_loss"], line[f"{split}_accuracy"]
                parts.append(f"{split} loss {loss:.4f} accuracy {accuracy:.4f}")
        parts.append(f"{line['epoch_seconds']:.1f} s  {line['images_per_second']:,.0f} images/s")
        self.message("  ".join(parts))
