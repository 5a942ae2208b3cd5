"""The devices to compile for: what they are able to do, and as JAX sees them."""

import dataclasses
import importlib.util
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from cnn_jax import CHECKOUT, PROGRAM
from cnn_jax.common.errors import ConfigError

# libtpu asks for these where there is no TPU; the topology overrides them.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Two programs may compile at once: neither takes a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The plug-in would otherwise look for CUDA's libraries and for a GPU.
_CUDA_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device is able to do; a table of targets.toml."""

    float32: float
    bfloat16: float
    memory: float
    memory_bandwidth: float
    interconnect_bandwidth: float
    source: str
    highest: float = 0.0
    target_config: str = ""

    def arithmetic(self, compute_dtype: str, matmul_precision: str) -> float:
        """FLOP/s of matmuls and convolutions with these fields of a `Config`."""
        if compute_dtype != "float32" or matmul_precision == "default":
            return getattr(self, compute_dtype)
        if self.target_config:
            return self.highest if matmul_precision == "highest" else self.float32
        # A TPU sums products of bfloat16 parts of its float32 operands.
        return self.float32 / {"tensorfloat32": 3, "highest": 6}[matmul_precision]


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      topology: their name, as in "v5e:2x2".
      devices: as JAX describes them.
      rates: of one device; None for this machine's processor.
    """

    topology: str
    devices: Sequence[jax.Device]
    rates: Rates | None


def known() -> dict[str, Rates]:
    """The devices of targets.toml by name."""
    text = (Path(__file__).parent / "targets.toml").read_text(encoding="utf-8")
    return {name: Rates(**table) for name, table in tomllib.loads(text).items()}


def find(topology: str) -> Target:
    """The devices of a topology. JAX must not have started: it starts on the CPU.

    Args:
      topology: "cpu", a TPU's name and slice such as "v5e:2x2", or a GPU's name, alone or with their
        number on a host ("h100:4") or hosts x number ("h100:2x4").

    Raises:
      ConfigError: there is no such topology, or what compiles for it is not installed.
    """
    jax.config.update("jax_platforms", "cpu")  # so that no accelerator is needed, or taken
    if topology == "cpu":
        return Target(topology, jax.devices(), None)
    name, _, shape = topology.partition(":")
    rates = known().get(name)
    if rates is None:
        raise ConfigError(f"--topology={topology}: must be cpu or one of {', '.join(known())}")
    devices = _gpus(topology, rates, shape) if rates.target_config else _tpus(topology, shape)
    return Target(topology, devices, rates)


def _tpus(topology: str, shape: str) -> Sequence[jax.Device]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape, re.ASCII):
        raise ConfigError(f"--topology={topology}: a TPU's must have a slice, as in v5e:2x2")
    if "TPU_LIBRARY_PATH" not in os.environ:
        _need("libtpu", topology, "compile-tpu")
    os.environ.update(_TPU_ENVIRONMENT)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={topology}: libtpu has no such slice: {error}") from error


def _gpus(topology: str, rates: Rates, shape: str) -> Sequence[jax.Device]:
    found = re.fullmatch(r"(?:(?:([1-9]\d*)x)?([1-9]\d*))?", shape, re.ASCII)
    if not found:
        raise ConfigError(
            f"--topology={topology}: a GPU's must have a number or HOSTSxNUMBER, as in h100:2x4"
        )
    _need("jax_cuda13_plugin", topology, "compile-cuda")
    os.environ.update(_CUDA_ENVIRONMENT)
    hosts, count = found[1] or 1, found[2] or 1
    return topologies.get_topology_desc(
        platform="cuda", target_config=rates.target_config, topology=f"1x{hosts}x{count}"
    ).devices


def _need(module: str, topology: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        adds = f"{PROGRAM} setup --with={extra}" if CHECKOUT else f"pip install 'cnn_jax[{extra}]'"
        raise ConfigError(
            f"--topology={topology}: needs {module}, which is missing; {adds} adds it"
        )
