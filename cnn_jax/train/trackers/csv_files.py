"""Metrics and checkpoints as CSV files, for spreadsheets and pandas."""

import csv
from pathlib import Path

from cnn_jax.train.trackers.base import Ending, Tracker
from cnn_jax.train.workdir import write_text


class CsvFiles(Tracker):
    """csv/metrics.csv has a line for each step and metric, csv/checkpoints.csv for each checkpoint.

    Pictures have no place in them.
    """

    def __init__(self, workdir: Path, saved: dict):
        """`workdir`/csv need not exist; config.json has what is in `saved`."""
        folder = workdir / "csv"
        folder.mkdir(exist_ok=True)
        self._metrics, self._checkpoints = folder / "metrics.csv", folder / "checkpoints.csv"
        text = self._metrics.read_text() if self._metrics.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # without a line that a crash cut short
        if whole != text or not whole:
            write_text(self._metrics, whole or "step,name,value\n")
        self._file = open(self._metrics, "a", newline="")  # noqa: SIM115
        self._sums = {int(row["step"]): row["sha256"] for row in _rows(self._checkpoints)}

    def recorded(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for row in _rows(self._metrics):
            last[row["name"]] = max(int(row["step"]), last.get(row["name"], -1))
        return last

    def metrics(self, values: dict[str, float], step: int) -> None:
        csv.writer(self._file, lineterminator="\n").writerows(
            [step, name, value] for name, value in values.items()
        )
        self._file.flush()

    def checkpoint(self, step: int, sha256: str) -> None:
        self._sums[step] = sha256
        lines = [f"{step},{self._sums[step]}\n" for step in sorted(self._sums)]
        write_text(self._checkpoints, "".join(["step,sha256\n", *lines]))

    def close(self, ending: Ending) -> None:
        self._file.close()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
