"""Compiles a run's own training and evaluation steps for a target, and says what XLA made of them."""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.data import loader, statistics
from cnn_jax.data.examples import InMemory
from cnn_jax.studies.compile import hlo
from cnn_jax.studies.compile.findings import Findings, find
from cnn_jax.studies.compile.targets import Target
from cnn_jax.train import evaluation, optim, parallel, start
from cnn_jax.train.step import train_step

# Enters the program only as a constant, in the schedule of the learning rate.
_STEPS_PER_EPOCH = 1000
# The batch from which the shapes of a larger one are taken.
_EXAMPLES = 8


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
      compute_dtype: of the configuration.
      matmul_precision: likewise.
      seconds: to compile.
      memory: on one device.
      flops: a step on one device.
      outputs: how many arrays it returns.
      text: XLA's, after all its passes.
      findings: what it contains.
    """

    name: str
    batch_size: int
    devices: int
    compute_dtype: str
    matmul_precision: str
    seconds: float
    memory: Memory
    flops: float
    outputs: int
    text: str
    findings: Findings


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
    examples = _examples(image_shape)
    # What a run takes from its data enters the program as constants.
    config = statistics.in_numbers(config, examples)
    optimizer = optim.make_optimizer(config, _STEPS_PER_EPOCH)
    seen = [jax.ShapeDtypeStruct((config.init_examples, *image_shape), np.float32)]
    init = start.state_maker(config, optimizer, image_shape)
    state = jax.eval_shape(init, *(seen if config.init_examples else []))
    batch = next(loader.training_batches(examples, np.arange(_EXAMPLES), _EXAMPLES))
    step = functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
    train = parallel.jit_step(step, mesh, **parallel.jit_options(config))
    compiled = functools.partial(_compiled, mesh, target, config)
    yield compiled("training", train, state, _shapes(batch, config.batch_size))
    size = -(-config.eval_batch_size // mesh.size) * mesh.size
    evaluated = _shapes(next(loader.evaluation_batches(examples, _EXAMPLES)), size)
    evaluate = evaluation.make_eval_step(config, mesh)
    yield compiled("evaluation", evaluate, state.variables, evaluated)


def _examples(image_shape: tuple[int, int, int]) -> InMemory:
    """Noise of one class."""
    pixels = np.random.default_rng(0).integers(0, 256, (_EXAMPLES, *image_shape), np.uint8)
    return InMemory(pixels, np.zeros(_EXAMPLES, np.int32), ("noise",))


def _compiled(
    mesh: Mesh, target: Target, config: Config, name: str, jitted: Any, state: Any, batch: Any
) -> Compiled:
    size = len(batch["label"])
    lowered = parallel.lower(jitted, state, batch)
    with _without_cache(), _telling_of_memory(name, size):
        began = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - began
    # Not of `compiled`: the compiler for GPUs does not count, and others count what they made.
    platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
    traced = jax.jit(jitted.__wrapped__).trace(state, batch)
    flops = traced.lower(lowering_platforms=(platform,)).cost_analysis()["flops"] / mesh.size
    text = compiled.as_text()
    assert text is not None, "XLA's compilers give it"
    memory = _memory(compiled.memory_analysis(), state)
    if target.rates and memory.peak > target.rates.memory:
        raise _too_large(name, size, f"{memory.peak:,}", f"{target.rates.memory:,.0f}")
    return Compiled(
        name,
        size,
        mesh.size,
        config.compute_dtype,
        config.matmul_precision,
        seconds,
        memory,
        flops,
        len(jax.tree.leaves(lowered.out_info)),
        text,
        find(hlo.Program(text)),
    )


def _memory(found: Any, state: Any) -> Memory:
    parameters = _bytes(state["params"] if isinstance(state, dict) else state.params)
    return Memory(
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
        # "required for HLO temporaries (66.56G) exceeds available HBM (15.75G)"
        found = re.search(r"\(([\d.]+\w)\) exceeds available \w+ \(([\d.]+\w)\)", str(error))
        raise _too_large(
            name, batch_size, *(found.groups() if found else ("more", "fewer"))
        ) from error


def _too_large(name: str, batch_size: int, needed: str, there: str) -> ConfigError:
    return ConfigError(
        f"{name} with a batch of {batch_size}: needs {needed} bytes on each device, which has "
        f"{there}; take a smaller batch or more devices"
    )


def _shapes(batch: dict[str, np.ndarray], size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Those of a batch of this size that is otherwise like `batch`, which takes memory."""
    return {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in batch.items()
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
