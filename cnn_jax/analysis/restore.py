"""Restores a trained model from its workdir, for evaluate, predict, report and the others."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.common.errors import CheckpointError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.serialize import data_from_json, model_from_json
from cnn_jax.config.validate import validate
from cnn_jax.train import checkpoint, step
from cnn_jax.train.workdir import read_config


@dataclasses.dataclass(frozen=True)
class RestoredRun:
    """A trained model, restored from its workdir.

    Attributes:
      workdir: its folder.
      experiment: the name it was started under.
      model: the module.
      data: the dataset it was trained on, with its scaling.
      class_names: of the logits, in order.
      image_shape: (H, W, C) of the training images.
      batch_size: examples in a batch of the evaluation.
      compute_dtype: of the activations.
      matmul_precision: as in `Config`.
      step: of the checkpoint.
      variables: "params" and the model's other collections as NumPy arrays.
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
    matmul_precision: str
    step: int
    variables: Any
    saved: dict

    @property
    def step_options(self) -> dict[str, Any]:
        """The keywords of `step.predict_step` and the other steps of a trained network."""
        names = ("model", "data", "compute_dtype", "matmul_precision")
        return {name: getattr(self, name) for name in names}


def load_run(
    workdir: Path, which: str = "latest", model: nn.Module | None = None, verify: bool = True
) -> RestoredRun:
    """Restores the model of `workdir`.

    Args:
      workdir: a training run's folder.
      which: "latest", "best" or a step.
      model: the module, if it is not one of cnn_jax.models.
      verify: compares the arrays with their checksums.

    Raises:
      CheckpointError: there is no run, no such checkpoint, or it is damaged.
      ConfigError: config.json names a model that is not one of cnn_jax.models, and none was given, or
        a field in it is out of range.
    """
    saved = read_config(workdir)
    try:
        config = saved["config"]
        model = model_from_json(config["model"], model)
        data = data_from_json(config["data"])
        image_shape, class_names = tuple(saved["image_shape"]), tuple(saved["class_names"])
        experiment, batch_size = saved["experiment"], config["eval_batch_size"]
        types = {
            "compute_dtype": config["compute_dtype"],
            "matmul_precision": config.get("matmul_precision", "default"),
        }
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{workdir / 'config.json'}: damaged ({reason})") from None
    validate(Config(model, data, eval_batch_size=batch_size, **types), trained=True)
    restored = checkpoint.Checkpoints(workdir).select(which, verify=verify)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    template = {"params": shapes.get("params", {}), **step.model_state_of(shapes)}
    if any(name.startswith("eval_params/") for name in restored.arrays):
        template["eval_params"] = template["params"]
    variables = checkpoint.fill(template, restored)
    variables["params"] = variables.pop("eval_params", variables["params"])
    return RestoredRun(
        workdir=workdir,
        experiment=experiment,
        model=model,
        data=data,
        class_names=class_names,
        image_shape=image_shape,
        batch_size=batch_size,
        **types,
        step=restored.step,
        variables=variables,
        saved=saved,
    )
