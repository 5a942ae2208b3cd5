"""Which processes a run consists of: from the flags, and from the scheduler that started them.

JAX knows the environment variables and services of SLURM, Open MPI, Kubernetes and TPU pods. This file
asks it, and decides when its answer is meant.
"""

import dataclasses
import importlib.util
import logging
import os
from typing import Any

from jax._src import clusters  # the detection of jax.distributed.initialize, which only starts

from cnn_jax.common.errors import ConfigError

log = logging.getLogger(__name__)
_INSTEAD = "name --coordinator, --processes and --process"


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of a run.

    Attributes:
      coordinator: host:port of process 0; not checked yet.
      processes: their number.
      process: the number of this one, from 0.
    """

    coordinator: str
    processes: int
    process: int


class _OpenMpi:
    """What every version's variables say. From Open MPI 5 on, JAX's class asks mpi4py, if at all."""

    get_coordinator_address = clusters.OmpiCluster.get_coordinator_address

    @staticmethod
    def get_process_count() -> int:
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])

    @staticmethod
    def get_process_id() -> int:
        return int(os.environ["OMPI_COMM_WORLD_RANK"])


def find(
    distributed: bool | None, coordinator: str | None, processes: int | None, process: int | None
) -> Place | None:
    """The place of this process, None if it is alone. Logs which scheduler was found.

    Args:
      distributed: True: a scheduler must be there; False: none is looked for; None: one is used if it
        has started several processes of this command.
      coordinator: this and the other two replace what the scheduler says.
      processes: as in `Place`.
      process: likewise.

    Raises:
      ConfigError: no scheduler is there, or it does not say enough.
    """
    given = coordinator, processes, process
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = None
    if distributed is not False and None in (coordinator, processes, process):
        found = _scheduler(asked=bool(distributed))
    if found is None:
        if given == (None, None, None):
            return None
        return Place(coordinator or "", 1 if processes is None else processes, process or 0)
    name, cluster = found
    try:
        count = cluster.get_process_count() if processes is None else processes
        if count == 1 and given == (None, None, None):
            return None
        index = cluster.get_process_id() if process is None else process
        port = os.environ.get("JAX_COORDINATOR_PORT")
        coordinator = coordinator or cluster.get_coordinator_address(60, port)
    except Exception as error:  # JAX raises RuntimeError, KeyError, and those of its packages
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name}: does not say who takes part ({reason}); {_INSTEAD}") from error
    log.info(
        "found %s: this is process %d of %d, coordinator %s (--nodistributed ignores it)",
        name,
        index,
        count,
        coordinator,
    )
    return Place(coordinator, count, index)


def _scheduler(asked: bool) -> tuple[str, Any] | None:
    """The name of the scheduler that started this process and JAX's class for it.

    Args:
      asked: the user says that there is one.

    Raises:
      ConfigError: `asked`, and there is none.
    """
    # Under SLURM, Open MPI starts its processes inside of a step, whose variables are not theirs.
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return "Open MPI", _OpenMpi
    if clusters.SlurmCluster.is_env_present():
        return f"SLURM job {os.environ['SLURM_JOB_ID']}", clusters.SlurmCluster
    for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if cluster.is_env_present():
            return "a TPU pod", cluster
    if not asked:
        return None  # the pods of an indexed Kubernetes job may also be independent runs
    if "JOB_COMPLETION_INDEX" in os.environ:
        if not importlib.util.find_spec("kubernetes"):
            raise ConfigError(
                "--distributed: in Kubernetes it needs the package kubernetes: pip install "
                f"kubernetes; or {_INSTEAD}"
            )
        if clusters.K8sCluster.is_env_present():
            return "a Kubernetes job", clusters.K8sCluster
    hint = "; start it with srun" if "SLURM_JOB_ID" in os.environ else f"; or {_INSTEAD}"
    raise ConfigError(
        "--distributed: found no step of SLURM, no Open MPI, no indexed Kubernetes job and no TPU pod"
        f"{hint}"
    )
