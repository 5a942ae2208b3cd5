"""All checks of a configuration: by itself, and against the images of its dataset."""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.schema import AUTO, Config, DataConfig
from cnn_jax.config.serialize import to_json
from cnn_jax.config.types import check_types, described, fields_of
from cnn_jax.models.shapes import takes_no, too_small


def validate(config: Config, trained: bool = False) -> Config:
    """Checks every field's range, and that the fields fit together; returns `config`.

    Args:
      config: a run's configuration.
      trained: True for a run that was trained already: values that are only unwise are accepted.

    Raises:
      ConfigError: a field is out of range; gives its name, its value and what is allowed.
    """

    def check(good: bool, field: str, allowed: str) -> None:
        if not good:
            value = functools.reduce(getattr, field.split("."), config)
            raise ConfigError(f"{field}={to_json(value)}: must be {allowed}")

    check_types(config, "")
    check(callable(config.optimizer), "optimizer", "an Optax factory such as optax.adam")
    check(
        _takes_learning_rate(config.optimizer),
        "optimizer",
        "callable as optimizer(learning_rate=0.001)",
    )
    fixed = getattr(config.optimizer, "keywords", {}).keys() & {"learning_rate", "weight_decay"}
    check(not fixed, "optimizer", f"without {', '.join(sorted(fixed))}; set the field of this name")
    classes = getattr(config.model, "num_classes", 1)
    check(not isinstance(classes, int) or classes >= 1, "model.num_classes", "at least 1")
    _check_axis_names(config.model, "model.")
    for record, prefix in ((config, ""), (config.data, "data.")):
        for entry in described(type(record)):
            value = getattr(record, entry.name)
            if entry.range and value is not None:
                check(entry.range.holds(value), prefix + entry.name, entry.allowed)
    _check_together(config, check)
    if not trained:
        mean, std = config.data.mean, config.data.std
        in_range = mean == AUTO or all(0 <= one <= 1 for one in mean)
        check(in_range, "data.mean", "from 0 to 1, as pixels are, or auto")
        in_range = std == AUTO or all(one <= 1 for one in std)
        check(in_range, "data.std", "at most 1, as pixels are from 0 to 1, or auto")
    return config


def _check_together(config: Config, check: Callable[[bool, str, str], None]) -> None:
    """Checks the fields that depend on each other."""
    data, warmup, epochs = config.data, config.warmup_epochs, config.epochs
    check(warmup <= epochs, "warmup_epochs", f"at most epochs={epochs}")
    check(
        not (data.flip and data.alternating_flip), "data.alternating_flip", "False with data.flip"
    )
    parts = config.accumulate_steps
    check(config.batch_size % parts == 0, "batch_size", f"divisible by accumulate_steps={parts}")
    stepwise = config.schedule == "step"
    check(bool(config.milestones) == stepwise, "milestones", "given with schedule=step, else empty")
    if stepwise:
        check(
            warmup < config.milestones[0] and config.milestones[-1] < epochs,
            "milestones",
            f"after warmup_epochs={warmup:g} and before the end, epochs={epochs}",
        )
    if config.schedule == "one_cycle":
        check(warmup < epochs, "warmup_epochs", f"less than epochs={epochs} with one_cycle")
    if config.final_learning_rate:
        check(
            config.schedule not in ("constant", "step"),
            "final_learning_rate",
            f"0 with schedule={config.schedule}, which has no final rate; choose cosine, linear or "
            "one_cycle",
        )
        check(
            warmup < epochs,
            "final_learning_rate",
            f"0 with warmup_epochs={warmup:g} of epochs={epochs}: no epoch is left for the schedule",
        )


def _check_axis_names(value: object, prefix: str) -> None:
    """Refuses a module with a jax.pmap axis: training is one jit over all devices, without axes."""
    for name in fields_of(value):
        inside = value.keywords[name] if isinstance(value, functools.partial) else vars(value)[name]
        if name.endswith("axis_name") and inside is not None:
            raise ConfigError(
                f"{prefix}{name}={inside}: must be none; only parallel.pmap_step has a named axis, "
                "and training needs none: its statistics are those of the whole batch"
            )
        _check_axis_names(inside, f"{prefix}{name}.")


def check_model(model: nn.Module, image_shape: tuple[int, int, int], classes: int) -> int:
    """The number of logits of `model` for such images.

    Raises:
      ConfigError: the model does not fit them, or has fewer logits than there are classes.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        call = functools.partial(model.init_with_output, train=False)
        logits, variables = jax.eval_shape(call, jax.random.key(0), image)
    except Exception as error:  # the layers raise errors of many types
        raise takes_no(image_shape, model, error) from error
    if any(0 in leaf.shape for leaf in jax.tree.leaves((logits, variables))):
        raise too_small(image_shape, model)
    if logits.shape[-1] < classes:
        raise ConfigError(
            f"model.num_classes={logits.shape[-1]}: must be at least {classes}, the number of "
            "classes of the dataset"
        )
    return logits.shape[-1]


def check_init_examples(config: Config, image_shape: tuple[int, int, int]) -> None:
    """Checks that the model's initialisation depends on the images.

    Raises:
      ConfigError: it does not; names the fields `init_examples` and `model`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    program = jax.make_jaxpr(config.model.init)(jax.random.key(0), image).jaxpr
    _, (_, looks_at_images) = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    if not looks_at_images:
        raise ConfigError(
            f"init_examples={config.init_examples}: must be 0, as the first parameters of "
            f"model={type(config.model).__name__} do not depend on images"
        )


def check_images(data: DataConfig, image_shape: tuple[int, int, int]) -> None:
    """Checks that images of this shape can be normalised and cropped as `data` says.

    Raises:
      ConfigError: a field does not fit them; gives its name, its value and what is allowed.
    """
    height, width, channels = image_shape
    for field in ("mean", "std"):
        values = getattr(data, field)
        if len(values) not in (1, channels):
            raise ConfigError(
                f"data.{field}={list(values)}: must be one value, or one for each of the "
                f"{channels} channels"
            )
    if data.crop_padding >= min(height, width):
        raise ConfigError(
            f"data.crop_padding={data.crop_padding}: must be less than the image's "
            f"{min(height, width)} pixels"
        )


def _takes_learning_rate(factory: Callable) -> bool:
    try:
        inspect.signature(factory).bind(learning_rate=1e-3)
    except (TypeError, ValueError):
        return False
    return True
