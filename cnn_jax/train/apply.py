"""How a module is called: its compute type, its collections and its random streams."""

import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from cnn_jax.common.errors import ConfigError
from cnn_jax.models.layers import WHOLE_BATCH_DROPOUT


def apply(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    compute_dtype: str,
    train: bool = False,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """The model's output as float32 and, with `train`, the collections that it changes."""
    if compute_dtype != "float32":
        cast = jax.tree.map(lambda p: p.astype(compute_dtype), variables["params"])
        variables, image = {**variables, "params": cast}, image.astype(compute_dtype)
    if not train:
        return forward(model, variables, image).astype(jnp.float32), {}
    logits, updated = model.apply(variables, image, train=True, **options)
    return logits.astype(jnp.float32), updated


def in_precision(matmul_precision: str) -> contextlib.AbstractContextManager:
    """Where matmuls and convolutions have this `Config.matmul_precision`, also those of gradients."""
    if matmul_precision == "default":  # that which the user gave to JAX
        return contextlib.nullcontext()
    return jax.default_matmul_precision(matmul_precision)


def forward(model: nn.Module, variables: Any, image: jax.Array) -> jax.Array:
    """The model's output on normalised images [N, H, W, C], as in evaluation.

    Changes to its collections are dropped. If it needs random numbers, they are the same in every
    call.
    """
    mutable = [name for name in variables if name != "params"] or False

    def call(rngs: dict) -> Any:
        output = model.apply(variables, image, train=False, mutable=mutable, rngs=rngs)
        return output[0] if mutable else output

    try:
        return call({})
    except flax.errors.InvalidRngError:
        return call(make_rngs(call, jax.random.key(0)))


def make_rngs(
    call: Callable[[dict], Any], key: jax.Array, axis_name: str | None = None
) -> dict[str, jax.Array]:
    """A key for each random stream that `call(rngs)` asks for, and for "dropout".

    Under pmap each device gets its own keys; only WHOLE_BATCH_DROPOUT has one key for all devices.
    """
    asked = {"dropout", WHOLE_BATCH_DROPOUT}
    names: set[str] = set()

    class Recorded(dict):
        """A scope's random streams by name, which notes every name that is looked up."""

        def __contains__(self, name: Any) -> bool:
            asked.add(name)
            return super().__contains__(name)

    def record(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        scope = context.module.scope
        if scope is not None:
            scope.rngs = Recorded(scope.rngs)
        return method(*args, **kwargs)

    own = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    keys: dict[str, jax.Array] = {}
    while names != asked:
        names = set(asked)
        keys = {name: jax.random.fold_in(own, zlib.crc32(name.encode())) for name in names}
        keys |= {"dropout": own, WHOLE_BATCH_DROPOUT: key}
        with nn.intercept_methods(record):
            try:
                jax.eval_shape(call, keys)
            except flax.errors.InvalidRngError:  # the stream is in `asked` now
                if names == asked:
                    raise
    return keys


def flat_collections(variables: Mapping[str, Any]) -> dict[tuple, Any]:
    """All variables but the parameters, by path; omits the tuples that `Module.sow` stores."""
    others = {name: tree for name, tree in variables.items() if name != "params"}
    by_path = flax.traverse_util.flatten_dict(others)
    return {path: value for path, value in by_path.items() if not isinstance(value, tuple)}


def collections_after(before: dict[str, Any], updated: dict[str, Any]) -> dict[str, Any]:
    """The collections after a training step, with the shapes and types that they had before it.

    Raises:
      ConfigError: the model makes variables in training that its initialisation does not, or changes
        their shape or type.
    """
    old, new = flat_collections(before), flat_collections(updated)
    for path, value in new.items():
        name = "/".join(path)
        if path not in old:
            raise ConfigError(
                f"model: makes its variable {name} in training only; make it in the initialisation "
                "too, which calls the model with train=False"
            )
        if value.shape != old[path].shape or value.dtype.kind != old[path].dtype.kind:
            raise ConfigError(
                f"model: its variable {name} is {old[path].dtype}{list(old[path].shape)} before a "
                f"step, {value.dtype}{list(value.shape)} after it; must stay the same"
            )
    same = {path: new.get(path, value).astype(value.dtype) for path, value in old.items()}
    return flax.traverse_util.unflatten_dict(same)


def one_score_each(logits: jax.Array) -> jax.Array:
    """Scores [N, classes] unchanged; a class map [N, h, w, classes] averaged over h and w."""
    return logits.mean((1, 2)) if logits.ndim == 4 else logits
