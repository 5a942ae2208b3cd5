"""The data of a run for its report: read from its workdir, and evaluated on its test split."""

import dataclasses
import functools
import logging
import shlex
from pathlib import Path
from typing import Any

import flax.linen as nn

from cnn_jax import PROGRAM, models
from cnn_jax.analysis import evaluate
from cnn_jax.analysis.restore import RestoredRun, load_run
from cnn_jax.analysis.study.measures import Scores
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import experiment
from cnn_jax.config.overrides import override
from cnn_jax.config.serialize import differences, to_json
from cnn_jax.data import sources
from cnn_jax.data.examples import Examples
from cnn_jax.models import summary
from cnn_jax.train import evaluation
from cnn_jax.train.bucket_run import shown
from cnn_jax.train.workdir import metrics, read_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run, its metrics by epoch and its evaluation.

    Attributes:
      run: the restored model.
      lines: of metrics.jsonl; empty if the run stopped in its first epoch.
      summary: its layers.
      test: the test split.
      result: the metrics of the whole test split.
      predictions: for each test example, in the split's order.
      command: trains this run again.
      note: what the command leaves out; empty if nothing.
    """

    run: RestoredRun
    lines: list[dict]
    summary: summary.Summary
    test: Examples
    result: evaluation.Metrics
    predictions: Scores
    command: str
    note: str

    @property
    def seconds(self) -> float | None:
        """Training time of the epochs up to the checkpoint; None if there is none."""
        done = [line["epoch_seconds"] for line in self.lines if line["step"] <= self.run.step]
        return sum(done) if done else None

    @property
    def images_per_second(self) -> float | None:
        """Mean over the time of all epochs; None if there is none."""
        if not self.lines:
            return None
        seconds = sum(line["epoch_seconds"] for line in self.lines)
        return (
            sum(line["epoch_seconds"] * line["images_per_second"] for line in self.lines) / seconds
        )


def gather(
    workdir: Path,
    which: str = "latest",
    own: str | None = None,
    data_dir: str | None = None,
    verify: bool = True,
) -> Facts:
    """Restores a run's checkpoint and evaluates it on its test split.

    Args:
      workdir: a training run's folder.
      which: "latest", "best" or a step.
      own: the experiment that defines the model, where that is not one of cnn_jax.models.
      data_dir: where the dataset lies.
      verify: compares the arrays with their checksums.

    Raises:
      CheckpointError: there is no run or no such checkpoint, or it is damaged.
      ConfigError: the model is not known without `own`.
      DataError: the dataset is missing, damaged, or does not fit the model.
      NotFiniteError: the loss is infinite or NaN.
    """
    saved = read_config(workdir)
    model = _own_model(saved, own)
    run = load_run(workdir, which, model, verify)
    layers = summary.summarise(run.model, run.image_shape)
    test = sources.load_examples(run.data, "test", data_dir)
    test = evaluate.fitting(run, test, run.data.name)
    log.info("evaluating %s on %s test examples", shown(workdir), f"{len(test):,}")
    result, predictions = evaluate.make_scorer(run)(run.variables, test)
    evaluate.check_loss(run, f"{run.data.name}/test", result.loss)
    command, note = command_of(shown(workdir), saved, own)
    lines = metrics(workdir)
    return Facts(run, lines, layers, test, result, predictions, command, note)


def _own_model(saved: dict, own: str | None) -> nn.Module | None:
    model = saved["config"]["model"]
    while isinstance(model.get("model"), dict):  # a converted network holds the original one
        model = model["model"]
    known = model.get("class") in models.__all__
    return experiment.load(own).model if own and not known else None


def command_of(workdir: Path | str, saved: dict, own: str | None = None) -> tuple[str, str]:
    """The command that trains a run again from its config.json, and a note on what it leaves out."""
    if isinstance(origin := saved.get("converted_from"), dict):
        config = saved["config"]
        trained = {"converted_from": None, "config": config | {"model": config["model"]["model"]}}
        command, note = command_of(Path(origin["workdir"]), saved | trained, own)
        convert = ["convert", f"--workdir={origin['workdir']}", f"--output={workdir}"]
        return f"{command}\n{shlex.join([PROGRAM, *convert])}", note
    name = saved["experiment"]
    if own and Path(own).stem == name:  # config.json does not hold the path of a user's file
        name = own
    flags = [[f"--experiment={name}"], [f"--workdir={workdir}"]]
    try:
        # A workdir may be untrusted: it must not choose a Python file to run.
        default = experiment.load(name if name in (own, *experiment.names()) else "")
    except ConfigError:
        return _shell(flags), (
            "That experiment's file was not found, so changes made with --set are not listed here; "
            "config.json has every field."
        )
    hidden = []
    for field in _changed(to_json(default), saved["config"]):
        value = functools.reduce(lambda part, key: part.get(key), field.split("."), saved["config"])
        try:
            changed = to_json(override(default, [f"{field}={_text(value)}"]))
        except ConfigError:  # a function or a module, which only the experiment's file can choose
            hidden.append(field)
            continue
        flags.append(["--set", f"{field}={_text(value)}"])
        if field in _changed(changed, saved["config"]):
            hidden.append(field)
    note = f"The experiment's file now gives another {', '.join(hidden)}." if hidden else ""
    return _shell(flags), note


def _changed(default: dict, saved: dict) -> list[str]:
    """The fields in which two JSON forms differ."""
    return [line.partition(":")[0] for line in differences(default, saved)]


def _shell(flags: list[list[str]]) -> str:
    """A command to paste, with one flag on each line, to fit a phone's screen."""
    return " \\\n  ".join([f"{PROGRAM} train", *map(shlex.join, flags)])


def _text(value: Any) -> str:
    """`value` as --set takes it."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def settings(facts: Facts) -> list[tuple[str, str]]:
    """The settings of the run, as names and values to display."""
    saved = facts.run.saved
    config, device = saved["config"], saved["device"]
    data, optimizer = config["data"], config["optimizer"]
    if isinstance(optimizer, dict):
        given = (f"{key}={value}" for key, value in optimizer.items() if key != "function")
        optimizer = f"{optimizer['function']}({', '.join(given)})"
    pairs = [
        ("dataset", data["name"]),
        ("training split", data["train_split"]),
        ("held out for validation", f"{data['validation_examples']:,}"),
        ("test split", data["test_split"]),
        ("optimizer", optimizer),
        ("learning rate", f"{config['learning_rate']:g}, {config['schedule']}"),
        ("batch size", f"{config['batch_size']:,}"),
        ("epochs", f"{config['epochs']:,}"),
        ("seed", str(config["seed"])),
        ("computed in", config["compute_dtype"]),
        ("matmul precision", config.get("matmul_precision", "default")),
        ("device", f"{device['count']} x {device['kind']}"),
    ]
    return pairs + list(saved["versions"].items())


def unique_names(runs: list[Facts]) -> list[str]:
    """A name for each run: the shortest that tells them apart."""
    experiments = [facts.run.experiment for facts in runs]
    folders = [facts.run.workdir for facts in runs]
    for names in (
        [name.rpartition("/")[2] for name in experiments],
        experiments,
        [folder.name for folder in folders],
        [f"{folder.parent.name}/{folder.name}" for folder in folders],
    ):
        if len(set(names)) == len(names) and all(names):
            return names
    return [str(folder) for folder in folders]
