"""Makes any Optax transformation one that a train step can jit and a checkpoint can hold.

Three cases need this: typed random keys in a state (`optax.noisy_sgd`), the pairs of parameters of
`optax.lookahead`, and optimizers that take gradients at other parameters than their result.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from cnn_jax.common.errors import ConfigError

# What it returns can be compared, which its type does not say.
_structure: Callable[[Any], Any] = jax.tree.structure


@flax.struct.dataclass
class KeyData:
    """A typed random key as uint32, which a checkpoint can hold."""

    data: jax.Array


class SlowParams(NamedTuple):
    """The state of an optimizer that contains `optax.lookahead`, and the slow parameters."""

    inner: optax.OptState
    slow: optax.Params


def adapt(
    factory: Callable[..., optax.GradientTransformation], **arguments: Any
) -> optax.GradientTransformation:
    """The result of `factory(**arguments)`, with a state of plain arrays of fixed shape and type.

    Returns:
      A transformation. Its `init` and `update` raise ConfigError during tracing if the original one
      fails, or if its state changes in shape or type.

    Raises:
      ConfigError: the factory fails, or does not return a transformation.
    """
    function = getattr(factory, "func", factory)
    name = getattr(function, "__qualname__", type(function).__name__)
    optimizer = _tried(name, factory, **arguments)
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        kind = type(optimizer).__name__
        raise ConfigError(f"optimizer: must return an optax.GradientTransformation, not {kind}")
    optimizer = optax.with_extra_args_support(optimizer)
    takes = inspect.signature(optimizer.update).parameters.values()
    taken = {parameter.name for parameter in takes}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)

    def init(params: optax.Params) -> optax.OptState:
        state = _tried(name, optimizer.init, params)
        if any(isinstance(node, optax.LookaheadState) for node in _nodes(state)):
            state = SlowParams(state, jax.tree.map(jnp.copy, params))
        return _without_keys(state)

    def update(
        updates: optax.Updates, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        given = _with_keys(state)
        extra = {key: value for key, value in extra.items() if takes_all or key in taken}
        if isinstance(given, SlowParams):
            pair = optax.LookaheadParams(params, given.slow)
            pairs, inner = _tried(name, optimizer.update, updates, given.inner, pair, **extra)
            updates = pairs.fast
            after = SlowParams(inner, optax.apply_updates(given.slow, pairs.slow))
        else:
            updates, after = _tried(name, optimizer.update, updates, given, params, **extra)
        after = _without_keys(after)
        if _kinds(after) != _kinds(state):
            raise ConfigError(
                f"optimizer: {name} changes the shapes or types of its state from step to step; a "
                "compiled step needs fixed ones, so choose another optimizer"
            )
        return updates, after

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: optax.OptState, params: optax.Params) -> Any:
    """The parameters to evaluate, if the optimizer's paper uses others than the trained ones.

    For `optax.contrib.schedule_free` they are its average x, for `optax.lookahead` the slow ones,
    and for `optax.contrib.sam` the ones before its perturbation.

    Returns:
      A tree like `params`; {} for any other optimizer.

    Raises:
      ConfigError: there are two such optimizers, or one has only a part of the parameters.
    """
    found = [node for node in _nodes(state) if isinstance(node, tuple(_EVALUATED))]
    if not found:
        return {}
    made = [_EVALUATED[type(node)](node, params) for node in found]
    if len(made) > 1 or _structure(made[0]) != _structure(params):
        names = ", ".join(type(node).__name__.removesuffix("State") for node in found)
        raise ConfigError(
            f"optimizer: {names} evaluates the network with parameters of its own; there must be one "
            "such part, and it must hold all parameters: remove the others, and masks or partitions "
            "around it"
        )
    return made[0]


def coupled(state: optax.OptState) -> list[str]:
    """The names of the transformations whose next state presumes that their updates are applied whole.

    They are those of `eval_params`, and the line searches.
    """
    kinds = (*_EVALUATED, optax.LookaheadState, *_LINE_SEARCHES)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [type(node).__name__.removesuffix("State") for node in nodes if isinstance(node, kinds)]


def _of_schedule_free(state: Any, params: optax.Params) -> optax.Params:
    if _structure(state.z) != _structure(params):
        return state.z
    return optax.contrib.schedule_free_eval_params(state, params)


def _of_sam(state: Any, params: optax.Params) -> optax.Params:
    if state.cache is None:  # opaque_mode: a step removes its perturbation
        return params
    back = state.steps_since_sync == 0
    return jax.tree.map(lambda new, old: jnp.where(back, new, old), params, state.cache)


_EVALUATED: dict[type, Callable] = {
    optax.contrib.ScheduleFreeState: _of_schedule_free,
    optax.contrib.SAMState: _of_sam,
    SlowParams: lambda state, params: state.slow,
}


_LINE_SEARCHES = (optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


def _nodes(state: optax.OptState) -> list:
    kinds = (*_EVALUATED, optax.LookaheadState)
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))


def _without_keys(state: optax.OptState) -> optax.OptState:
    def plain(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return jnp.asarray(leaf)
        return KeyData(jax.random.key_data(leaf))

    return jax.tree.map(plain, state)


def _with_keys(state: optax.OptState) -> optax.OptState:
    def key(leaf: Any) -> Any:
        return jax.random.wrap_key_data(leaf.data) if isinstance(leaf, KeyData) else leaf

    return jax.tree.map(key, state, is_leaf=lambda leaf: isinstance(leaf, KeyData))


def _kinds(state: optax.OptState) -> tuple:
    leaves, structure = jax.tree.flatten(state)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _tried(name: str, call: Callable, *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except ConfigError:
        raise
    except Exception as error:  # transformations raise errors of many types
        reason = " ".join(str(error).splitlines()[:1])[:200]
        raise ConfigError(
            f"optimizer: {name} fails ({type(error).__name__}: {reason}); its learning_rate is a "
            "schedule: learning_rate(0) is a number; --debug shows where it fails"
        ) from error
