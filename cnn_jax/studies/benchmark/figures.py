"""One contender's figures on one network, and comparisons: ratios, shares of the peak."""

import dataclasses
import statistics

from cnn_jax import models
from cnn_jax.models import summary
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.benchmark.ours import PEAK_SIZE

OURS = "cnn_jax"
# Contenders in bfloat16, which are compared with each other alone.
OURS_BF16, TORCH_BF16 = "cnn_jax bf16", "torch bf16"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender's figures on one network.

    Attributes:
      rates: mode -> images/s of each round ("peak": multiplications of 2048 x 2048 matrices a second).
      compile_seconds: mode -> seconds of its first step.
      peak_memory: bytes, of the whole process.
      parameters: the number of trained parameters.
      version: of the framework.
    """

    rates: dict[str, list[float]]
    compile_seconds: dict[str, float]
    peak_memory: int
    parameters: int
    version: str


def training_flops(network: str) -> int:
    """FLOPs of one image's forward pass and both gradients."""
    spec = NETWORKS[network]
    return summary.summarise(getattr(models, spec.model)(), spec.image_shape).training_flops


def fastest_peer(measured: dict[str, Measured], mode: str) -> str | None:
    """The float32 contender, other than ours, with the highest median."""
    peers = [name for name in measured if name not in (OURS, OURS_BF16, TORCH_BF16)]
    return max(peers, key=lambda name: statistics.median(measured[name].rates[mode]), default=None)


def ratio(measured: dict[str, Measured], peer: str, mode: str, ours: str = OURS) -> float:
    """Median over the rounds of the rate of `ours` divided by the peer's rate in the same round."""
    pairs = zip(measured[ours].rates[mode], measured[peer].rates[mode], strict=True)
    return statistics.median(one / other for one, other in pairs)


def peak_share(network: str, measured: Measured) -> tuple[float, float]:
    """GFLOP/s of our training step, and its share of the matmul peak of the same process."""
    gflops = statistics.median(measured.rates["train"]) * training_flops(network) / 1e9
    peak = statistics.median(measured.rates["peak"]) * 2 * PEAK_SIZE**3 / 1e9
    return gflops, gflops / peak
