"""What a run starts with: its state, and the compiled step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from cnn_jax.config import Config
from cnn_jax.data import loader
from cnn_jax.data.examples import Examples
from cnn_jax.train import checkpoint, parallel, preprocess, pretrained
from cnn_jax.train.step import TrainState, init_state, train_step


def first_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    examples: Examples,
    mesh: Any,
    source: pretrained.Source | None = None,
    verify: bool = True,
) -> TrainState:
    """The state before the first step, on every device of the mesh.

    Args:
      config: the run.
      optimizer: from `optim.make_optimizer`.
      examples: of training.
      mesh: the devices.
      source: the checkpoint whose parameters are taken where they fit.
      verify: compares the source with its checksums.
    """
    make = state_maker(config, optimizer, examples.image_shape)
    given: list[Any] = preprocess.first_images(config, examples)
    if source:
        wanted = checkpoint.names(jax.eval_shape(make))
        given = [*(given or [None]), pretrained.fitting(source, source.arrays(verify), wanted)]
    return parallel.make_replicated(make, mesh, *given)


def restored_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    examples: Examples,
    mesh: Any,
    restored: checkpoint.Restored,
) -> TrainState:
    """The state of a checkpoint, on every device of the mesh."""
    make = state_maker(config, optimizer, examples.image_shape)
    return parallel.replicate(checkpoint.fill(jax.eval_shape(make), restored), mesh)


def state_maker(config: Config, optimizer: optax.GradientTransformation, shape: tuple) -> Callable:
    """`init_state` of a run on images of this shape (H, W, C); it still takes `image` and `given`."""
    more: dict[str, Any] = {"freeze": config.freeze, "ema_decay": config.ema_decay}
    return functools.partial(init_state, config.model, optimizer, shape, config.seed, **more)


def compiled_step(
    config: Config,
    optimizer: optax.GradientTransformation,
    examples: Examples,
    mesh: Any,
    state: TrainState,
) -> Callable:
    """`step.train_step` of a run, compiled for the mesh: step(state, batch).

    Raises:
      ConfigError: as `parallel.compile_step`.
    """
    step = functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
    jitted = parallel.jit_step(step, mesh, **parallel.jit_options(config))
    size = config.batch_size
    rows = parallel.own_rows(mesh, size)
    batch = next(loader.training_batches(examples, np.arange(size), size, rows=rows))
    return parallel.compile_step(jitted, state, parallel.shard(batch, mesh, size))
