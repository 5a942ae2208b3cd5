"""The optimizer of a run: schedules and masks on top of Optax."""

import dataclasses
import functools
import inspect
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.schema import rate_factors
from cnn_jax.train import groups
from cnn_jax.train.optax_adapter import adapt, coupled


def make_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up from 0, then as `config.schedule` says.

    Raises:
      ConfigError: the warm-up is shorter than a step.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.warmup_epochs and not warmup:
        raise ConfigError(
            f"warmup_epochs={config.warmup_epochs}: must be 0, or at least {1 / steps_per_epoch:g}, "
            "which is one step"
        )
    rest = max(config.epochs * steps_per_epoch - warmup, 1)
    peak, end = config.learning_rate, config.final_learning_rate
    if config.schedule == "one_cycle":
        return _one_cycle(peak, end, warmup, warmup + rest)
    milestones = [round(epoch * steps_per_epoch) - warmup for epoch in config.milestones]
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end / peak),
        "linear": optax.linear_schedule(peak, end, rest),
        "step": optax.piecewise_constant_schedule(
            peak, dict.fromkeys(milestones, config.step_factor)
        ),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def with_constant_rate(config: Config) -> Config:
    """`config` without a schedule, for a run too short for its own."""
    return dataclasses.replace(
        config, schedule="constant", warmup_epochs=0.0, final_learning_rate=0.0, milestones=()
    )


def _one_cycle(peak: float, end: float, rise: int, total: int) -> optax.Schedule:
    """From peak / 25 to the peak in `rise` steps, then to `end` at step `total`, along cosines."""
    rise = rise or max(round(0.3 * total), 1)
    turns = {rise: 25.0, total: end / peak}
    return optax.piecewise_interpolate_schedule("cosine", peak / 25, turns)


def make_optimizer(
    config: Config, steps_per_epoch: int, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """The Optax chain of `config`: clipping, weight decay of kernels, the optimizer, its schedule.

    Args:
      config: the run.
      steps_per_epoch: for the schedule.
      schedule: of the learning rate, instead of that of `config`.

    Raises:
      ConfigError: the factory fails, or does not return a transformation.
    """
    arguments = {"learning_rate": schedule or make_schedule(config, steps_per_epoch)}
    chain = []
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    takes = inspect.signature(config.optimizer).parameters
    masks = {"mask", "weight_decay_mask"} & takes.keys()
    if "weight_decay" in takes and masks:  # always given: its default may not be 0
        free = masks - getattr(config.optimizer, "keywords", {}).keys()  # the user's mask stays
        arguments |= {"weight_decay": config.weight_decay, **dict.fromkeys(free, kernels)}
    elif config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, kernels))
    optimizer = optax.chain(*chain, adapt(config.optimizer, **arguments))
    return (
        _with_rates_of(optimizer, config.learning_rate_of) if config.learning_rate_of else optimizer
    )


def _with_rates_of(
    optimizer: optax.GradientTransformation, entries: tuple[str, ...]
) -> optax.GradientTransformation:
    """`optimizer` with its updates multiplied by the factors of `learning_rate_of`.

    Its `init` raises ConfigError if a pattern fits no parameter, or if the optimizer relates its
    updates to each other, so that a factor on one of them would be more than another rate.
    """
    factors = rate_factors(entries)

    def init(params: Any) -> Any:
        state = optimizer.init(params)
        if names := coupled(state):
            raise ConfigError(
                f"learning_rate_of={','.join(entries)}: must be empty with this optimizer: "
                f"{', '.join(names)} relates its updates to each other; use adam, adamw or sgd"
            )
        groups.check(factors, flax.traverse_util.flatten_dict(params), "learning_rate_of")
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, state, params, **extra)
        flat = flax.traverse_util.flatten_dict(updates)
        scaled = {path: leaf * groups.factor_of(path, factors) for path, leaf in flat.items()}
        return flax.traverse_util.unflatten_dict(scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def kernels(params: dict) -> dict:
    """True for the arrays to which weight decay applies.

    The end of the name decides, as flax.linen names them: "kernel" is decayed, "bias" and "scale"
    are not. Dimensions alone do not tell: attention's biases have two, stacked layers have one more.
    An array with another name is decayed if it has at least two dimensions.
    """

    def decays(path: tuple, array: jax.Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return name.endswith("kernel") or (
            jnp.ndim(array) >= 2 and not name.endswith(("bias", "scale"))
        )

    return jax.tree_util.tree_map_with_path(decays, params)


# ---------------------------------------------------------------------------------- the speedrun


def muon_and_sgd(
    learning_rate: optax.Schedule,
    *,
    bias_learning_rate: float,
    head_learning_rate: float,
    decay: float,
    muon_momentum: float = 0.6,
    momentum: float = 0.85,
    whitening_share: float = 3 / 8,
    batched: bool = False,
    renormalise_every: int = 1,
) -> optax.GradientTransformation:
    """The CIFAR-10 speedrun's optimizer: Muon for filters, Nesterov momentum for the rest.

    Source: airbench94_muon of KellerJordan/cifar10-airbench. Its losses are sums over a batch. Here
    they are means, so its rates for biases and head are multiplied by the batch size.

    Args:
      learning_rate: the schedule of the filters; the other rates are proportional to it.
      bias_learning_rate: the rate of the biases at the first step.
      head_learning_rate: the rate of kernels with two dimensions at the first step.
      decay: the share of a bias or head weight that a step subtracts at the first rate, before
        momentum. The filters have a fixed norm.
      muon_momentum: of the filters.
      momentum: of biases and head.
      whitening_share: the share of the run that trains the bias of a layer named "whitening",
        if the rate falls linearly to 0. The kernel of that layer is not trained.
      batched: orthogonalises all filters of one shape in one call: fewer and larger kernels on a GPU.
      renormalise_every: steps from one renormalisation of the filters to the next.

    Raises:
      ConfigError: the schedule begins at 0; the other rates are divided by its first value.
    """
    first = float(learning_rate(0))
    if not first:
        raise ConfigError("warmup_epochs: must be 0; muon_and_sgd divides by the first rate")

    def course(step: jax.Array) -> jax.Array:
        return learning_rate(step) / first

    def whitening_course(step: jax.Array) -> jax.Array:
        return jnp.maximum(0, 1 - (1 - course(step)) / whitening_share)

    def sgd(rate: float, course: optax.Schedule = course) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale(rate),
            optax.add_decayed_weights(decay),
            optax.trace(momentum, nesterov=True),
            optax.scale_by_schedule(lambda step: -course(step)),
        )

    muon = _muon(muon_momentum)
    filters = optax.chain(
        stacked_by_shape(muon) if batched else muon,
        optax.scale_by_learning_rate(learning_rate),
        renormalise(renormalise_every),
    )
    return optax.multi_transform(
        {
            "filters": filters,
            "biases": sgd(bias_learning_rate),
            "head": sgd(head_learning_rate),
            "whitening bias": sgd(bias_learning_rate, whitening_course),
            "whitening": optax.set_to_zero(),
        },
        _speedrun_groups,
    )


def _muon(momentum: float) -> optax.GradientTransformation:
    return optax.contrib.scale_by_muon(
        ns_coeffs=(3.4445, -4.7750, 2.0315),
        ns_steps=3,
        beta=momentum,
        eps=1e-7,
        weight_dimension_numbers=_filters_as_matrices,
    )


def airbench(batch_size: int, **options: Any) -> functools.partial:
    """`muon_and_sgd` with airbench94_muon's rates for this batch size, as a Config's optimizer.

    Args:
      batch_size: of the Config.
      **options: further ones of `muon_and_sgd`.
    """
    return functools.partial(
        muon_and_sgd,
        bias_learning_rate=0.053 * batch_size,
        head_learning_rate=0.67 * batch_size,
        decay=2e-6 * batch_size,
        **options,
    )


def renormalise(every: int = 1) -> optax.GradientTransformation:
    """Scales each kernel [..., features] to the norm sqrt(features) before the update is added.

    Args:
      every: does so in the first step, and then in one of so many. In the others no norm is computed.
    """

    def scaled(updates: Any, params: Any) -> Any:
        def one(update: jax.Array, kernel: jax.Array) -> jax.Array:
            target = kernel * (kernel.shape[-1] ** 0.5 / jnp.linalg.norm(kernel))
            return update + target - kernel

        return jax.tree.map(one, updates, params)

    def update(updates: Any, step: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        due = step % every == 0
        return jax.lax.cond(due, scaled, lambda same, _: same, updates, params), step + 1

    if every > 1:
        return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)
    always = lambda updates, state, params=None: (scaled(updates, params), state)  # noqa: E731
    return optax.GradientTransformation(lambda _: optax.EmptyState(), always)


def stacked_by_shape(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` on the arrays of each shape stacked along a new first axis.

    It must treat that axis as a batch. Its state has an entry a shape, as "3x3x64x256".
    """

    def name(array: jax.Array) -> str:
        return "x".join(map(str, array.shape))

    def stacked(tree: Any) -> dict[str, jax.Array]:
        groups: dict[str, list[jax.Array]] = {}
        for array in jax.tree.leaves(tree):
            groups.setdefault(name(array), []).append(array)
        return {shape: jnp.stack(arrays) for shape, arrays in groups.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found, state = optimizer.update(stacked(updates), state, params and stacked(params))
        parts = {shape: iter(arrays) for shape, arrays in found.items()}
        return jax.tree.map(lambda array: next(parts[name(array)]), updates), state

    return optax.GradientTransformation(lambda params: optimizer.init(stacked(params)), update)


def _filters_as_matrices(updates: Any) -> Any:
    """Kernels [..., h, w, in, out] as matrices of h * w * in by out."""
    numbers = optax.contrib.MuonDimensionNumbers((-4, -3, -2), -1)
    return jax.tree.map(lambda _: numbers, updates)


def _speedrun_groups(params: dict) -> dict:
    def group(path: tuple, array: jax.Array) -> str:
        if any(entry.key == "whitening" for entry in path):
            return "whitening" if jnp.ndim(array) > 1 else "whitening bias"
        return {1: "biases", 2: "head"}.get(jnp.ndim(array), "filters")

    return jax.tree_util.tree_map_with_path(group, params)
