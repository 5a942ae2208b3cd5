"""Groups of parameters, by patterns over their names: the frozen ones, those with another rate.

A pattern is a glob ("Conv_*") that fits the name of a parameter ("Conv_0/kernel") or of a module
that it lies in ("Conv_0"). Its star also stands for slashes.
"""

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.common.errors import ConfigError
from cnn_jax.models.layers import BatchNorm

Path = tuple[str, ...]
MOST_NAMES = 30


def fits(patterns: Sequence[str], path: Path) -> bool:
    """Whether a pattern fits the path ("Conv_0", "kernel") or a module before its end."""
    names = ["/".join(path[:length]) for length in range(1, len(path) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def split(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """The parameters that are trained, and the frozen ones; `merge` puts them together again.

    Raises:
      ConfigError: a pattern fits nothing, or all parameters would be frozen.
    """
    if not patterns:
        return params, {}
    flat = flatten_dict(params)
    check(patterns, flat, "freeze")
    frozen = {path: leaf for path, leaf in flat.items() if fits(patterns, path)}
    if len(frozen) == len(flat):
        raise ConfigError(f"freeze={','.join(patterns)}: must leave something to train")
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return unflatten_dict(trained), unflatten_dict(frozen)


def merge(trained: dict, frozen: dict) -> dict:
    """All parameters."""
    if not frozen:
        return trained
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def check(patterns: Iterable[str], paths: Iterable[Path], field: str) -> None:
    """Raises ConfigError for a pattern that fits none of the paths; it lists the names there are."""
    paths = list(paths)
    for pattern in patterns:
        if not any(fits([pattern], path) for path in paths):
            names = sorted("/".join(path) for path in paths)
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            raise ConfigError(
                f"{field}={pattern}: fits no parameter; there are "
                f"{', '.join(names[:MOST_NAMES])}{more}"
            )


def keep_frozen(before: dict, after: dict, patterns: Sequence[str]) -> dict:
    """A model's other collections after a step, with those of frozen modules as before it."""
    if not patterns:
        return after
    old = flatten_dict(before)
    new = flatten_dict(after)
    kept = {path: old[path] if fits(patterns, path[1:]) else leaf for path, leaf in new.items()}
    return unflatten_dict(kept)


def frozen_norms(patterns: Sequence[str]) -> contextlib.AbstractContextManager:
    """Inside it, frozen BatchNorm modules use their running statistics, as in evaluation."""
    if not patterns:
        return contextlib.nullcontext()

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        frozen = isinstance(module, nn.BatchNorm | BatchNorm) and fits(patterns, module.path)
        if not frozen or context.method_name != "__call__":
            return call(*args, **kwargs)
        # The module takes the value from its field or from the call, and refuses both.
        if module.use_running_average is None:
            return call(args[0], **{**kwargs, "use_running_average": True})
        chosen = module.use_running_average
        object.__setattr__(module, "use_running_average", True)
        try:
            return call(*args, **kwargs)
        finally:
            object.__setattr__(module, "use_running_average", chosen)

    return nn.intercept_methods(intercept)


def factor_of(path: Path, factors: dict[str, float]) -> float:
    """The factor of the first pattern that fits; 1 if none does."""
    return next((factor for pattern, factor in factors.items() if fits([pattern], path)), 1.0)
