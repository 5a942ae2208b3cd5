"""The JSON form of a configuration: modules and functions by name, with their fields."""

import dataclasses
import functools
import json
import math
from collections.abc import Collection
from typing import Any

import flax.linen as nn

from cnn_jax import models
from cnn_jax.common.errors import ConfigError
from cnn_jax.config.schema import AUTO, CHANGEABLE_ON_RESUME, Config, DataConfig
from cnn_jax.config.types import check_types, fields_of, is_record


def to_json(value: Any) -> Any:
    """`value` as plain JSON: modules and functions by name, with their fields."""
    if isinstance(value, functools.partial):
        return {"function": _name(value.func)} | {k: to_json(v) for k, v in value.keywords.items()}
    if is_record(value):
        head = {"class": type(value).__name__} if isinstance(value, nn.Module) else {}
        return head | {name: to_json(getattr(value, name)) for name in fields_of(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _name(value)


def data_from_json(saved: dict) -> DataConfig:
    """The DataConfig that the `data` part of a config.json describes.

    Raises:
      ConfigError: the part is invalid.
    """
    return _from_json(DataConfig, saved, "data")


def model_from_json(saved: dict, own: nn.Module | None = None) -> nn.Module:
    """The model that the `model` part of a config.json describes.

    Args:
      saved: that part.
      own: the model of an experiment file, for a class that is not in `cnn_jax.models`; it may be
        inside `Convolutional`. Its fields take the saved values.

    Raises:
      ConfigError: the class is not in `cnn_jax.models` and `own` is None; or `own` is of another class,
        or differs in a field that JSON cannot hold.
    """
    name = saved.get("class")
    if own is not None and (name != "Convolutional" or isinstance(own, models.Convolutional)):
        return _with_fields(own, saved)
    if name not in models.__all__:
        raise ConfigError(
            f"model.class: {name!r} is not one of cnn_jax.models ({', '.join(models.__all__)}); "
            "name the experiment file that defines it with --experiment"
        )
    fields = {key: value for key, value in saved.items() if key != "class"}
    if hidden := fields.keys() & {"parent", "name"}:  # flax's own
        raise ConfigError(f"model.{min(hidden)}: {name} has no such field")
    return _from_json(vars(models)[name], fields, "model", own)


def _with_fields(own: nn.Module, saved: dict) -> nn.Module:
    name, current = type(own).__name__, to_json(own)
    if name != saved.get("class"):
        raise ConfigError(
            f"--experiment: its model is {name}, must be {saved.get('class')} as in the run"
        )
    changed = {
        key: saved[key] for key in saved.keys() & current.keys() if saved[key] != current[key]
    }
    for key, value in changed.items():
        if isinstance(value, dict) or callable(getattr(own, key)):
            raise ConfigError(
                f"model.{key}={current[key]} in the file of --experiment: must be {value}, as in "
                "the run"
            )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()}
    own = own.clone(**values)
    check_types(own, "model.")
    return own


def _from_json(kind: type, saved: dict, path: str, own: nn.Module | None = None) -> Any:
    def restored(value: Any) -> Any:
        if isinstance(value, dict) and "class" in value:
            return model_from_json(value, own)
        return tuple(map(restored, value)) if isinstance(value, list) else value

    try:
        value = kind(**{key: restored(value) for key, value in saved.items()})
    except TypeError as error:
        raise ConfigError(f"{path}: {saved}: {error}") from None
    check_types(value, f"{path}.")
    return value


def with_current_names(data: dict) -> dict:
    """The `data` part of a config.json from earlier code, with the names that its fields have now."""
    data = dict(data)
    if "skip_broken" in data:
        data["skip_corrupt"] = "all" if data.pop("skip_broken") else 0
    return data


def with_defaults(saved: dict, value: Any) -> dict:
    """`saved`, a JSON form from earlier code, with defaults for fields added to `value` since."""
    filled = dict(saved)
    defaults = {f.name: f.default for f in dataclasses.fields(value)} if is_record(value) else {}
    for name in fields_of(value):
        if isinstance(saved.get(name), dict):
            filled[name] = with_defaults(saved[name], getattr(value, name))
        elif defaults.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            filled.setdefault(name, json.loads(json.dumps(to_json(defaults[name]))))
    return filled


def changes(saved: dict, config: Config, free: Collection[str] = ()) -> list[str]:
    """`differences` of a config.json's `config` part from `config`, without the fields in `free`.

    Fields that were added after it was written count as saved with their defaults. Values that are
    still to be computed from the data ("auto", "balanced") differ from none.
    """
    automatic = [f"data.{name}" for name in ("mean", "std") if getattr(config.data, name) == AUTO]
    automatic += ["class_weights"] * (config.class_weights == "balanced")
    free = {*free, *automatic}
    wanted = json.loads(json.dumps(to_json(config)))
    lines = differences(with_defaults(saved, config), wanted)
    return [line for line in lines if line.partition(":")[0] not in free]


def is_of(saved: dict, config: Config) -> bool:
    """Whether `saved`, from a config.json, equals `config` except for CHANGEABLE_ON_RESUME."""
    return not changes(saved, config, CHANGEABLE_ON_RESUME)


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
