"""The optimizer of a run: schedules and masks on top of Optax."""

import inspect

import jax
import jax.numpy as jnp
import optax

from cnn_jax.config import Config
from cnn_jax.errors import ConfigError


def make_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up from 0, then constant, cosine or linear."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rest = max(config.epochs * steps_per_epoch - warmup, 1)
    peak, end = config.learning_rate, config.final_learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=end / peak),
        "linear": optax.linear_schedule(peak, end, rest),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """The Optax chain of `config`: clipping, weight decay of kernels, the optimizer, its schedule.

    Raises:
      ConfigError: the factory returns something else.
    """
    arguments = {"learning_rate": make_schedule(config, steps_per_epoch)}
    chain = []
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    takes = inspect.signature(config.optimizer).parameters
    masks = {"mask", "weight_decay_mask"} & takes.keys()
    if "weight_decay" in takes and masks:  # given always: its own default may be other than 0
        arguments |= {"weight_decay": config.weight_decay, **dict.fromkeys(masks, kernels)}
    elif config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, kernels))
    optimizer = config.optimizer(**arguments)
    if not isinstance(optimizer, optax.GradientTransformation):
        kind = type(optimizer).__name__
        raise ConfigError(f"optimizer: returns {kind}, must return an optax.GradientTransformation")
    return optax.chain(*chain, optimizer)


def kernels(params: dict) -> dict:
    """True for the arrays that weight decay concerns: two dimensions or more, so no bias or scale."""
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)
