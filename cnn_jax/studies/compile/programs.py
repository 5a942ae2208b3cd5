"""Compiles a run's own training and evaluation steps for a target, and says what XLA made of them."""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.data import loader
from cnn_jax.data.sources import InMemory
from cnn_jax.studies.compile import hlo
from cnn_jax.studies.compile.targets import Target
from cnn_jax.train import evaluation, optim, parallel
from cnn_jax.train.step import init_state, train_step

# Enters the program only as a constant, in the schedule of the learning rate.
_STEPS_PER_EPOCH = 1000


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: of the arguments, the model's parameters.
      state: the rest of the training state, or the model's other variables.
      arguments: all arguments, with the padding that the device's layout adds.
      temporaries: activations, gradients and what else the step needs while it runs.
      peak: arguments, outputs that reuse none of them, temporaries and code.
    """

    parameters: int
    state: int
    arguments: int
    temporaries: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One step's program on each of the target's devices.

    Attributes:
      name: "training" or "evaluation".
      batch_size: examples a step, on all devices.
      devices: their number.
      seconds: to compile.
      memory: on one device.
      flops: a step on one device.
      text: XLA's, after all its passes.
      program: the same, read.
    """

    name: str
    batch_size: int
    devices: int
    seconds: float
    memory: Memory
    flops: float
    text: str
    program: hlo.Program


def compile_steps(
    config: Config, image_shape: tuple[int, int, int], target: Target
) -> Iterator[Compiled]:
    """Compiles the training step and the evaluation step of a run.

    Args:
      config: the run.
      image_shape: (H, W, C) of its images.
      target: the devices; `config.devices` takes the first of them.

    Raises:
      ConfigError: the batch cannot be split over the devices, or does not fit into their memory.
    """
    mesh = parallel.make_mesh(config.devices, target.devices)
    parallel.check_divides(mesh, config.batch_size)
    optimizer = optim.make_optimizer(config, _STEPS_PER_EPOCH)
    init = functools.partial(init_state, config.model, optimizer, image_shape, config.seed)
    seen = [jax.ShapeDtypeStruct((config.init_examples, *image_shape), np.float32)]
    state = jax.eval_shape(init, *(seen if config.init_examples else []))
    step = functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
    examples = InMemory(
        np.zeros((config.batch_size, *image_shape), np.uint8),
        np.zeros(config.batch_size, np.int32),
        (),
    )
    order = np.arange(config.batch_size)
    batch = _shapes(next(loader.training_batches(examples, order, config.batch_size)))
    lower = functools.partial(parallel.lower_step, step, compute_dtype=config.compute_dtype)
    yield _compiled("training", lower, mesh, state, batch, config.batch_size)
    size = -(-config.eval_batch_size // mesh.size) * mesh.size
    batch = _shapes(next(loader.evaluation_batches(examples, size)))
    make = functools.partial(
        evaluation.make_eval_step, config.model, config.data, config.compute_dtype
    )
    yield _compiled(
        "evaluation",
        lambda mesh, *arguments: make(mesh).lower(*arguments),
        mesh,
        state.variables,
        batch,
        size,
    )


def _compiled(
    name: str, lower: Callable, mesh: Any, state: Any, batch: Any, batch_size: int
) -> Compiled:
    lowered = lower(mesh, state, batch)
    began = time.perf_counter()
    with _without_cache(), _telling_of_memory(name, batch_size):
        compiled = lowered.compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    found = compiled.memory_analysis()
    parameters = _bytes(getattr(state, "params", None) or state["params"])
    memory = Memory(
        parameters=parameters,
        state=_bytes(state) - parameters,
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        peak=found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes,
    )
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Compiled(name, batch_size, mesh.size, seconds, memory, flops, text, hlo.Program(text))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew, so that the seconds are those of the compiler."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def _telling_of_memory(name: str, batch_size: int) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        needs = f"needs {found[1]} of the {found[2]}" if found else "needs more than the memory"
        raise ConfigError(
            f"{name} with a batch of {batch_size}: {needs} of a device; take a smaller batch or more "
            "devices"
        ) from error


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
