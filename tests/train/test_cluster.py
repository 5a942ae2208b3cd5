"""Which processes a run consists of, as schedulers tell it, and which GPUs each of them uses."""

import ctypes

import pytest

from cnn_jax.common import gpu
from cnn_jax.common.errors import ConfigError
from cnn_jax.train import cluster
from cnn_jax.train.cluster import Place

# As SLURM 22.05 and Open MPI 4.1 set them.
SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
BATCH = {name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "12288.0;tcp://10.0.0.7:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_5 = {name: OPEN_MPI[name] for name in OPEN_MPI if "MCA" not in name}
NO_FLAGS = (None, None, None)
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "c:1"}


def find(monkeypatch, variables, distributed=None, flags=NO_FLAGS):
    for name in (*SLURM, *OPEN_MPI, *ADDRESS, "JAX_COORDINATOR_PORT", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return cluster.find(distributed, *flags)


@pytest.mark.parametrize(
    ("variables", "distributed", "flags", "place"),
    [
        ({}, None, NO_FLAGS, None),
        ({}, None, ("h:1", 2, 1), Place("h:1", 2, 1)),
        ({}, None, ("h:1", 2, None), Place("h:1", 2, 0)),
        ({}, None, (None, None, 1), Place("", 1, 1)),  # refused when the processes start
        (ADDRESS, None, (None, 2, 1), Place("c:1", 2, 1)),
        (ADDRESS, None, NO_FLAGS, None),
        # The port is 61440 + the job's number, modulo 4096; Open MPI's number is 4096 times a count.
        (SLURM, None, NO_FLAGS, Place("n3:61452", 2, 1)),
        (SLURM, True, NO_FLAGS, Place("n3:61452", 2, 1)),
        (SLURM, False, NO_FLAGS, None),
        (SLURM, None, ("h:1", 3, 2), Place("h:1", 3, 2)),
        (SLURM, None, ("h:1", None, None), Place("h:1", 2, 1)),
        (SLURM | ADDRESS, None, NO_FLAGS, Place("c:1", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None, NO_FLAGS, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, True, NO_FLAGS, None),
        (BATCH, None, NO_FLAGS, None),
        (OPEN_MPI, None, NO_FLAGS, Place("10.0.0.7:61443", 4, 3)),
        (OPEN_MPI | SLURM, None, NO_FLAGS, Place("10.0.0.7:61443", 4, 3)),
        (OPEN_MPI_5, None, ("h:1", None, None), Place("h:1", 4, 3)),
        ({"JOB_COMPLETION_INDEX": "1"}, None, NO_FLAGS, None),
    ],
)
def test_the_place_of_a_process(monkeypatch, variables, distributed, flags, place):
    assert find(monkeypatch, variables, distributed, flags) == place


@pytest.mark.parametrize(
    ("variables", "distributed", "says"),
    [
        ({}, True, "--distributed: found no step of SLURM, .*; or name --coordinator, "),
        (BATCH, True, "--distributed: found no step of SLURM, .*; start it with srun"),
        (OPEN_MPI_5, None, "Open MPI: does not say who takes part .*; name --coordinator"),
        ({"JOB_COMPLETION_INDEX": "1"}, True, "--distributed: in Kubernetes it needs the package"),
        (SLURM | {"SLURM_NTASKS": "x"}, None, "SLURM job 12: does not say who takes part"),
    ],
)
def test_a_scheduler_that_says_too_little(monkeypatch, variables, distributed, says):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"^{says}"):
        find(monkeypatch, variables, distributed)


@pytest.mark.parametrize(
    ("seen", "shares"),
    [
        (["abcd"], [None]),
        (["abcd", "efgh"], [None, None]),  # one process for each machine
        (["a", "b", "c"], [None, None, None]),  # the scheduler shows each its own
        (["abcd", "abcd", "abcd", "abcd"], [[0], [1], [2], [3]]),
        (["abcd", "abcd"], [[0, 1], [2, 3]]),
        (["abcd", "dcba"], [[0, 1], [0, 1]]),  # CUDA's order differs: a b and c d
        (["abcd", "abcd", "ef", "ef"], [[0, 1], [2, 3], [0], [1]]),
        (["", ""], [None, None]),
    ],
)
def test_processes_of_a_machine_share_its_gpus(seen, shares):
    assert [gpu.share(seen, process) for process in range(len(seen))] == shares
    used = [seen[i][k] for i, own in enumerate(shares) for k in own or range(len(seen[i]))]
    assert sorted(used) == sorted(set("".join(seen)))


@pytest.mark.parametrize("seen", [["abc", "abc"], ["a", "a"], ["ab", "bc"], ["abcd", "ab"]])
def test_gpus_that_cannot_be_shared_evenly_are_refused(seen):
    with pytest.raises(ConfigError, match="2 processes of one machine cannot share its GPUs"):
        gpu.share(seen, 0)


def test_the_gpus_that_cuda_shows(monkeypatch):
    class Driver:
        def cuInit(self, _):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device, i):
            device._obj.value = 10 + i
            return 0

        def cuDeviceGetUuid_v2(self, identity, device):
            identity.raw = bytes(15) + bytes([device.value])
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert gpu.visible() == ["00" * 15 + "0a", "00" * 15 + "0b"]


def test_a_machine_without_a_driver_shows_no_gpus(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert gpu.visible() == []
