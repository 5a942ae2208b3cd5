"""Trains the experiments of the plan, keeps a record of each run, rebuilds RESULTS.md."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from cnn_jax.common import cpu
from cnn_jax.common.errors import CnnJaxError, Preempted
from cnn_jax.config import Config
from cnn_jax.config.experiment import load
from cnn_jax.config.serialize import is_of
from cnn_jax.studies.reproduce import records, table
from cnn_jax.studies.reproduce.plan import ROWS, Row
from cnn_jax.studies.subprocesses import CommandFailed, Processes
from cnn_jax.train.workdir import metrics, prepare, write_json

log = logging.getLogger(__name__)


def reproduce(
    rows: Sequence[Row],
    workdir: Path,
    output: Path,
    data_dir: str | None = None,
    shown: Sequence[Row] = ROWS,
    download: bool = False,
) -> int:
    """Trains, evaluates and records every run of `rows` that has no record yet.

    A run that fails is told on one line, and the others go on.

    Args:
      rows: what to train.
      workdir: each run has WORKDIR/EXPERIMENT/seed_S.
      output: where RESULTS.md and records/ lie.
      data_dir: where the datasets lie.
      shown: the rows of RESULTS.md.
      download: fetches datasets that are not prepared.

    Returns:
      The exit code of the first run that failed, or 0.

    Raises:
      WorkdirError: a folder cannot be written.
      Preempted: a signal asked to end; the same call goes on.
    """
    prepare(workdir)
    prepare(output)
    # This process only counts; an accelerator's memory is for the runs.
    jax.config.update("jax_platforms", "cpu")
    table.rebuild(output, shown)  # what is in its way is better told now than hours later
    runs = [(row.experiment, seed) for row in rows for seed in range(row.seeds)]
    codes: list[int] = []
    with Processes() as processes:
        for place, (experiment, seed) in enumerate(runs, 1):
            name = f"{experiment}, seed {seed} ({place} of {len(runs)})"
            try:
                config = load(experiment, [f"seed={seed}"])
                path = records.folder(output / "records", experiment, seed)
                record = records.read(path)
                if record and is_of(record.config["config"], config):
                    log.info("%s: recorded already", name)
                    continue
                log.info("%s", name)
                own = records.folder(workdir, experiment, seed)
                _run(processes, experiment, config, own, path, data_dir, download)
                table.rebuild(output, shown)
            except Preempted:
                raise
            except (CnnJaxError, CommandFailed) as error:
                log.error("error: %s: %s", name, " ".join(str(error).split()))
                codes.append(error.exit_code)
    table.rebuild(output, shown)
    log.info("%d of %d runs are recorded", len(runs) - len(codes), len(runs))
    return codes[0] if codes else 0


def _run(
    processes: Processes,
    experiment: str,
    config: Config,
    workdir: Path,
    path: Path,
    data_dir: str | None,
    download: bool,
) -> None:
    """Trains and evaluates one run in `workdir` and records it in `path`."""
    command = ["train", f"--experiment={experiment}", "--set", f"seed={config.seed}"]
    folders = [f"--workdir={workdir}", *([f"--data_dir={data_dir}"] if data_dir else [])]
    with _Origin(workdir, config) as origin:
        processes.run(*command, *folders, *(["--download"] if download else []))
        evaluate = ["evaluate", f"--experiment={experiment}", f"--output={workdir}"]
        processes.run(*evaluate, *folders, quiet=True)
    records.write(path, workdir, config, f"./launch.sh {' '.join(command)}", origin.saved)


class _Origin:
    """Where a run comes from, over all the calls that worked on it; kept in its workdir.

    Its commit and processor are those of the call that began it. If a call at another commit trained
    on, the run is "dirty", as one of changed files is: its commit alone does not give it.

    Attributes:
      saved: commit, dirty, processor, and wall_seconds of the calls that ended, whatever their end.
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
        if self._path.parent.is_dir():  # there is a run
            self.saved["wall_seconds"] += time.perf_counter() - self._began
            write_json(self._path, self.saved)
