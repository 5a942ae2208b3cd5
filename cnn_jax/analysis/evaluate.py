"""The evaluation of a restored run on a split of a dataset."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import PROGRAM
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.analysis.study import measures, temperature
from cnn_jax.analysis.study.measures import Scores
from cnn_jax.common import files
from cnn_jax.common.errors import DataError, NotFiniteError
from cnn_jax.config.paths import is_path, resolved
from cnn_jax.data import folders, sources
from cnn_jax.data.examples import Examples, with_classes
from cnn_jax.data.tfds_builder import SizesDiffer
from cnn_jax.models.layers import takes_one_image_size
from cnn_jax.train import apply, evaluation, parallel, step
from cnn_jax.train.workdir import write_json

log = logging.getLogger(__name__)


def evaluate(
    run: RestoredRun,
    split: str = "test",
    dataset: str | None = None,
    data_dir: str | None = None,
    devices: int | None = None,
) -> dict:
    """Evaluates a restored run.

    Args:
      run: from `restore.load_run`.
      split: "train", "validation", "test", or any split of the dataset.
      dataset: another dataset than the one of the training; its classes are matched by name.
      data_dir: where the dataset lies.
      devices: how many to use; None: all.

    Returns:
      The content of evaluation.json.

    Raises:
      DataError: the dataset is missing, damaged, or does not fit the model.
      NotFiniteError: the loss is infinite or NaN.
    """
    examples, name = load(run, split, dataset, data_dir)
    found = make_scorer(run, devices)(run.variables, examples)
    return report_of(run, name, split, *found)


def load(
    run: RestoredRun, split: str, dataset: str | None = None, data_dir: str | None = None
) -> tuple[Examples, str]:
    """The examples on which to evaluate, with the run's classes, and the name of their dataset.

    The arguments and errors are those of `evaluate`.
    """
    data = run.data
    if dataset:
        data = resolved(dataclasses.replace(data, name=dataset, test_fraction=None))
    elif is_path(data.name):
        _warn_of_changes(run)
    try:
        examples = sources.load_examples(data, split, data_dir)
    except SizesDiffer:
        height, width, _ = run.image_shape
        log.info("%s has images of several sizes: resized to %dx%d", data.name, height, width)
        data = dataclasses.replace(data, image_size=(height, width))
        examples = sources.load_examples(data, split, data_dir)
    return fitting(run, examples, data.name), data.name


def make_scorer(
    run: RestoredRun, devices: int | None = None
) -> Callable[[Any, Examples], tuple[evaluation.Metrics, Scores]]:
    """A function of a run's variables, also of another checkpoint, and examples.

    It gives their metrics and the logits of each, and compiles once for images of one size.
    """
    mesh = parallel.make_mesh(devices)

    def both(variables: Any, batch: dict) -> tuple[dict, dict]:
        # The compiler merges the forward passes of these two.
        sums = step.eval_step(variables, batch, **run.step_options)
        logits = step.predict_step(variables, batch["image"], **run.step_options)
        return sums, {"logits": logits, "label": batch["label"]}

    compiled = parallel.jit_step(both, mesh, donate=False, compute_dtype=run.compute_dtype)

    def score(variables: Any, examples: Examples) -> tuple[evaluation.Metrics, Scores]:
        variables = parallel.replicate(variables, mesh)
        outputs = evaluation.each_batch(compiled, variables, examples, run.batch_size, mesh)
        sums, single = zip(*outputs, strict=True)
        count = len(examples)  # the last batch was filled up
        joined = {name: np.concatenate([s[name] for s in single])[:count] for name in single[0]}
        return evaluation.metrics_of(sums, count), Scores(**joined)

    return score


def check_loss(run: RestoredRun, place: str, loss: float) -> None:
    """Checks the loss of a checkpoint on `place`.

    Raises:
      NotFiniteError: it is infinite or NaN.
    """
    if not np.isfinite(loss):
        raise NotFiniteError(
            f"checkpoint {run.step} of {run.workdir} on {place}: loss={loss} is not finite, so its "
            "accuracy means nothing; choose another checkpoint with --checkpoint"
        )


def report_of(
    run: RestoredRun, dataset: str, split: str, result: evaluation.Metrics, scores: Scores
) -> dict:
    """The content of evaluation.json.

    Raises:
      NotFiniteError: the loss is infinite or NaN.
    """
    check_loss(run, f"{dataset}/{split}", result.loss)
    report = {
        "checkpoint": run.step,
        "dataset": dataset,
        "split": split,
        "examples": result.examples,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "class_accuracy": dict(zip(run.class_names, result.class_accuracy(), strict=True)),
        "confusion_matrix": result.confusion.tolist(),
        **measures.measure(scores, run.class_names),
    }
    if found := temperature.kept(run):
        report["with_temperature"] = temperature.after(scores, run.class_names, found)
    return report


def write(report: dict, workdir: Path, output: Path | None = None) -> Path | None:
    """Writes evaluation.json, and returns its path.

    Args:
      report: from `evaluate`.
      workdir: of the run that was evaluated. If it cannot be written, a warning is logged and None
        returned.
      output: another folder, made if missing.

    Raises:
      ConfigError: `output` cannot be written.
    """
    path = (output or workdir) / "evaluation.json"
    if output:
        with files.writing(output):
            write_json(path, report)
        return path
    try:
        write_json(path, report)
    except OSError as error:
        reason = error.strerror
        log.warning(
            "warning: %s: cannot be written: %s; name another folder with --output", path, reason
        )
        return None
    return path


def fitting(run: RestoredRun, examples: Examples, name: str) -> Examples:
    """`examples` with labels in the order of the run's classes.

    Args:
      run: to evaluate on them.
      examples: of a dataset whose classes may come in another order.
      name: of the dataset, for errors.

    Raises:
      DataError: the model does not take their shape, or the run does not have one of their classes;
        names both.
    """
    unknown = [c for c in examples.class_names if c not in run.class_names]
    if unknown:
        raise DataError(
            f"dataset={name}: {run.workdir} was not trained on its classes {_listed(unknown)}; it was "
            f"trained on {_listed(run.class_names)}"
        )
    _check_shape(run, examples, name)
    return with_classes(examples, run.class_names)


def _warn_of_changes(run: RestoredRun) -> None:
    """Warns if the user's images are not those of the training."""
    dataset = folders.open_dataset(run.data)
    if dataset.digest() != run.saved.get("data_files", dataset.digest()):
        log.warning(
            "warning: the images of %s have changed since the training%s",
            run.data.name,
            ", so that its test split may hold some that were trained on" * dataset.carved,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_shape(run: RestoredRun, examples: Examples, name: str) -> None:

    def shown(shape: tuple) -> str:
        return "x".join(map(str, shape))

    if examples.image_shape[2] != run.image_shape[2]:
        raise DataError(
            f"dataset={name}: its images have {examples.image_shape[2]} channels, must have "
            f"{run.image_shape[2]} as those that {run.workdir} was trained on"
        )
    if examples.image_shape == run.image_shape:
        return
    sizes = (
        f"dataset={name}: its images are {shown(examples.image_shape)}, {run.workdir} was trained on "
        f"{shown(run.image_shape)}"
    )
    if takes_one_image_size(run.model):
        raise DataError(
            f"{sizes}, and {type(run.model).__name__} takes no other size; use FullyConvCNN, or "
            f"{PROGRAM} convert on this run"
        )
    try:
        image = jax.ShapeDtypeStruct((1, *examples.image_shape), jnp.float32)
        jax.eval_shape(functools.partial(apply.forward, run.model), run.variables, image)
    except ValueError as error:
        raise DataError(f"{sizes} ({error})") from None
