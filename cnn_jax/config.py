"""The configuration of a run: frozen dataclasses, typed overrides, a JSON form, every check.

An experiment file returns a `Config`; `--set field=value` changes it. Modules and Optax factories
stand in it as themselves.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import optax

from cnn_jax import models
from cnn_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, how they are split, scaled and augmented.

    Attributes:
      name: a TFDS dataset of labelled images ("fashion_mnist", "mnist:3.*.*"), or "garments".
      train_split: a TFDS split of that dataset, for training.
      test_split: the split that is evaluated; it chooses nothing.
      validation_examples: examples taken from the training split, by the seed 0 whatever the run's
        seed, to choose the best checkpoint by; 0 trains on all of them.
      image_size: (height, width) to which every image is resized; needed where sizes differ.
      mean: subtracted from the pixels in [0, 1], one value or one a channel.
      std: divides them after that, likewise.
      flip: mirrors half of the training images, at random.
      alternating_flip: mirrors half of the training images, at random, in the first epoch, and each
        of them in every other epoch after that (arXiv 2404.00498); instead of `flip`.
      crop_padding: pixels of reflected border from which a training image is cropped at random.
      test_time_augmentation: the views of an image whose logits are averaged in evaluation and
        prediction: the image alone, with its mirror image, or both also shifted by a pixel.
    """

    name: str
    train_split: str = "train"
    test_split: str = "test"
    validation_examples: int = 0
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip: bool = False
    alternating_flip: bool = False
    crop_padding: int = 0
    test_time_augmentation: Literal["none", "mirror", "mirror_shift"] = "none"


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. The defaults are the lecture's (that is, Keras's).

    Attributes:
      model: a linen module that maps float32 images [N, H, W, C] to logits.
      data: the dataset.
      seed: of the initialisation, the order of the examples, augmentation and dropout.
      epochs: passes over the training examples.
      batch_size: examples a step, over all devices; a last incomplete batch is left out.
      eval_batch_size: examples a step of evaluation, which counts every example.
      optimizer: an Optax factory that takes `learning_rate`, as in optax.adam or
        functools.partial(optax.sgd, momentum=0.9).
      learning_rate: the highest one of the schedule.
      schedule: its course after the warm-up.
      warmup_epochs: epochs of linear rise from 0.
      final_learning_rate: where the cosine and linear schedules end.
      weight_decay: of kernels, not of biases and scales. Decoupled where the optimizer takes
        `weight_decay` and a mask (adamw, lion, ...), otherwise an L2 term in the gradient.
      clip_norm: limit of the gradient's global norm.
      label_smoothing: in [0, 1).
      compute_dtype: of activations and of the kernels' copies they meet; parameters stay float32.
      init_examples: training examples that the initialisation sees, for models that take their
        first parameters from the data, as SpeedrunCNN does.
      devices: how many of the visible ones are used; None: all.
      eval_every_epochs: epochs between evaluations; the last epoch is always evaluated.
      checkpoint_every_epochs: epochs between checkpoints; the last epoch is always saved.
      checkpoint_every_steps: steps between further checkpoints within an epoch.
      checkpoint_every_minutes: minutes between further checkpoints within an epoch.
      keep_checkpoints: how many of the latest are kept, besides the best one by validation accuracy.
      log_every_steps: steps between two points of the TensorBoard curves and the progress bar.
      grace_seconds: time to save after SIGTERM or SIGUSR1; then the process ends without.
      heartbeat_seconds: with several processes, silence after which one is taken for dead.
    """

    model: nn.Module
    data: DataConfig
    seed: int = 0
    epochs: int = 10
    batch_size: int = 32
    eval_batch_size: int = 500
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_epochs: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    init_examples: int = 0
    devices: int | None = None
    eval_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    keep_checkpoints: int = 2
    log_every_steps: int = 100
    grace_seconds: float = 30.0
    heartbeat_seconds: int = 100


UNIONS = (typing.Union, types.UnionType)

# What a run may change when it goes on: none of these touches the mathematics.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "devices",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "log_every_steps",
        "grace_seconds",
        "heartbeat_seconds",
    }
)


# ---------------------------------------------------------------------------------- overrides


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with each "field=value" or "part.field=value" applied, typed by the field.

    Raises:
      ConfigError: an unknown field (with the nearest names) or a value of the wrong type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write field=value, as in --set batch_size=128")
        config = _replace(config, path.strip().split("."), path.strip(), text.strip())
    return config


def _replace(value: Any, names: list[str], path: str, text: str) -> Any:
    fields = _fields(value)
    name, *rest = names
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5) or sorted(fields)
        where = path.removesuffix(".".join(names)).rstrip(".")
        raise ConfigError(
            f"--set {path}={text}: {where or 'the configuration'} has no field {name!r}; "
            f"nearest: {', '.join(near)}"
        )
    old = value.keywords[name] if isinstance(value, functools.partial) else getattr(value, name)
    if rest:
        if not _fields(old):
            raise ConfigError(f"--set {path}={text}: {name} = {_shown(old)} has no fields")
        new = _replace(old, rest, path, text)
    else:
        try:
            new = _parse(text, fields[name], old)
        except ValueError as error:
            raise ConfigError(f"--set {path}={text}: {error}") from None
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *value.args, **{**value.keywords, name: new})
    return dataclasses.replace(value, **{name: new})


def _fields(value: Any) -> dict[str, Any]:
    """The names that --set may use inside `value`, with their types."""
    if isinstance(value, functools.partial):
        return {name: type(old) for name, old in value.keywords.items()}
    if not _is_record(value):
        return {}
    hints = typing.get_type_hints(type(value))
    hidden = {"parent", "name"} if isinstance(value, nn.Module) else set()
    return {f.name: hints[f.name] for f in dataclasses.fields(value) if f.name not in hidden}


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parse(text: str, hint: Any, old: Any) -> Any:
    """`text` as a value of type `hint`; a ValueError says what is wrong with it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        if text.lower() == "none" and type(None) in arguments:
            return None
        *others, last = (kind for kind in arguments if kind is not type(None))
        for kind in others:
            with contextlib.suppress(ValueError):
                return _parse(text, kind, old)
        return _parse(text, last, old)
    if origin is Literal:
        by_text = {str(value): value for value in arguments}
        if text not in by_text:
            raise ValueError(f"{text!r} is not one of {', '.join(by_text)}")
        return by_text[text]
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").rstrip(", ").split(",")]
        kinds = arguments if Ellipsis not in arguments else (arguments[0],) * len(items)
        if len(items) != len(kinds):
            raise ValueError(f"{text!r} is not a list of {len(kinds)} values")
        return tuple(_parse(item, kind, None) for item, kind in zip(items, kinds, strict=True))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is not true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{text!r} is not {kind}") from None
    if hint is str:
        return text
    inside = ", ".join(_fields(old))
    advice = f"; set one of its fields: {inside}" if inside else ""
    raise ValueError(f"an experiment file chooses this, --set does not{advice}")


# --------------------------------------------------------------------------------- JSON form


def to_json(value: Any) -> Any:
    """`value` as plain JSON: modules and functions by name, with their fields."""
    if isinstance(value, functools.partial):
        return {"function": _name(value.func)} | {k: to_json(v) for k, v in value.keywords.items()}
    if _is_record(value):
        head = {"class": type(value).__name__} if isinstance(value, nn.Module) else {}
        return head | {name: to_json(getattr(value, name)) for name in _fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _name(value)


def data_from_json(saved: dict) -> DataConfig:
    """The `data` part of a config.json.

    Raises:
      ConfigError: it is not one.
    """
    return _from_json(DataConfig, saved, "data")


def model_from_json(saved: dict, own: nn.Module | None = None) -> nn.Module:
    """The `model` part of a config.json, for the classes of `cnn_jax.models`.

    Args:
      saved: it.
      own: the model where it is another one, from its experiment file; also inside `Convolutional`.

    Raises:
      ConfigError: another class, which only its experiment file can give.
    """
    name = saved.get("class")
    if own is not None and (name != "Convolutional" or isinstance(own, models.Convolutional)):
        return own
    if name not in models.__all__:
        raise ConfigError(
            f"model.class: {name!r} is not one of cnn_jax.models ({', '.join(models.__all__)}); "
            "name the experiment file that defines it with --experiment"
        )
    fields = {key: value for key, value in saved.items() if key != "class"}
    if hidden := fields.keys() & {"parent", "name"}:  # flax's own
        raise ConfigError(f"model.{min(hidden)}: {name} has no such field")
    return _from_json(vars(models)[name], fields, "model", own)


def _from_json(kind: type, saved: dict, path: str, own: nn.Module | None = None) -> Any:
    def restored(value: Any) -> Any:
        if isinstance(value, dict) and "class" in value:
            return model_from_json(value, own)
        return tuple(map(restored, value)) if isinstance(value, list) else value

    try:
        value = kind(**{key: restored(value) for key, value in saved.items()})
    except TypeError as error:
        raise ConfigError(f"{path}: {saved}: {error}") from None
    _check_types(value, f"{path}.")
    return value


def with_defaults(saved: dict, value: Any) -> dict:
    """`saved`, the JSON form of a `value` of earlier code, with later fields at their defaults."""
    filled = dict(saved)
    defaults = {f.name: f.default for f in dataclasses.fields(value)} if _is_record(value) else {}
    for name in _fields(value):
        if isinstance(saved.get(name), dict):
            filled[name] = with_defaults(saved[name], getattr(value, name))
        elif defaults.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            filled.setdefault(name, json.loads(json.dumps(to_json(defaults[name]))))
    return filled


def differences(saved: dict, wanted: dict, prefix: str = "") -> list[str]:
    """One "field: saved -> wanted" for each field in which two JSON forms differ."""
    lines = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, after = saved.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _name(function: Any) -> str:
    package = getattr(function, "__module__", "").split(".")[0]
    return f"{package}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _shown(value: Any) -> str:
    return str(to_json(value))


# ------------------------------------------------------------------------------------ checks


def validate(config: Config) -> Config:
    """`config`, after checking every field's range.

    Raises:
      ConfigError: the first field that is out of range: its name, its value, what is allowed.
    """

    def check(good: bool, field: str, allowed: str) -> None:
        if not good:
            value = functools.reduce(getattr, field.split("."), config)
            raise ConfigError(f"{field}={_shown(value)}: must be {allowed}")

    _check_types(config, "")
    check(callable(config.optimizer), "optimizer", "an Optax factory such as optax.adam")
    check(
        _takes_learning_rate(config.optimizer),
        "optimizer",
        "callable as optimizer(learning_rate=0.001)",
    )
    fixed = getattr(config.optimizer, "keywords", {}).keys() & {"learning_rate", "weight_decay"}
    check(not fixed, "optimizer", f"without {', '.join(sorted(fixed))}: set the field of that name")
    classes = getattr(config.model, "num_classes", 1)
    check(not isinstance(classes, int) or classes >= 1, "model.num_classes", "at least 1")
    check(0 <= config.seed < 2**31, "seed", "from 0 to 2**31 - 1")
    check(1 <= config.epochs < 2**31, "epochs", "from 1 to 2**31 - 1")
    for field in (
        "batch_size",
        "eval_batch_size",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "keep_checkpoints",
        "log_every_steps",
        "heartbeat_seconds",
    ):
        check(getattr(config, field) >= 1, field, "at least 1")
    for field in ("devices", "checkpoint_every_steps"):
        value = getattr(config, field)
        check(value is None or value >= 1, field, "at least 1, or none")
    for field in ("learning_rate", "grace_seconds"):
        check(0 < getattr(config, field) < math.inf, field, "greater than 0 and finite")
    for field in ("clip_norm", "checkpoint_every_minutes"):
        value = getattr(config, field)
        check(value is None or 0 < value < math.inf, field, "greater than 0 and finite, or none")
    for field in ("warmup_epochs", "final_learning_rate", "weight_decay"):
        check(0 <= getattr(config, field) < math.inf, field, "0 or more, and finite")
    check(config.warmup_epochs <= config.epochs, "warmup_epochs", f"at most epochs={config.epochs}")
    check(0 <= config.label_smoothing < 1, "label_smoothing", "in [0, 1)")
    check(config.init_examples >= 0, "init_examples", "0 or more")
    data = config.data
    for field in ("name", "train_split", "test_split"):
        check(bool(getattr(data, field)), f"data.{field}", "given")
    check(data.validation_examples >= 0, "data.validation_examples", "0 or more")
    check(data.crop_padding >= 0, "data.crop_padding", "0 or more")
    check(
        not (data.flip and data.alternating_flip), "data.alternating_flip", "False with data.flip"
    )
    size = data.image_size
    check(size is None or min(size) >= 1, "data.image_size", "at least 1,1, or none")
    mean, std = data.mean, data.std
    check(len(mean) > 0 and all(map(math.isfinite, mean)), "data.mean", "finite numbers")
    check(
        len(std) > 0 and all(0 < s < math.inf for s in std),
        "data.std",
        "numbers greater than 0 and finite",
    )
    return config


def _check_types(value: Any, prefix: str) -> None:
    """Refuses an experiment file's epochs="10" here, in one line, instead of deep in the run."""
    for name, hint in _fields(value).items():
        item = getattr(value, name)
        if not _matches(item, hint):
            raise ConfigError(f"{prefix}{name}={item!r}: must be {_described(hint)}")
        if isinstance(value, Config) and _is_record(item):
            _check_types(item, f"{name}.")


def _matches(item: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return any(_matches(item, kind) for kind in arguments)
    if origin is Literal:
        return item in arguments
    if origin is tuple:
        if not isinstance(item, tuple):
            return False
        kinds = arguments if Ellipsis not in arguments else (arguments[0],) * len(item)
        return len(item) == len(kinds) and all(map(_matches, item, kinds))
    if hint is float:
        return isinstance(item, (int, float)) and not isinstance(item, bool)
    if hint is int:
        return isinstance(item, int) and not isinstance(item, bool)
    # What a module of the user's own says of its fields otherwise is between the two of them.
    return hint not in (bool, str, types.NoneType, nn.Module, DataConfig) or isinstance(item, hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return str(hint)
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if hint in (bool, int, float, str) else f"an object of {hint.__name__}"


def _takes_learning_rate(factory: Callable) -> bool:
    try:
        inspect.signature(factory).bind(learning_rate=1e-3)
    except (TypeError, ValueError):
        return False
    return True
