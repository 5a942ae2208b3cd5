"""Trains the experiments of the plan, keeps a record of each run, rebuilds RESULTS.md."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from cnn_jax.common import cpu
from cnn_jax.common.errors import CnnJaxError, Preempted
from cnn_jax.config import Config
from cnn_jax.config.experiment import load
from cnn_jax.config.serialize import is_of
from cnn_jax.studies import launcher
from cnn_jax.studies.reproduce import records, table
from cnn_jax.studies.reproduce.plan import ROWS, Row
from cnn_jax.studies.subprocesses import CommandFailed
from cnn_jax.studies.task import Task
from cnn_jax.train.workdir import metrics, prepare, write_json

log = logging.getLogger(__name__)


def reproduce(
    rows: Sequence[Row],
    workdir: Path,
    output: Path,
    data_dir: str | None = None,
    shown: Sequence[Row] = ROWS,
    download: bool = False,
    launch: launcher.Launcher | None = None,
) -> int:
    """Trains, evaluates and records every run of `rows` that has no record yet.

    A failed run is reported on one line, and the other runs continue.

    Args:
      rows: what to train.
      workdir: each run is in WORKDIR/EXPERIMENT/seed_S.
      output: the folder of RESULTS.md and records/.
      data_dir: the folder of the datasets.
      shown: the rows of RESULTS.md.
      download: downloads datasets that are not prepared.
      launch: runs them, as `launcher.choose` gives it; by default one after another.

    Returns:
      The exit code of the first run that failed, or 0.

    Raises:
      WorkdirError: a folder cannot be written.
      Preempted: a signal asked to stop; the same call resumes.
    """
    prepare(workdir)
    prepare(output)
    # This process only counts FLOPs; the runs need the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    table.rebuild(output, shown)  # fail now rather than after hours of training
    runs = [(row.experiment, seed) for row in rows for seed in range(row.seeds)]
    tasks: list[Task] = []
    codes: list[int] = []
    for place, (experiment, seed) in enumerate(runs, 1):
        own = records.folder(workdir, experiment, seed)
        arguments = experiment, seed, own, data_dir, download
        task = Task(f"{experiment}, seed {seed}", place, len(runs), _train, arguments)
        with _reported(task, codes):
            config = load(experiment, [f"seed={seed}"])
            record = records.read(records.folder(output / "records", experiment, seed))
            if record and is_of(record.config["config"], config):
                log.info("%s: recorded already", task.label)
            else:
                tasks.append(task)
    for task, failure in (launch or launcher.choose())(tasks, workdir / "slurm"):
        with _reported(task, codes):
            if failure:
                raise failure
            _record(output / "records", *task.arguments[:3])
            table.rebuild(output, shown)
    table.rebuild(output, shown)
    log.info("%d of %d runs are recorded", len(runs) - len(codes), len(runs))
    return codes[0] if codes else 0


@contextlib.contextmanager
def _reported(task: Task, codes: list[int]) -> Iterator[None]:
    """Logs the error of a run, and adds its exit code to `codes`."""
    try:
        yield
    except Preempted:
        raise
    except (CnnJaxError, CommandFailed) as error:
        log.error("error: %s: %s", task.label, " ".join(str(error).split()))
        codes.append(error.exit_code)


def _train(
    run: Callable[..., None],
    experiment: str,
    seed: int,
    workdir: Path,
    data_dir: str | None,
    download: bool,
) -> None:
    """Trains and evaluates one run in `workdir`."""
    folders = [f"--workdir={workdir}", *([f"--data_dir={data_dir}"] if data_dir else [])]
    with _Origin(workdir, load(experiment, [f"seed={seed}"])):
        run(*_command(experiment, seed), *folders, *(["--download"] if download else []))
        evaluate = ["evaluate", f"--experiment={experiment}", f"--output={workdir}"]
        run(*evaluate, *folders, quiet=True)


def _record(folder: Path, experiment: str, seed: int, workdir: Path) -> None:
    """Records the run in `workdir` below `folder`."""
    config = load(experiment, [f"seed={seed}"])
    path = records.folder(folder, experiment, seed)
    command = f"./launch.sh {' '.join(_command(experiment, seed))}"
    records.write(path, workdir, config, command, _Origin(workdir, config).saved)


def _command(experiment: str, seed: int) -> list[str]:
    return ["train", f"--experiment={experiment}", "--set", f"seed={seed}"]


class _Origin:
    """The origin of a run over all calls that worked on it; kept in its workdir.

    Commit and processor are those of the call that began the run. If a call at another commit
    resumed it, the run is "dirty", like a run of changed files: no single commit reproduces it.

    Attributes:
      saved: commit, dirty, processor, and wall_seconds of all ended calls, also of failed ones.
    """

    def __init__(self, workdir: Path, config: Config):
        self._path = workdir / "origin.json"
        self._began = time.perf_counter()
        now = records.commit() | {"processor": cpu.description(), "wall_seconds": 0.0}
        try:
            self.saved = now | json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            self.saved = now
        lines = metrics(workdir)
        ended = lines and lines[-1].get("epoch") == config.epochs
        if not ended and self.saved["commit"] != now["commit"]:
            self.saved["dirty"] = True

    def __enter__(self) -> "_Origin":
        return self

    def __exit__(self, *_: object) -> None:
        if self._path.parent.is_dir():  # the run exists
            self.saved["wall_seconds"] += time.perf_counter() - self._began
            write_json(self._path, self.saved)
