"""Devices: one jit over a mesh of them, an adapter for jax.pmap, and several processes.

The only file that says mesh, sharding, pmap or jax.distributed. One device is a mesh of one.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its store of keys, which jax.distributed does not show
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.common import gpu
from cnn_jax.common.errors import CnnJaxError, ConfigError

AXIS = "data"

# Steps that may be waiting for the device. More would not make it busier, would hold their batches in
# memory, and a signal could not be answered before they are done.
QUEUE = 3

_ADVICE = (
    "its own last lines say why. Start all processes again with the same commands: the run goes on "
    "from its newest checkpoint"
)
_HANDLERS: list = []


def start_processes(coordinator: str, processes: int, process: int, heartbeat_seconds: int) -> None:
    """Joins this process to the others of one run; call it before the first JAX computation.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are.
      process: which one this is, from 0.
      heartbeat_seconds: silence after which one is taken for dead, and the others end.

    Raises:
      ConfigError: the three do not go together.
    """
    if processes < 1:
        raise ConfigError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process}: must be from 0 to {processes - 1}")
    if not re.fullmatch(r".+:[0-9]+", coordinator or ""):
        raise ConfigError(f"--coordinator={coordinator or ''}: must be host:port of process 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds
    )
    # The first exchange connects them, for which Gloo gives 30 seconds: now, while they are together.
    # Later, one may still be decoding images.
    largest(0)
    _add_last_line_to_aborts()


def _add_last_line_to_aborts() -> None:
    """Has a line printed where JAX aborts this process.

    It does so from a thread in C++, after a page about its reason, where another process is silent or
    the coordinator cannot be reached. Python's own handlers run between two bytecodes of the main
    thread, which is too late.
    """
    lost = "another is gone, which the lines above name"
    if jax.process_count() == 2:
        lost = f"process {1 - jax.process_index()} is gone"
    line = f"error: JAX ended this process, most likely because {lost}; {_ADVICE}\n".encode()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def print_line(_: int) -> None:
        os.write(2, line)
        os._exit(CnnJaxError.exit_code)

    _HANDLERS.append(print_line)  # C keeps no reference
    ctypes.CDLL(None).signal(signal.SIGABRT, print_line)


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Says which process is gone, and what to do, where an exchange with the others fails.

    Raises:
      CnnJaxError: names the process.
    """
    try:
        yield
    except Exception as error:
        if not (is_one_of_several() and re.search(r"\b(gloo|nccl)", str(error), re.IGNORECASE)):
            raise
        lost = ", ".join(map(str, _missing()))
        raise CnnJaxError(
            f"gone: process {lost} of the {jax.process_count()} of this run; {_ADVICE}"
        ) from error


def _missing() -> list[int]:
    """The processes that do not answer a roll call, which all others hold at the same time."""
    me, everyone = jax.process_index(), set(range(jax.process_count()))
    if len(everyone) == 2:
        return sorted(everyone - {me})
    client, pause = distributed.global_state.client, threading.Event()
    missing = {0}
    with contextlib.suppress(Exception):  # no answer from process 0, which keeps the list
        client.key_value_set(f"cnn_jax/roll_call/{me}", "here")
        for _ in range(50):
            here = client.key_value_dir_get("cnn_jax/roll_call")
            missing = everyone - {int(key.rpartition("/")[2]) for key, _ in here}
            if len(missing) == 1:
                break
            pause.wait(0.1)
        if me == 0:
            pause.wait(1)  # until the others have read the list
    return sorted(missing)


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this process writes the workdir."""
    return jax.process_index() == 0


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh over the first `devices` devices, None for all of them.

    Raises:
      ConfigError: there are fewer, or several processes would not all take part.
    """
    visible = jax.devices()
    gpu.tell_unused()
    count = devices or len(visible)
    if count > len(visible):
        raise ConfigError(f"devices={count}: only {len(visible)} visible ({jax.default_backend()})")
    if jax.process_count() > 1 and count != len(visible):
        raise ConfigError(f"devices={count}: a run of several processes uses all {len(visible)}")
    # Not jax.make_mesh: it refuses devices of several slices, which two machines with GPUs count as.
    return Mesh(np.array(visible[:count]), (AXIS,))


def check_divides(mesh: Mesh, batch_size: int) -> None:
    """Refuses a batch that cannot be split evenly, before anything is compiled.

    Raises:
      ConfigError: its size and the number of devices.
    """
    if batch_size % mesh.size:
        raise ConfigError(f"batch_size={batch_size}: must be divisible by the {mesh.size} devices")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device of the mesh. Equal on all processes beforehand."""
    if jax.process_count() > 1:
        tree = jax.tree.map(np.asarray, tree)
    return _copy_to(mesh)(tree)


@functools.cache
def _copy_to(mesh: Mesh) -> Callable:
    # jax.device_put may hand out the source's own buffer, and a step that takes it over destroys it.
    return jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=replicated(mesh))


def make_replicated(make: Callable, mesh: Mesh, *arguments: Any) -> Any:
    """What `make(*arguments)` returns, computed in one program, on every device of the mesh."""
    return jit(make, out_shardings=replicated(mesh))(*arguments)


def shard(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """`batch` with its leading axis split over the devices; every process passes the whole batch."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Replicated arrays as NumPy arrays; waits for them."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def largest(value: int) -> int:
    """The largest `value` of all processes; each must call it at the same place."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def gather(value: Any) -> list[Any]:
    """The `value` of each process, plain JSON, in their order; each must call it at the same place."""
    text = json.dumps(value).encode()
    padded = np.zeros(largest(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def agree(value: int) -> bool:
    """Whether all processes have the same `value`; each must call it at the same place."""
    return largest(value) == -largest(-value)


# What YNN, the library of fused kernels that XLA:CPU calls by default, does in float32. The first two
# columns are tests' (tests/train/test_parallel.py), on an Intel Xeon; networks are convolutions:
#   jaxlib    sums of squares (jax-ml/jax#39103)   arctan of 50 and more (#39352)   plain convolutions
#   0.10.1    right                                right                            up to 8 times slower
#   0.10.2    wrong                                wrong                            (excluded)
#   0.11.2    right                                right                            slower
#   0.12.0.1  right                                right                            slower
# So every program that computes a network leaves it off, and programs of others keep it.
#
# XLA:CPU forgets barriers before it fuses loops. `ops.formulations` puts them between those that are
# faster apart: the second option keeps them there, for 2 to 15 % more images a second.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


def jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` with the compiler's options for this platform, for what computes a network."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=_CPU_OPTIONS if on_cpu else None, **options)


def jit_step(step: Callable, mesh: Mesh, donate: bool = True) -> Callable:
    """`step(state, batch)` compiled over the mesh; the state's buffers are reused for the result.

    One step a call: in a scan over eight, XLA:CPU computes convolutions in scalar loops. It trained
    LeNet at a fifth of the speed, though the MLP at 1.4 times.
    """
    return jit(
        step,
        in_shardings=(replicated(mesh), NamedSharding(mesh, PartitionSpec(AXIS))),
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate else (),
    )


def compile_step(step: Callable, mesh: Mesh, state: Any, batch: dict[str, np.ndarray]) -> Callable:
    """`jit_step(step, mesh)` compiled ahead for a state and a batch like these.

    With JAX_DISABLE_JIT each operation runs by itself, to be looked at.

    Raises:
      ConfigError: the model sums over an axis of its own, which training does not name.
    """
    jitted = jit_step(step, mesh)
    if jax.config.jax_disable_jit:
        return jitted
    try:
        return jitted.lower(state, shard(batch, mesh)).compile()
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ConfigError(
            f"model: {error}; training has no named axis: leave out the model's axis_name"
        ) from error


def pmap_step(step: Callable, devices: int | None = None) -> Callable:
    """The same `step(state, batch, axis_name=...)` under jax.pmap: same numbers, same state.

    For code built around pmap; the trainer itself uses `jit_step`. The state goes in and comes out
    unreplicated, so its checkpoints are interchangeable. A module with BatchNorm or Dropout needs
    axis_name="data".

    Returns:
      step(state, batch) that takes the whole batch [N, ...] and splits it over the devices.
    """
    chosen = jax.local_devices()[:devices]
    mapped = jax.pmap(
        functools.partial(step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=chosen,
    )

    def split(state: Any, batch: dict[str, np.ndarray]) -> Any:
        parts = {
            name: np.reshape(array, (len(chosen), -1, *array.shape[1:]))
            for name, array in batch.items()
        }
        return mapped(state, parts)

    return split
