"""The calls of a run's compiled programs: where their examples are, and how many steps each does."""

import abc
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.schema import AUTO
from cnn_jax.data import loader
from cnn_jax.data.examples import Examples, InMemory
from cnn_jax.train import parallel, start
from cnn_jax.train.step import Batch, TrainState, train_step

# The part of a device's memory that the examples may take, so that most is left for the step.
SHARE = 4


class Calls(abc.ABC):
    """How a run's steps are called.

    Attributes:
      described: what to say of it, "" for one step a call from the host's memory.
      queue: the calls that may wait for the device.
    """

    described = ""
    queue = parallel.QUEUE

    @abc.abstractmethod
    def epoch(
        self, order: np.ndarray, epoch: int, done: int
    ) -> Iterator[tuple[int, Callable, Any]]:
        """The calls of an epoch from which steps are left to do.

        Args:
          order: of the examples.
          epoch: from 0.
          done: its steps that were done before.

        Yields:
          The steps done after the call, the program, and what it takes after the state.
        """

    def steps(
        self, state: TrainState, order: np.ndarray, epoch: int, done: int
    ) -> Iterator[tuple[int, TrainState, jax.Array]]:
        """Calls `epoch`'s programs; waits only for those before the last `queue`.

        Yields:
          The steps done, the state after them and the last one's loss, which may not be computed yet.
        """
        running: deque[jax.Array] = deque()
        for after, program, batch in self.epoch(order, epoch, done):
            state, loss = program(state, batch)
            running.append(loss)
            if len(running) > self.queue:
                running.popleft().block_until_ready()
            yield after, state, loss


class Streamed(Calls):
    """One step a call. Another thread makes each batch and sends it, while the one before computes."""

    def __init__(
        self,
        config: Config,
        optimizer: optax.GradientTransformation,
        examples: Examples,
        mesh: Any,
        state: TrainState,
    ):
        """Compiles the step for a state like this."""
        self._batch_size, self._examples, self._mesh = config.batch_size, examples, mesh
        self._step = start.compiled_step(config, optimizer, examples, mesh, state)

    def epoch(
        self, order: np.ndarray, epoch: int, done: int
    ) -> Iterator[tuple[int, Callable, Any]]:
        """As `Calls.epoch`."""
        size = self._batch_size
        rows = parallel.own_rows(self._mesh, size)
        data = loader.training_batches(self._examples, order, size, done, epoch, rows)
        for after, batch in enumerate(parallel.shard_ahead(data, self._mesh, size), done + 1):
            yield after, self._step, batch


class Resident(Calls):
    """Several steps a call. Every device has all examples, and gathers its part of each batch.

    In a loop, XLA:CPU computes convolutions without vector instructions (LeNet trained at a fifth of
    the speed). So there the steps of a call are written out.
    """

    def __init__(
        self,
        config: Config,
        optimizer: optax.GradientTransformation,
        examples: InMemory,
        mesh: Any,
        state: TrainState,
    ):
        """Sends the examples to the devices and compiles the programs."""
        self._config, self._mesh = config, mesh
        self._steps = len(examples) // config.batch_size
        held = {"image": examples.image, "label": examples.label}
        self._held = parallel.put(held, parallel.replicated(mesh))
        most = [self._steps, config.log_every_steps, config.checkpoint_every_steps or self._steps]
        self._length = min(steps_of(config, mesh), *most)
        self.queue = max(1, parallel.QUEUE // self._length)
        step = functools.partial(train_step, model=config.model, optimizer=optimizer, config=config)
        loop = mesh.devices.flat[0].platform != "cpu"
        several = functools.partial(train_steps, step=step, mesh=mesh, loop=loop)
        shardings = (parallel.replicated(mesh), parallel.split(mesh, axis=1))
        jitted = parallel.jit_step(
            several, mesh, shardings=shardings, **parallel.jit_options(config)
        )
        order = np.arange(len(examples))
        self._programs = {
            length: parallel.compile_step(jitted, state, self._arguments(order, 0, 0, length))
            for length in {1, self._length}
        }
        size = sum(array.nbytes for array in held.values()) / 1e6
        calls = f"{self._length} step{'s' * (self._length > 1)} a call"
        self.described = f", {size:.0f} MB of examples on each, {calls}"

    def epoch(
        self, order: np.ndarray, epoch: int, done: int
    ) -> Iterator[tuple[int, Callable, Any]]:
        """As `Calls.epoch`."""
        while done < self._steps:
            length = self._length if self._room(epoch, done) >= self._length else 1
            arguments = self._arguments(order, epoch, done, length)
            done += length
            yield done, self._programs[length], arguments

    def _room(self, epoch: int, done: int) -> int:
        """Steps until one after which the run looks at its state."""
        every = self._config.log_every_steps
        room = min(every - done % every, self._steps - done)
        if saving := self._config.checkpoint_every_steps:
            room = min(room, saving - (epoch * self._steps + done) % saving)
        return room

    def _arguments(self, order: np.ndarray, epoch: int, done: int, length: int) -> tuple:
        """The examples, and which of them are in each step's batch: int32 [length, N]."""
        shape, size = (length, self._config.batch_size), self._config.batch_size
        index = order[done * size : (done + length) * size].reshape(shape).astype(np.int32)
        rows = {"index": index, "epoch": np.full(shape, epoch, np.int32)}
        return self._held, parallel.put(rows, parallel.split(self._mesh, axis=1))


def train_steps(
    state: TrainState, batch: tuple[Batch, Batch], *, step: Callable, mesh: Any, loop: bool
) -> tuple[TrainState, jax.Array]:
    """Several steps on examples that are on the devices.

    Args:
      state: before the steps.
      batch: image uint8 [E, H, W, C] and label int32 [E] of all examples; index int32 [K, N] and
        epoch int32 [K, N] of K steps.
      step: `step.train_step`, with its keywords.
      mesh: the devices.
      loop: makes a loop of the steps; else they are written out one after another.

    Returns:
      The state after the steps, and the last batch's mean loss.
    """
    held, rows = batch

    def one(state: TrainState, row: Batch) -> tuple[TrainState, jax.Array]:
        gathered = {
            name: array.at[row["index"]].get(mode="promise_in_bounds")
            for name, array in held.items()
        }
        gathered = jax.lax.with_sharding_constraint(gathered | row, parallel.split(mesh))
        # Without it, XLA fuses a step with the gathering or with the step before, and rounds otherwise.
        state, gathered = jax.lax.optimization_barrier((state, gathered))
        state, loss = step(state, gathered)
        return jax.lax.with_sharding_constraint((state, loss), parallel.replicated(mesh))

    if loop:
        state, losses = jax.lax.scan(one, state, rows)
        return state, losses[-1]
    for i in range(len(rows["index"])):
        state, loss = one(state, {name: array[i] for name, array in rows.items()})
    return state, loss


def make_calls(
    config: Config,
    optimizer: optax.GradientTransformation,
    examples: Examples,
    mesh: Any,
    state: TrainState,
) -> Calls:
    """The calls of a run, compiled for a state like this.

    Raises:
      ConfigError: `resident_data` or `steps_per_call` does not fit the examples or the devices; or as
        `parallel.lower`.
    """
    if not is_resident(config, examples, mesh):
        return Streamed(config, optimizer, examples, mesh, state)
    assert isinstance(examples, InMemory), "only these can be resident"
    return Resident(config, optimizer, examples, mesh, state)


def is_resident(config: Config, examples: Examples, mesh: Any) -> bool:
    """Whether the examples are kept on the devices. Every process must call it at the same point.

    Raises:
      ConfigError: they do not fit, or `steps_per_call` needs them there.
    """
    wanted, device = config.resident_data, mesh.local_devices[0]
    in_memory, size = False, 0
    if isinstance(examples, InMemory):
        in_memory, size = True, examples.image.nbytes + examples.label.nbytes
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    if wanted is True:
        if not in_memory:
            raise ConfigError(
                "resident_data=true: the decoded training images do not fit in this machine's memory; "
                "set auto or false"
            )
        if memory and size > memory:
            raise ConfigError(
                f"resident_data=true: the training images take {size:,} bytes, and a device has "
                f"{memory:,}; set auto or false"
            )
        return True
    resident = wanted == AUTO and in_memory and device.platform != "cpu" and SHARE * size <= memory
    resident = not parallel.largest(int(not resident))  # of several processes, all do the same
    if not resident and config.steps_per_call not in (AUTO, 1):
        raise ConfigError(
            f"steps_per_call={config.steps_per_call}: must be 1 or auto without the training images on "
            "the device; set resident_data=true"
        )
    return resident


def steps_of(config: Config, mesh: Any) -> int:
    """Steps in one call. A call that is due costs a TPU's host more than a short step takes."""
    if config.steps_per_call != AUTO:
        return config.steps_per_call
    return 8 if mesh.devices.flat[0].platform == "tpu" else 1
