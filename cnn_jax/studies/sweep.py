"""Trains an experiment with every combination of given values, and selects the best.

Only the validation accuracy after the last epoch selects it. If test accuracy selected the setting,
it would no longer estimate the accuracy on unseen images.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.common.errors import ConfigError, NotFiniteError, WorkdirError
from cnn_jax.common.files import written
from cnn_jax.config import Config
from cnn_jax.config.experiment import load
from cnn_jax.config.overrides import override
from cnn_jax.config.serialize import is_of, to_json
from cnn_jax.config.validate import validate
from cnn_jax.data.sources import has_validation
from cnn_jax.studies import launcher, markdown, sweep_plot
from cnn_jax.studies.task import Failure, Task
from cnn_jax.train.trackers import DEFAULT
from cnn_jax.train.workdir import metrics, prepare, read_config, write_json, write_text

log = logging.getLogger(__name__)

_LONGEST_NAME = 200  # of a folder; file systems allow 255 bytes


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a setting with one seed.

    Attributes:
      seed: of the run.
      lines: of metrics.jsonl, as far as the run came.
      problem: why the run did not finish; empty if it did.
    """

    seed: int
    lines: list[dict]
    problem: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """One combination of values.

    Attributes:
      values: field -> value, as text.
      assignments: the same for --set.
      config: the validated configuration with these values.
      runs: its results by seed; empty before training.
    """

    values: dict[str, str]
    assignments: list[str]
    config: Config
    runs: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.values.items()) or "as it is"

    @property
    def folder(self) -> str:
        pairs = "_".join(f"{k}={v}" for k, v in self.values.items())
        name = re.sub(r"[^\w=.+,-]", "-", pairs) or "as_it_is"
        if len(name) <= _LONGEST_NAME:
            return name
        digest = hashlib.sha256(pairs.encode()).hexdigest()[:8]
        return f"{name[: _LONGEST_NAME - 9]}_{digest}"

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if not run.problem]

    def accuracies(self, split: str) -> list[float]:
        """Accuracies after the last epoch, of the finished runs."""
        return [run.lines[-1][f"{split}_accuracy"] for run in self.finished]


def settings(experiment: str, assignments: Sequence[str]) -> list[Setting]:
    """Every combination of the values of `--set field=a,b`, in the given order.

    A comma separates values, except inside ( ) or [ ]. If the field takes several numbers, as
    data.mean does, text without brackets is one value: data.mean=0.1,0.2,0.3.

    Raises:
      ConfigError: an experiment or field is unknown, or a value is wrong or given twice.
    """
    config = load(experiment)
    axes: dict[str, list[str]] = {}
    for assignment in assignments:
        path, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ConfigError(f"--set {assignment}: write field=value or field=value,value")
        if path == "seed":
            raise ConfigError(
                f"--set {assignment}: sweep sets the seed itself; write --seeds=N for the seeds "
                "0 to N - 1"
            )
        if path in axes:
            raise ConfigError(
                f"--set {assignment}: {path} is given twice; write {path}=value,value"
            )
        axes[path] = _values(config, path, text)
    found: list[Setting] = []
    for texts in itertools.product(*axes.values()):
        pairs = [f"{path}={text}" for path, text in zip(axes, texts, strict=True)]
        changed = validate(override(config, pairs))
        values = {path: _shown(_at(changed, path)) for path in axes}
        if any(values == other.values for other in found):
            raise ConfigError(f"--set {' --set '.join(pairs)}: is given twice")
        found.append(Setting(values, pairs, changed))
    return found


def _values(config: Config, path: str, text: str) -> list[str]:
    """The values in `text`, as texts."""
    try:
        if isinstance(_at(override(config, [f"{path}={text}"]), path), tuple):
            return [text]
    except ConfigError:  # several values, or a wrong one that `settings` reports
        pass
    return [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text)]


def _at(config: Config, path: str) -> Any:
    """The value of a dotted field."""

    def inside(value: Any, name: str) -> Any:
        is_partial = isinstance(value, functools.partial)
        return value.keywords[name] if is_partial else getattr(value, name)

    return functools.reduce(inside, path.split("."), config)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(to_json(value))


def sweep(
    experiment: str,
    assignments: Sequence[str],
    seeds: int,
    workdir: Path,
    data_dir: str | None = None,
    download: bool = False,
    launch: launcher.Launcher | None = None,
    trackers: Sequence[str] = DEFAULT,
) -> int:
    """Trains the runs that are missing, prints the table, writes it and a plot into `workdir`.

    Args:
      experiment: a name or a path, as for `train`.
      assignments: of --set, as for `settings`.
      seeds: how many runs each setting has, with the seeds 0, 1, ...
      workdir: for the runs, WORKDIR/SETTING/seed_S, and sweep.json, sweep.md and curves.png.
      data_dir: the folder of the dataset.
      download: downloads the dataset if it is not prepared.
      launch: runs them, as `launcher.choose` gives it; by default one after another.
      trackers: of each run, as for `train`.

    Returns:
      The exit code of the first run that failed, or 0. A run with a loss that is not finite has not
      failed: that is a result.

    Raises:
      ConfigError: as `settings`.
      WorkdirError: the workdir cannot be written.
      Preempted: a signal asked to stop; the same call resumes.
    """
    planned = settings(experiment, assignments)
    prepare(workdir)
    blind = [setting for setting in planned if not has_validation(setting.config.data)]
    if blind:
        log.warning(
            "warning: data.validation_examples=0: no best setting is chosen, as test accuracy must "
            "not choose it; add --set data.validation_examples=5000"
        )
    options = [f"--tracker={','.join(trackers)}"]
    options += [f"--data_dir={data_dir}"] if data_dir else []
    options += ["--download"] if download else []
    found: dict[tuple[str, int], Run] = {}
    codes: dict[tuple[str, int], int] = {}
    tasks = {}
    for place, (setting, seed) in enumerate(itertools.product(planned, range(seeds)), 1):
        config = dataclasses.replace(setting.config, seed=seed)
        folder = workdir / setting.folder / f"seed_{seed}"
        key = setting.name, seed
        if run := _ended(folder, config):
            log.info("%s, seed %d (%d of %d): ended already", *key, place, len(planned) * seeds)
            found[key], codes[key] = run, 0
            continue
        sets = [f"--set={change}" for change in (*setting.assignments, f"seed={seed}")]
        command = ("train", f"--experiment={experiment}", *options, *sets, f"--workdir={folder}")
        name = f"{setting.name}, seed {seed}"
        task = Task(name, place, len(planned) * seeds, _train, command)
        tasks[task] = key, folder, config
    for task, failure in (launch or launcher.choose())([*tasks], workdir / "slurm"):
        key, folder, config = tasks[task]
        found[key], codes[key] = _result(folder, config, failure)
        if found[key].problem:
            bad = "error: " if codes[key] else ""
            log.info("%s%s: %s", bad, task.name, found[key].problem)
    done = [
        dataclasses.replace(setting, runs=tuple(found[setting.name, seed] for seed in range(seeds)))
        for setting in planned
    ]
    _write(experiment, assignments, seeds, workdir, done, chosen_by=None if blind else "validation")
    every = (codes[setting.name, seed] for setting in planned for seed in range(seeds))
    return next(filter(None, every), 0)


def _train(run: Callable[..., None], *command: str) -> None:
    run(*command)


def _result(folder: Path, config: Config, failure: Failure | None) -> tuple[Run, int]:
    """A run that was trained, and its exit code; a loss that is not finite is no failure."""
    if failure is None:
        return Run(config.seed, metrics(folder), ""), 0
    if failure.exit_code == NotFiniteError.exit_code and (run := _ended(folder, config)):
        return run, 0
    return Run(config.seed, metrics(folder), str(failure)), failure.exit_code


def _ended(folder: Path, config: Config) -> Run | None:
    """The run in `folder` if it has this configuration and has ended; otherwise None."""
    try:
        if not is_of(read_config(folder)["config"], config):
            return None
    except WorkdirError:
        return None
    lines = metrics(folder)
    if (folder / "not_finite.json").exists():
        what = json.loads((folder / "not_finite.json").read_text(encoding="utf-8"))["what"]
        return Run(config.seed, lines, f"{what}: not finite")
    ended = lines and lines[-1].get("epoch") == config.epochs
    return Run(config.seed, lines, "") if ended else None


# ------------------------------------------------------------------------------- what is shown


def _write(
    experiment: str,
    assignments: Sequence[str],
    seeds: int,
    workdir: Path,
    done: list[Setting],
    chosen_by: str | None,
) -> None:
    best = choose(done, seeds) if chosen_by else None
    table = markdown.markdown_table(*_table(done, seeds, best))
    if best:
        choice = f"Best by validation accuracy: {best.name}."
    elif chosen_by:
        choice = "No setting finished with every seed: none is chosen."
    else:
        choice = (
            "Nothing is chosen: there is no validation split, and test accuracy must not choose."
        )
    changes = "".join(f" --set {shlex.quote(text)}" for text in assignments)
    title = f"`./launch.sh sweep --experiment={experiment}{changes} --seeds={seeds}`"
    note = "Accuracies are of the last epoch: mean ± standard deviation over the seeds."
    report = {
        "experiment": experiment,
        "seeds": seeds,
        "chosen_by": chosen_by,
        "best": best.values if best else None,
        "settings": [
            {"values": setting.values, "runs": [_as_json(run) for run in setting.runs]}
            for setting in done
        ],
    }
    chart = sweep_plot.curves(
        [
            (setting.name, [run.lines for run in setting.finished or setting.runs])
            for setting in done
        ],
        "validation" if chosen_by else "test",
    )
    with written(f"workdir={workdir}", WorkdirError):
        write_json(workdir / "sweep.json", report)
        write_text(workdir / "sweep.md", f"{title}\n\n{table}\n\n{choice}\n{note}\n")
        if chart:
            (workdir / "curves.png").write_bytes(chart.light)
    print(f"{table}\n\n{choice}\nwritten to {workdir / 'sweep.md'}, sweep.json", end="")
    print(" and curves.png" if chart else "")


def _as_json(run: Run) -> dict:
    last = run.lines[-1] if run.lines else None
    return {"seed": run.seed, "problem": run.problem or None, "last_epoch": last}


def choose(done: Sequence[Setting], seeds: int) -> Setting | None:
    """The setting with the highest mean validation accuracy, of those without a failed run."""
    whole = [setting for setting in done if len(setting.finished) == seeds]
    return max(
        whole, key=lambda setting: statistics.fmean(setting.accuracies("validation")), default=None
    )


def _table(
    done: list[Setting], seeds: int, best: Setting | None
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the fields that vary, n, accuracies, problems."""
    fields = [k for k in done[0].values if len({setting.values[k] for setting in done}) > 1]
    splits = ["test"]
    if any(has_validation(setting.config.data) for setting in done):
        splits = ["validation", "test"]
    rows = []
    for setting in done:
        n = len(setting.finished)
        cells = [*(setting.values[k] for k in fields), str(n) if n == seeds else f"{n} of {seeds}"]
        for split in splits:
            known = n and f"{split}_accuracy" in setting.finished[0].lines[-1]
            cells.append(markdown.spread(setting.accuracies(split)) if known else "-")
        cells.append("best" if setting is best else _problems(setting))
        rows.append(cells)
    heads = [*fields, "n", *(f"{split} accuracy" for split in splits), ""]
    return heads, rows


def _problems(setting: Setting) -> str:
    """The problems, each once with its seeds; sweep.json has their full text."""
    by_text: dict[str, list[str]] = {}
    for run in setting.runs:
        if run.problem:
            by_text.setdefault(_short(run.problem), []).append(str(run.seed))
    return "; ".join(f"{text} (seed {', '.join(found)})" for text, found in by_text.items())


def _short(problem: str) -> str:
    """A problem for the table: only the last part of long paths, and at most 120 characters."""

    def last_part(path: re.Match) -> str:
        return path[0] if len(path[0]) <= 30 else "…/" + path[0].rstrip("/").rpartition("/")[2]

    text = re.sub(r"[^\s:;,=()]*/[^\s:;,()]*", last_part, problem)
    return text if len(text) <= 120 else f"{text[:119]}…"
