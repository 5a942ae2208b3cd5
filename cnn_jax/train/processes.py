"""Several processes of one run: how a process joins, shares GPUs, and stops with the others."""

import contextlib
import datetime
import json
import logging
import os
import re
import socket
from errno import EADDRINUSE

import jax
from jax._src import distributed  # its key-value store is not public in jax.distributed
from jax.experimental import multihost_utils

from cnn_jax.common import gpu
from cnn_jax.common.errors import ConfigError
from cnn_jax.train import lost, parallel

log = logging.getLogger(__name__)


def start_processes(coordinator: str, processes: int, process: int, heartbeat_seconds: int) -> None:
    """Joins this process to the others of one run; call it before the first JAX computation.

    Args:
      coordinator: host:port of process 0.
      processes: their number.
      process: the number of this one, from 0.
      heartbeat_seconds: a process that is silent for so long counts as dead; the others end. They
        wait three times as long for each other at the start.

    Raises:
      ConfigError: coordinator or process is invalid; devices would be idle.
    """
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process}: must be from 0 to {processes - 1}")
    if not re.fullmatch(r".+:[0-9]+", coordinator or ""):
        raise ConfigError(f"--coordinator={coordinator or ''}: must be host:port of process 0")
    _check_address(coordinator, process)
    patience = 3 * heartbeat_seconds
    lost.say_if_nobody_comes(processes, process, coordinator, patience)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        # Else JAX asks the scheduler again, and under SLURM takes one GPU for each process.
        cluster_detection_method="deactivate",
        initialization_timeout=patience,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    lost.watch(distributed.global_state.client, process, processes, heartbeat_seconds)
    with lost.named():
        seen = _share_gpus(patience)
        # The first exchange connects the processes. Gloo allows 30 seconds for that, which is too
        # short later, when one process may still decode images.
        parallel.largest(0)
    _check_idle(seen)
    if parallel.is_main_process():
        log.info(
            "%d processes, %d local and %d global devices (%s)",
            processes,
            jax.local_device_count(),
            jax.device_count(),
            jax.devices()[0].device_kind,
        )


def _check_address(coordinator: str, process: int) -> None:
    """Refuses an unknown host, and a port that is in use: gRPC would wait for the others there.

    Raises:
      ConfigError: names the coordinator.
    """
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
        if process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            socket.create_server(("", int(port))).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or f"{error}"
        if getattr(error, "errno", None) == EADDRINUSE:
            reason = "another process 0 or another program uses this port here"
        raise ConfigError(f"--coordinator={coordinator}: {reason}") from error


def _share_gpus(patience_seconds: int) -> int:
    """Tells JAX which GPUs this process uses; returns how many the machines have for the run.

    Raises:
      ConfigError: as `gpu.share`.
    """
    if jax.config.jax_platforms == "cpu":
        return 0
    run = distributed.global_state  # jax.process_index would start the backend
    assert run.client is not None, "jax.distributed is initialised"
    found = {
        "host": socket.gethostname(),
        "gpus": gpu.visible(),
        "allocated": int(os.environ.get("SLURM_GPUS_ON_NODE", 0)),  # a task may see fewer
    }
    run.client.key_value_set(f"cnn_jax/gpus/{run.process_id}", json.dumps(found))
    everyone = [
        json.loads(run.client.blocking_key_value_get(f"cnn_jax/gpus/{i}", 1000 * patience_seconds))
        for i in range(run.num_processes)
    ]
    own = gpu.share([other["gpus"] for other in everyone], run.process_id)
    if own is not None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, own)))
    allocated = {other["host"]: other["allocated"] for other in everyone}
    return max(len({i for other in everyone for i in other["gpus"]}), sum(allocated.values()))


def _check_idle(gpus: int) -> None:
    """Refuses a run that would leave more of the machines' GPUs idle than it uses."""
    used = jax.device_count() if jax.default_backend() == "gpu" else 0
    if gpus - used > used:
        raise ConfigError(
            f"{gpus - used} of {gpus} GPUs would be idle, as JAX uses {used}: start one process for "
            "each GPU or one for each machine; JAX_PLATFORMS=cpu if none is meant"
        )


def all_stop_at(point: int, signalled: bool) -> bool:
    """Whether all processes stop at `point`, because one of them got a signal some points before.

    JAX's preemption service tells the others and finds a point that no process has passed. Each process
    must call this at every point.

    Args:
      point: one more than in the call before, or the same.
      signalled: this process got a signal.
    """
    if signalled:
        now = datetime.datetime.now(datetime.UTC).isoformat()
        with contextlib.suppress(Exception):  # it has been told already
            client = distributed.global_state.client
            assert client is not None
            # The key that JAX's own handler of SIGTERM sets. Ours takes its place.
            client.key_value_set("RECEIVED_PREEMPTION_NOTICE", now)
    return multihost_utils.reached_preemption_sync_point(point)
