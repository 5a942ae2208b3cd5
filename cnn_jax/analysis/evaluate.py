"""Exact evaluation: of a split during training, and of a workdir's checkpoint afterwards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import PROGRAM
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common.errors import CheckpointError, DataError
from cnn_jax.config import DataConfig
from cnn_jax.data import loader, sources
from cnn_jax.models.layers import takes_one_image_size
from cnn_jax.train import parallel, step
from cnn_jax.train import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation over every example of a split.

    Attributes:
      examples: how many.
      loss: mean softmax cross-entropy.
      accuracy: the share that was classified rightly.
      confusion: int64 [classes, classes], rows by label, columns by prediction.
    """

    examples: int
    loss: float
    accuracy: float
    confusion: np.ndarray

    def class_accuracy(self) -> list[float | None]:
        """The share of each class that was classified rightly; None for a class without examples."""
        totals = self.confusion.sum(1)
        pairs = zip(self.confusion.diagonal(), totals, strict=True)
        return [float(right / total) if total else None for right, total in pairs]


def make_eval_step(model: nn.Module, data: DataConfig, compute_dtype: str, mesh: Any) -> Callable:
    """The compiled `step.eval_step` over a mesh: eval_step(variables, batch)."""
    pure = functools.partial(step.eval_step, model=model, data=data, compute_dtype=compute_dtype)
    return parallel.jit_step(pure, mesh, donate=False)


def evaluate_examples(
    eval_step: Callable,
    variables: Any,
    examples: sources.Examples,
    batch_size: int,
    mesh: Any,
    before_each: Callable[[], None] | None = None,
) -> Result:
    """Evaluates every example once.

    Args:
      eval_step: from `make_eval_step`.
      variables: "params" and "batch_stats", on the mesh.
      examples: a split.
      batch_size: raised to a multiple of the devices; decides the last digits of the loss.
      mesh: the devices.
      before_each: called before each batch; what it raises ends the evaluation.
    """
    # A batch larger than the split would be padding only.
    batch_size = -(-min(batch_size, len(examples)) // mesh.size) * mesh.size
    sums: list[Any] = []
    for batch in loader.evaluation_batches(examples, batch_size):
        if before_each is not None:
            before_each()
        sums.append(eval_step(variables, parallel.shard(batch, mesh)))
        if len(sums) > parallel.QUEUE:
            jax.block_until_ready(sums[-parallel.QUEUE])
    sums = [parallel.to_host(batch_sums) for batch_sums in sums]
    confusion = np.sum([s["confusion"] for s in sums], axis=0, dtype=np.int64)
    loss = float(np.sum([s["loss"] for s in sums], dtype=np.float64))
    total = len(examples)
    return Result(total, loss / total, int(confusion.trace()) / total, confusion)


def evaluate(
    run: RestoredRun,
    split: str = "test",
    dataset: str | None = None,
    data_dir: str | None = None,
    devices: int | None = None,
) -> dict:
    """Evaluates a restored run and writes evaluation.json into its workdir.

    Args:
      run: from `restore.load_run`.
      split: "train", "validation", "test", or any split of the dataset.
      dataset: another dataset than the one of the training; its classes must be as many.
      data_dir: where the dataset lies.
      devices: how many to use; None: all.

    Returns:
      The content of evaluation.json.

    Raises:
      DataError: the dataset is missing, damaged, or does not fit the model.
      CheckpointError: evaluation.json cannot be written.
    """
    data = dataclasses.replace(run.data, name=dataset) if dataset else run.data
    examples = sources.load_examples(data, split, data_dir)
    check_fits(run, examples, data.name)
    mesh = parallel.make_mesh(devices)
    eval_step = make_eval_step(run.model, run.data, run.compute_dtype, mesh)
    variables = parallel.replicate(run.variables, mesh)
    result = evaluate_examples(eval_step, variables, examples, run.batch_size, mesh)
    report = {
        "checkpoint": run.step,
        "dataset": data.name,
        "split": split,
        "examples": result.examples,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "class_accuracy": dict(zip(run.class_names, result.class_accuracy(), strict=True)),
        "confusion_matrix": result.confusion.tolist(),
    }
    try:
        workdirs.write_json(run.workdir / "evaluation.json", report)
    except OSError as error:
        path = run.workdir / "evaluation.json"
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
    return report


def check_fits(run: RestoredRun, examples: sources.Examples, name: str) -> None:
    """Refuses a dataset of another image shape or with more classes than the run's.

    Raises:
      DataError: names both.
    """

    def shown(shape: tuple) -> str:
        return "x".join(map(str, shape))

    if examples.image_shape[2] != run.image_shape[2]:
        raise DataError(
            f"dataset={name}: its images have {examples.image_shape[2]} channels, "
            f"{run.workdir} was trained on {run.image_shape[2]}"
        )
    if len(examples.class_names) > len(run.class_names):
        raise DataError(
            f"dataset={name}: has {len(examples.class_names)} classes, "
            f"{run.workdir} was trained on {len(run.class_names)}"
        )
    if examples.image_shape == run.image_shape:
        return
    sizes = (
        f"dataset={name}: images of {shown(examples.image_shape)}, {run.workdir} was trained on "
        f"{shown(run.image_shape)}"
    )
    if takes_one_image_size(run.model):
        raise DataError(
            f"{sizes}, and {type(run.model).__name__} takes no other size; FullyConvCNN does, and "
            f"so does what {PROGRAM} convert makes of this run"
        )
    try:
        image = jax.ShapeDtypeStruct((1, *examples.image_shape), jnp.float32)
        jax.eval_shape(run.model.apply, run.variables, image)
    except ValueError as error:
        raise DataError(f"{sizes} ({error})") from None
