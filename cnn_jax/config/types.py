"""Lists, parses and checks the fields of a configuration by their type hints."""

import collections.abc
import contextlib
import dataclasses
import functools
import types
import typing
from typing import Any, Literal

import flax.linen as nn

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.schema import Config, DataConfig, Range

_UNIONS = (typing.Union, types.UnionType)
_LISTS = (tuple, collections.abc.Sequence)


def fields_of(value: Any) -> dict[str, Any]:
    """The names of the fields inside a record, a module or a partial call, with their types."""
    if isinstance(value, functools.partial):
        return {name: type(old) for name, old in value.keywords.items()}
    if not is_record(value):
        return {}
    hints = typing.get_type_hints(type(value))
    hidden = {"parent", "name"} if isinstance(value, nn.Module) else set()
    return {f.name: hints[f.name] for f in dataclasses.fields(value) if f.name not in hidden}


@dataclasses.dataclass(frozen=True)
class Description:
    """A field of the configuration, as its definition describes it.

    Attributes:
      name: as in `--set name=value`, without the part before a dot.
      hint: its type.
      default: dataclasses.MISSING if an experiment file must give it.
      range: its allowed values; None: all values of its type.
      help: what it is for, with its unit.
    """

    name: str
    hint: Any
    default: Any
    range: Range | None
    help: str

    @property
    def type_name(self) -> str:
        """Its type in a word, without None; "ints" and "floats" for lists of them."""
        return _named(self.hint)

    @property
    def allowed(self) -> str:
        """Its range in words that follow "must be"."""
        words = self.range.allowed if self.range else _described(self.hint)
        return f"{words}, or none" if _takes_none(self.hint) else words


def described(kind: type) -> list[Description]:
    """The fields of Config or DataConfig, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        hint, *more = typing.get_args(hints[field.name])
        allowed = next((one for one in more if isinstance(one, Range)), None)
        found.append(Description(field.name, hint, field.default, allowed, more[-1]))
    return found


def _takes_none(hint: Any) -> bool:
    return typing.get_origin(hint) in _UNIONS and types.NoneType in typing.get_args(hint)


def is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def parse(text: str, hint: Any, old: Any) -> Any:
    """`text` as a value of type `hint`; raises ValueError with the reason if it is not one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        if text.lower() == "none" and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        *others, last = sorted(kinds, key=lambda kind: typing.get_origin(kind) is not Literal)
        for kind in others:
            with contextlib.suppress(ValueError):
                return parse(text, kind, old)
        return parse(text, last, old)
    if origin is Literal:
        by_text = {_text(value): value for value in arguments}
        if text not in by_text:
            raise ValueError(f"{text!r} is not one of {', '.join(by_text)}")
        return by_text[text]
    if origin in _LISTS:
        inside = text.strip("()[]").rstrip(", ")
        empty = not inside and arguments[:1] == (str,)
        items = [] if empty else [item.strip() for item in inside.split(",")]
        each = _kinds(hint, len(items))
        if len(items) != len(each):
            raise ValueError(f"{text!r} is not a list of {len(each)} values")
        return tuple(parse(item, kind, None) for item, kind in zip(items, each, strict=True))
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
    inside = ", ".join(fields_of(old))
    advice = f", or set one of its fields: {inside}" if inside else ""
    raise ValueError(f"--set cannot change this field; change it in an experiment file{advice}")


def check_types(value: Any, prefix: str) -> None:
    """Raises ConfigError for a value of the wrong type, as an experiment file's epochs="10"."""
    for name, hint in fields_of(value).items():
        item = getattr(value, name)
        if not _matches(item, hint):
            raise ConfigError(f"{prefix}{name}={item!r}: must be {_described(hint)}")
        if isinstance(value, Config) and is_record(item):
            check_types(item, f"{name}.")


def _matches(item: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(_matches(item, kind) for kind in arguments)
    if origin is Literal:
        return item in arguments
    if origin in _LISTS:
        if not isinstance(item, tuple if origin is tuple else (tuple, list)):
            return False
        kinds = _kinds(hint, len(item))
        return len(item) == len(kinds) and all(map(_matches, item, kinds))
    if hint is float:
        return isinstance(item, (int, float)) and not isinstance(item, bool)
    if hint is int:
        return isinstance(item, int) and not isinstance(item, bool)
    # Other type hints, in a user's own module, are not checked.
    return hint not in (bool, str, types.NoneType, nn.Module, DataConfig) or isinstance(item, hint)


def _kinds(hint: Any, count: int) -> tuple:
    """The type of each of `count` items of a tuple or sequence."""
    arguments = typing.get_args(hint)
    several = typing.get_origin(hint) is not tuple or Ellipsis in arguments
    return arguments[:1] * count if several else arguments


def _named(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(_named(kind) for kind in arguments if kind is not types.NoneType)
    if origin is Literal:
        return "str"
    if origin in _LISTS:
        return f"{_named(arguments[0])}s"
    return "function" if origin is collections.abc.Callable else hint.__name__


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(_text, arguments))
    if origin in _LISTS:
        return str(hint)
    if hint is types.NoneType:
        return "None"
    if origin is collections.abc.Callable:
        return "a function"
    return hint.__name__ if hint in (bool, int, float, str) else f"an object of {hint.__name__}"


def _text(value: Any) -> str:
    """A value of a Literal as a user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
