"""Devices: jit over a mesh, an adapter for jax.pmap, and exchanges between processes.

Only this file creates meshes and shardings or calls pmap. One device is a mesh of size 1.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.common import cpu, gpu
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.data.prefetch import look_ahead
from cnn_jax.ops import bfloat16

AXIS = "data"

# The number of steps that may wait for the device. More would not make it faster, would keep their
# batches in memory, and would delay the response to a signal.
QUEUE = 3


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this process writes the workdir."""
    return jax.process_index() == 0


def make_mesh(devices: int | None = None, described: Sequence[jax.Device] = ()) -> Mesh:
    """A mesh over the first `devices` devices, None for all of them.

    Args:
      devices: their number.
      described: devices for which programs are only compiled; by default, the devices of JAX.

    Raises:
      ConfigError: there are fewer, or a run of several processes would not use all of them.
    """
    visible = described or jax.devices()
    if not described:
        gpu.tell_unused()
    count = devices or len(visible)
    if count > len(visible):
        raise ConfigError(f"devices={count}: only {len(visible)} visible ({visible[0].platform})")
    if jax.process_count() > 1 and count != len(visible):
        raise ConfigError(f"devices={count}: a run of several processes uses all {len(visible)}")
    # Not jax.make_mesh: it refuses several slices, and two machines with GPUs count as two slices.
    return Mesh(np.array(visible[:count]), (AXIS,))


def check_divides(mesh: Mesh, batch_size: int) -> None:
    """Checks, before anything is compiled, that a batch can be split evenly over the devices.

    Raises:
      ConfigError: it cannot; names its size and the number of devices.
    """
    if batch_size % mesh.size:
        raise ConfigError(f"batch_size={batch_size}: must be divisible by the {mesh.size} devices")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of `tree` on every device of the mesh; `tree` must be equal on all processes."""
    if jax.process_count() > 1:
        tree = jax.tree.map(np.asarray, tree)
    return _copy_to(mesh)(tree)


def copied(tree: Any, mesh: Mesh) -> Any:
    """A copy of replicated arrays, which stays when a step reuses their memory; does not wait."""
    return _copy_to(mesh)(tree)


@functools.cache
def _copy_to(mesh: Mesh) -> Callable:
    # jax.device_put may return the source's buffer, and a step that reuses it would destroy it.
    return jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=replicated(mesh))


def make_replicated(make: Callable, mesh: Mesh, *arguments: Any) -> Any:
    """Computes `make(*arguments)` in one program; the result is on every device of the mesh."""
    return jit(make, out_shardings=replicated(mesh))(*arguments)


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits an array along `axis` over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


@functools.cache  # every step asks
def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray | None:
    """The rows of a batch that the devices of this process hold: int64 [n], ascending; None for all."""
    if jax.process_count() == 1:
        return None
    parts = split(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def shard(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """`batch` with its leading axis split over the devices.

    Args:
      batch: of several processes, each passes its `own_rows` of the whole batch.
      mesh: the devices.
      batch_size: of the whole batch, if there are several processes.
    """
    sharding = split(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    assert batch_size is not None, "of several processes, each has a part of the batch"
    rows = own_rows(mesh, batch_size)
    assert rows is not None

    def spread(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            return array[slice(*np.searchsorted(rows, [start, stop]))]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: spread(array) for name, array in batch.items()}


def shard_ahead(
    batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, batch_size: int | None = None
) -> Iterator[dict[str, jax.Array]]:
    """As `shard`, each batch by a second thread while the program computes the one before."""
    return look_ahead(shard(batch, mesh, batch_size) for batch in batches)


def put(arrays: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """`arrays` on the devices; every process passes the whole of each."""
    if jax.process_count() == 1:
        return jax.device_put(arrays, sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in arrays.items()
    }


def to_host(tree: Any) -> Any:
    """Replicated arrays as NumPy arrays; waits until they are computed."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def largest(value: int) -> int:
    """The largest `value` of all processes; each must call it at the same point."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def gather(value: Any) -> list[Any]:
    """The JSON `value` of each process, in process order; each must call it at the same point."""
    text = json.dumps(value).encode()
    padded = np.zeros(largest(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(jax.process_count(), -1)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def agree(value: int) -> bool:
    """Whether all processes have the same `value`; each must call it at the same point."""
    return largest(value) == -largest(-value)


# XLA:CPU calls YNN, a library of fused kernels, by default. Its float32 results on an Intel Xeon;
# tests/train/test_parallel.py checks the first two columns:
#   jaxlib    sums of squares (jax-ml/jax#39103)   arctan of 50 and more (#39352)   plain convolutions
#   0.10.1    right                                right                            up to 8 times slower
#   0.10.2    wrong                                wrong                            (excluded)
#   0.11.2    right                                right                            slower
#   0.12.0.1  right                                right                            slower
# So every program that computes a network disables it. Other programs keep it.
#
# XLA:CPU removes barriers before it fuses loops. `ops.formulations` puts barriers between loops
# that are faster unfused. The second option keeps them, for 2 to 15 % more images a second.
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
# oneDNN's matmuls and convolutions, for which `ops.bfloat16` writes its passes. In float32, the
# formulations of `ops.formulations` are faster without them.
_ONEDNN = {"xla_cpu_use_onednn": True, "xla_cpu_experimental_onednn_custom_call": True}


# Of XLA for GPUs. The first forbids Triton's matmuls. Without the second, XLA makes some all the same
# and, for a GPU that is only described, finds nothing to compute them.
_DETERMINISTIC = {
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_enable_triton_gemm": False,
}


def _deterministic() -> dict[str, bool | str]:
    """The options of `deterministic`; what XLA finds fastest is kept for the next start."""
    folder = jax.config.jax_compilation_cache_dir
    kept = {"xla_gpu_per_fusion_autotune_cache_dir": f"{folder}/autotuning"} if folder else {}
    return _DETERMINISTIC | kept


def jit(
    function: Callable,
    compute_dtype: str = "float32",
    platform: str | None = None,
    deterministic: bool = False,
    **options: Any,
) -> jax.stages.Wrapped:
    """`jax.jit` for programs that compute a network, with the platform's compiler options.

    Args:
      function: what to compile.
      compute_dtype: as in `Config`.
      platform: for which; by default JAX's.
      deterministic: as in `Config`.
      **options: of `jax.jit`.
    """
    platform = platform or jax.default_backend()
    if platform != "cpu":
        chosen = _deterministic() if deterministic and platform == "gpu" else None
        return jax.jit(function, compiler_options=chosen, **options)
    if not uses_onednn(compute_dtype):
        return jax.jit(function, compiler_options=_CPU_OPTIONS, **options)
    function = bfloat16.with_onednn(function)
    return jax.jit(function, compiler_options=_CPU_OPTIONS | _ONEDNN, **options)


def jit_options(config: Config) -> dict[str, Any]:
    """The arguments of `jit` and `jit_step` that a run's configuration gives."""
    return {"compute_dtype": config.compute_dtype, "deterministic": config.deterministic}


def uses_onednn(compute_dtype: str) -> bool:
    """Whether programs of this type are compiled with oneDNN on a CPU."""
    return compute_dtype == "bfloat16" and cpu.multiplies_bfloat16()


def jit_step(
    step: Callable,
    mesh: Mesh,
    donate: bool = True,
    compute_dtype: str = "float32",
    deterministic: bool = False,
    shardings: Any = None,
) -> jax.stages.Wrapped:
    """`step(state, batch)` compiled over the mesh; the state's buffers are reused for the result.

    Args:
      step: the function.
      mesh: the devices.
      donate: reuses the buffers.
      compute_dtype: as in `Config`.
      deterministic: likewise.
      shardings: of the batch; by default its leading axis is split.
    """
    return jit(
        step,
        compute_dtype,
        platform=mesh.devices.flat[0].platform,
        deterministic=deterministic,
        in_shardings=(replicated(mesh), shardings or split(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=(0,) if donate else (),
    )


def compile_step(jitted: jax.stages.Wrapped, state: Any, batch: Any) -> Callable:
    """A `jit_step` compiled ahead of time for a state and a batch like these, on the devices.

    With JAX_DISABLE_JIT nothing is compiled, so that each operation can be inspected.

    Raises:
      ConfigError: as `lower`.
    """
    if jax.config.jax_disable_jit:
        return jitted
    return lower(jitted, state, batch).compile()


def lower(jitted: jax.stages.Wrapped, state: Any, batch: Any) -> jax.stages.Lowered:
    """The program of a `jit_step`, before it is compiled.

    Args:
      jitted: from `jit_step`.
      state: its state, or its shapes and types.
      batch: likewise.

    Raises:
      ConfigError: the model uses a named axis, which training does not have.
    """
    try:
        return jitted.lower(state, batch)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ConfigError(
            f"model: {error}; training has no named axis: leave out the model's axis_name"
        ) from error


def pmap_step(step: Callable, devices: int | None = None) -> Callable:
    """`step(state, batch, axis_name=...)` under jax.pmap, with the same numbers and state.

    For code built around pmap; the trainer itself uses `jit_step`. The state is not replicated
    before or after a step, so checkpoints are interchangeable. A module with BatchNorm or Dropout
    needs axis_name="data".

    Returns:
      A step(state, batch) that takes the whole batch [N, ...] and splits it over the devices.
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
