"""Exact evaluation: of a split during training, and of a workdir's checkpoint afterwards."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import checkpoint, parallel, step
from cnn_jax import workdir as workdirs
from cnn_jax.checks import validate
from cnn_jax.config import Config, DataConfig
from cnn_jax.config_json import data_from_json, model_from_json
from cnn_jax.data import batches, sources
from cnn_jax.errors import CheckpointError, DataError
from cnn_jax.models.layers import takes_one_image_size


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
      batch_size: divisible by the devices; part of the result's last digits.
      mesh: the devices.
      before_each: called before each batch; what it raises ends the evaluation.
    """
    # A batch larger than the split would be padding only.
    batch_size = min(batch_size, -(-len(examples) // mesh.size) * mesh.size)
    sums: list[Any] = []
    for batch in batches.evaluation_batches(examples, batch_size):
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


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as its workdir holds it.

    Attributes:
      workdir: its folder.
      experiment: the name it was started under.
      model: the module.
      data: the dataset it was trained on, with its scaling.
      class_names: of the logits, in order.
      image_shape: (H, W, C) of the training images.
      batch_size: examples a step of evaluation.
      compute_dtype: of the activations.
      step: of the checkpoint.
      variables: "params" and "batch_stats" as NumPy arrays.
      saved: the whole of config.json.
    """

    workdir: Path
    experiment: str
    model: nn.Module
    data: DataConfig
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    batch_size: int
    compute_dtype: str
    step: int
    variables: Any
    saved: dict


def load_run(
    workdir: Path, which: str = "latest", model: nn.Module | None = None, verify: bool = True
) -> Run:
    """Restores the model of `workdir`.

    Args:
      workdir: a training run's folder.
      which: "latest", "best" or a step.
      model: the module where it is not one of cnn_jax.models.
      verify: compares the arrays with their checksums.

    Raises:
      CheckpointError: there is no run, no such checkpoint, or it is damaged.
      ConfigError: config.json names a model that is not one of cnn_jax.models, and none was given, or
        a field in it is out of range.
    """
    saved = workdirs.read_config(workdir)
    try:
        config = saved["config"]
        model = model_from_json(config["model"], model)
        data = data_from_json(config["data"])
        image_shape, class_names = tuple(saved["image_shape"]), tuple(saved["class_names"])
        experiment, batch_size = saved["experiment"], config["eval_batch_size"]
        compute_dtype = config["compute_dtype"]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{workdir / 'config.json'}: damaged ({reason})") from None
    validate(Config(model, data, eval_batch_size=batch_size, compute_dtype=compute_dtype))
    restored = checkpoint.Checkpoints(workdir).select(which, verify=verify)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    template = {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
    return Run(
        workdir=workdir,
        experiment=experiment,
        model=model,
        data=data,
        class_names=class_names,
        image_shape=image_shape,
        batch_size=batch_size,
        compute_dtype=compute_dtype,
        step=restored.step,
        variables=checkpoint.fill(template, restored),
        saved=saved,
    )


def evaluate(
    run: Run,
    split: str = "test",
    dataset: str | None = None,
    data_dir: str | None = None,
    devices: int | None = None,
) -> dict:
    """Evaluates a restored run and writes evaluation.json into its workdir.

    Args:
      run: from `load_run`.
      split: "train", "validation", "test", or any split of the dataset.
      dataset: another dataset than the one of the training; its classes must be as many.
      data_dir: where the dataset lies.
      devices: how many to use; None: as many as divide the run's batch.

    Returns:
      The content of evaluation.json.

    Raises:
      DataError: the dataset is missing, damaged, or does not fit the model.
      CheckpointError: evaluation.json cannot be written.
    """
    data = dataclasses.replace(run.data, name=dataset) if dataset else run.data
    examples = sources.load_examples(data, split, data_dir)
    check_fits(run, examples, data.name)
    mesh = parallel.make_mesh(devices or parallel.devices_for(run.batch_size))
    parallel.check_divides(mesh, eval_batch_size=run.batch_size)
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


def check_fits(run: Run, examples: sources.Examples, name: str) -> None:
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
            "so does what ./launch.sh convert makes of this run"
        )
    try:
        image = jax.ShapeDtypeStruct((1, *examples.image_shape), jnp.float32)
        jax.eval_shape(run.model.apply, run.variables, image)
    except ValueError as error:
        raise DataError(f"{sizes} ({error})") from None
