"""Results in Markdown: figures, tables, sections of RESULTS.md between marks of their own."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from cnn_jax.common.errors import WorkdirError
from cnn_jax.common.files import written
from cnn_jax.train.workdir import write_text

TITLE = "# Results\n"


def put_section(path: Path, mark: str, text: str, first: bool = False) -> None:
    """Replaces the section called `mark`, or adds it; the rest of the file stays as it is.

    Args:
      path: of the file, which need not exist.
      mark: names the section in comments before and after it.
      text: Markdown.
      first: adds a new section below the title instead of at the end.

    Raises:
      WorkdirError: the file cannot be read or written.
    """
    section = f"<!-- {mark} -->\n{text.rstrip()}\n<!-- end of {mark} -->\n"
    with written(path, WorkdirError):
        old = path.read_text(encoding="utf-8") if path.exists() else TITLE
        write_text(path, _with_section(old, mark, section, first))


def _with_section(old: str, mark: str, section: str, first: bool) -> str:
    pattern = re.compile(
        f"<!-- {re.escape(mark)} -->.*?<!-- end of {re.escape(mark)} -->\n?", re.DOTALL
    )
    new, count = pattern.subn(lambda _: section, old)
    if count:
        return new
    if first and old.startswith(TITLE):
        rest = old.removeprefix(TITLE).strip("\n")
        return f"{TITLE}\n{section}" + (f"\n{rest}\n" if rest else "")
    return f"{old.rstrip()}\n\n{section}"


def spread(values: Sequence[float]) -> str:
    """Accuracies as "0.8973 ± 0.0021": mean and standard deviation; one alone as it is."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that can be read as text too; the columns after the first are figures, flush right."""
    widths = [max(4, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(cells) for cells in (head, rule, *rows))
