"""Evaluations of several runs, checkpoints, datasets, splits and changes of the images, as rows."""

import csv
import fcntl
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.analysis import evaluate
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.analysis.study import changes, measures, temperature
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.common.files import writing, written
from cnn_jax.config import DataConfig
from cnn_jax.data.examples import Examples
from cnn_jax.train import checkpoint, lease
from cnn_jax.train.bucket_run import copy_of, shown
from cnn_jax.train.workdir import read_config, write_json

log = logging.getLogger(__name__)

POLL_SECONDS = 2
# What a row of evaluations.json has of evaluation.json.
PARTS = (
    "checkpoint",
    "dataset",
    "split",
    "examples",
    "loss",
    "accuracy",
    "top_5_accuracy",
    "macro",
    "brier",
    "ece",
    "reliability",
    "intervals",
    "with_temperature",
)
Load = Callable[[Path, str], RestoredRun]


class Study:
    """The rows so far, and what they share: data, compiled programs, what each run has right."""

    def __init__(
        self,
        load_run: Load,
        where: Sequence[tuple[str | None, str]],
        data_dir: str | None,
        changed: Sequence[tuple[str, int]] = (),
        fit_temperature: bool = False,
        predictions: "PredictionsFile | None" = None,
    ):
        """
        Args:
          load_run: restores a checkpoint, "latest", "best" or a step, of a workdir.
          where: (dataset, split); the dataset None is the training's.
          data_dir: where the datasets lie.
          changed: (kind, amount) of `changes`; the unchanged images come first in any case.
          fit_temperature: fits and keeps the temperature of each checkpoint.
          predictions: a file for the predictions of every example.
        """
        self.rows: list[dict[str, Any]] = []
        self._load_run, self._where, self._data_dir = load_run, where, data_dir
        self._changes, self._fit, self._predictions = changed, fit_temperature, predictions
        self._scorers: dict[Path, Callable] = {}
        self._loaded: dict[tuple, tuple[Examples, str]] = {}
        # (dataset, split, workdir) -> which examples, their labels, what is right
        self._right: dict[tuple, tuple[tuple, list[str], np.ndarray]] = {}

    def add(self, workdir: Path, which: str) -> Iterator[dict[str, Any]]:
        """Evaluates a checkpoint; adds and yields its rows."""
        run = self._load_run(workdir, which)
        if workdir not in self._scorers:
            self._scorers[workdir] = evaluate.make_scorer(run)
        score = functools.partial(self._scorers[workdir], run.variables)
        if self._fit:
            validation, _ = self._examples(run, None, "validation")
            temperature.keep(run, score(validation)[1])
        for dataset, split in self._where:
            examples, name = self._examples(run, dataset, split)
            for change in [None, *self._changes]:
                changed = changes.Changed(examples, *change) if change else examples
                result, scores = score(changed)
                report = evaluate.report_of(run, name, split, result, scores)
                row = {"workdir": shown(workdir)} | {k: report[k] for k in PARTS if k in report}
                row |= {"change": change and {"kind": change[0], "amount": change[1]}}
                self.rows.append(row)
                if not change:
                    labels = [run.class_names[label] for label in scores.label]
                    place = _identity(run.data, split, examples)
                    self._right[name, split, workdir] = place, labels, scores.correct
                if self._predictions:
                    self._predictions.add(run, row, scores, examples.files)
                yield row | {"report": report}

    def tests(self) -> list[dict[str, Any]]:
        """McNemar's test of every two runs on the same examples, with the last checkpoint of each."""
        found = []
        places = [*self._right]
        for i, (name, split, first) in enumerate(places):
            for other in places[i + 1 :]:
                (*same, right), (*others, other_right) = self._right[places[i]], self._right[other]
                if other[:2] == (name, split) and same == others:
                    about = {"dataset": name, "split": split, "examples": len(right)}
                    runs = {"first": shown(first), "second": shown(other[2])}
                    found.append(about | runs | measures.mcnemar(right, other_right))
        return found

    def write(self, folder: Path) -> None:
        """Writes evaluations.json into a folder, which is made if missing.

        Raises:
          ConfigError: it cannot be written.
        """
        with writing(folder):
            write_json(folder / "evaluations.json", {"rows": self.rows, "mcnemar": self.tests()})

    def _examples(self, run: RestoredRun, dataset: str | None, split: str) -> tuple[Examples, str]:
        key = run.workdir, dataset, split
        if key not in self._loaded:
            self._loaded[key] = evaluate.load(run, split, dataset, self._data_dir)
        return self._loaded[key]


def _identity(data: DataConfig, split: str, examples: Examples) -> tuple:
    """Says which examples of a dataset these are: by their files, or by where they come from."""
    if examples.files:
        return tuple(examples.files)
    if split == "test":
        return data.test_split, data.skip_corrupt
    if split in ("train", "validation"):
        return split, data.train_split, data.validation_examples, data.skip_corrupt
    return split, data.skip_corrupt


class PredictionsFile:
    """A CSV file with a line for each example: the run, its class, and all probabilities."""

    def __init__(self, path: Path):
        """`path` is replaced when there is a first row.

        Raises:
          ConfigError: it cannot be written.
        """
        self._path = path
        self._class_names: tuple[str, ...] | None = None
        with written(f"--predictions={path}", ConfigError):
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()

    def add(
        self,
        run: RestoredRun,
        row: dict[str, Any],
        scores: measures.Scores,
        files: Sequence[str],
    ) -> None:
        """Appends the examples of a row.

        Raises:
          ConfigError: the runs have other classes than those before, or the file cannot be written.
        """
        names, first = run.class_names, self._class_names is None
        if not first and names != self._class_names:
            raise ConfigError(
                f"--predictions={self._path}: {run.workdir} has other classes than the run before it; "
                "write a file for each"
            )
        self._class_names = names
        change = row["change"] or {"kind": "", "amount": ""}
        same = [row[k] for k in ("workdir", "checkpoint", "dataset", "split")] + [*change.values()]
        with (
            written(f"--predictions={self._path}", ConfigError),
            open(
                self._path,
                "w" if first else "a",
                newline="",
                encoding="utf-8",
                errors="surrogateescape",
            ) as file,
        ):
            writer = csv.writer(file)
            if first:
                writer.writerow([*COLUMNS, *(f"probability of {name}" for name in names)])
            for i, values in enumerate(scores.probabilities):
                about = [i, files[i] if files else "", names[scores.label[i]]]
                numbers = [f"{value:.9g}" for value in values]
                writer.writerow([*same, *about, names[scores.winner[i]], *numbers])


COLUMNS = (
    "workdir",
    "checkpoint",
    "dataset",
    "split",
    "change",
    "amount",
    "example",
    "file",
    "label",
    "predicted",
)


def steps_of(workdir: Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending.

    Raises:
      CheckpointError: there are none, or `workdir` is not the folder of a run.
    """
    read_config(workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    if not (steps := checkpoints.steps()):
        raise CheckpointError(f"{checkpoints.place}: holds no checkpoint")
    return steps


def each(study: Study, workdirs: Sequence[Path], which: str) -> Iterator[dict[str, Any]]:
    """The rows of these runs: of one checkpoint, or of "all" that are whole; warns of damaged ones."""
    for workdir in workdirs:
        if which != "all":
            yield from study.add(workdir, which)
            continue
        for step in steps_of(workdir):
            try:
                yield from study.add(workdir, str(step))
            except checkpoint.DamagedCheckpoint as error:
                log.warning("warning: skipped %s", error)


def watch(study: Study, workdirs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of each checkpoint, old ones first, until no run is trained any more.

    A checkpoint that the training deletes before it is read is left out.

    Raises:
      CheckpointError: a workdir is not that of a run, or has no checkpoint in the end.
    """
    done: set[tuple[Path, int]] = set()
    for workdir in workdirs:
        read_config(workdir)
    while True:
        # First: a run that ends after this has saved what it will save before the next look.
        running = any(map(is_running, workdirs))
        for workdir in workdirs:
            for step in _steps_now(workdir):
                if (workdir, step) in done:
                    continue
                done.add((workdir, step))
                try:
                    yield from study.add(workdir, str(step))
                except CheckpointError as error:
                    if step in _steps_now(workdir):
                        log.warning("warning: skipped %s", error)
        if not running:
            break
        time.sleep(POLL_SECONDS)
    for workdir in workdirs:
        steps_of(workdir)


def _steps_now(workdir: Path) -> list[int]:
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.copy:
        checkpoints.copy.refresh()
    return checkpoints.steps()


def is_running(workdir: Path) -> bool:
    """Whether a process trains in `workdir`: it holds the lock."""
    if copy := copy_of(workdir):
        return lease.is_held(copy.bucket)
    try:
        with open(workdir / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise CheckpointError(f"{workdir / 'lock'}: cannot be read: {error.strerror}") from None
    return False


def default_output(workdirs: Sequence[Path]) -> Path:
    """evaluations/ in the workdir, or beside the first of several."""
    folder = workdirs[0] if len(workdirs) == 1 else workdirs[0].absolute().parent
    return folder / "evaluations"


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The pictures of the rows, as `charts.save`; none if there are no rows."""
    from cnn_jax.analysis.study import charts  # matplotlib is slow to import

    return charts.save(rows, folder) if rows else []
