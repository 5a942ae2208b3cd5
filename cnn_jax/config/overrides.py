"""`--set field=value`: changes values of a configuration; the field's type decides how to parse."""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.schema import Config
from cnn_jax.config.serialize import to_json
from cnn_jax.config.types import fields_of, parse


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with each "field=value" or "part.field=value" applied, parsed by the field's type.

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
    fields = fields_of(value)
    name, *rest = names
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
        where = path.removesuffix(".".join(names)).rstrip(".")
        raise ConfigError(
            f"--set {path}={text}: {where or 'the configuration'} has no field {name!r}; "
            f"{'nearest' if near else 'there are'}: {', '.join(near or sorted(fields))}"
        )
    old = value.keywords[name] if isinstance(value, functools.partial) else getattr(value, name)
    if rest:
        if not fields_of(old):
            raise ConfigError(f"--set {path}={text}: {name} = {to_json(old)} has no fields")
        new = _replace(old, rest, path, text)
    else:
        try:
            new = parse(text, fields[name], old)
        except ValueError as error:
            raise ConfigError(f"--set {path}={text}: {error}") from None
    if isinstance(value, functools.partial):
        return functools.partial(value.func, *value.args, **{**value.keywords, name: new})
    return dataclasses.replace(value, **{name: new})
