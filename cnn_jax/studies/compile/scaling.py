"""How the cost of a training step grows with the devices: what is compiled, and arithmetic."""

import dataclasses
import math
from collections.abc import Iterator

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.studies import markdown
from cnn_jax.studies.compile.programs import Compiled, compile_steps
from cnn_jax.studies.compile.table import duration, number, size
from cnn_jax.studies.compile.targets import Rates, Target

COMPILED = (
    "devices",
    "examples on each",
    "FLOP on each",
    "FLOP",
    "all-reduces",
    "sent by each",
    "sent",
)
ESTIMATED = (
    "devices",
    "examples on each",
    "computes",
    "exchanges",
    "share of the exchange",
    "times one device",
    "half lost below batch",
)
_COUNTS = tuple(2**i for i in range(3, 10))  # 8 to 512


@dataclasses.dataclass(frozen=True)
class Line:
    """A straight line through two points: a cost that grows with the examples on a device."""

    constant: float
    each: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> "Line":
        each = (second[1] - first[1]) / (second[0] - first[0])
        return cls(first[1] - each * first[0], each)

    def at(self, examples: float) -> float:
        return self.constant + self.each * examples

    def reaches(self, cost: float) -> float:
        """The number of examples from which on it costs so much."""
        return (cost - self.constant) / self.each if self.each > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Step:
    """The least seconds of a step, at a device's peak rates.

    Attributes:
      arithmetic: by the examples on one device.
      memory: likewise, its traffic.
      reduced: bytes of the all-reduces.
      rates: of the device.
    """

    arithmetic: Line
    memory: Line
    reduced: int
    rates: Rates

    def computing(self, examples: float) -> float:
        """Seconds without the exchange, by the examples on a device."""
        return max(self.arithmetic.at(examples), self.memory.at(examples))

    def exchanging(self, devices: int) -> float:
        """Seconds of the all-reduce, without the time that a message takes to arrive.

        Over n devices, each sends 2 (n - 1) / n of the bytes. Beyond those that the interconnect
        links, groups of them exchange over all their network ports.
        """
        linked = min(devices, self.rates.linked)
        inside = _sent(self.reduced, linked) / self.rates.interconnect_bandwidth
        if devices == linked:
            return inside
        ports = linked * self.rates.network_bandwidth
        return max(inside, _sent(self.reduced, devices // linked) / ports)

    def half_lost_below(self, devices: int) -> int:
        """The batch below which devices spend less than half of the time on examples.

        The rest is what each of them repeats, whatever the batch, and the exchange.
        """
        needed = 2 * self.computing(0) + self.exchanging(devices)
        examples = min(self.arithmetic.reaches(needed), self.memory.reaches(needed))
        return devices * max(1, math.ceil(examples))


def _sent(count: float, devices: int) -> float:
    """Bytes that each device sends in an all-reduce of so many."""
    return 2 * count * (devices - 1) / devices


def tables(config: Config, image_shape: tuple[int, int, int], target: Target) -> Iterator[str]:
    """What was compiled for one and for all of the target's devices; then arithmetic for 8 to 512.

    Of virtual devices, which compile quickly, also what was compiled for 2, 4, ... of them.

    Args:
      config: the run; its batch is divided among the devices.
      image_shape: (H, W, C) of its images.
      target: the devices.

    Raises:
      ConfigError: the target has one device, the batch cannot be split, or as `compile_steps`.
    """
    counts = [2**i for i in range(len(target.devices).bit_length())]
    if target.rates:
        counts = [1, len(target.devices)]
    if len(target.devices) == 1:
        raise ConfigError(
            f"--scaling: --topology={target.topology} has one device, and must have several; for cpu "
            "set XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    steps = [_compile(config, image_shape, target, count, config.batch_size) for count in counts]
    yield markdown.markdown_table(COMPILED, [_cells(step) for step in steps])
    if target.rates is None:
        return
    batch = config.batch_size
    one, part = (
        steps[0],
        _compile(config, image_shape, target, 1, max(1, batch // 8)),
    )
    step = _step(one, part, _reduced(steps[-1]), target.rates)
    yield markdown.markdown_table(ESTIMATED, [*_estimates(step, batch)])


def _compile(
    config: Config, shape: tuple[int, int, int], target: Target, devices: int, batch_size: int
) -> Compiled:
    changed = dataclasses.replace(config, devices=devices, batch_size=batch_size)
    return next(compile_steps(changed, shape, target))


def _reduced(step: Compiled) -> int:
    return sum(count for name, count in step.findings.collectives if name == "all-reduce")


def _cells(step: Compiled) -> list[str]:
    sent = _sent(_reduced(step), step.devices)
    return [
        str(step.devices),
        f"{step.batch_size // step.devices:,}",
        number(step.flops),
        number(step.flops * step.devices),
        str(sum(name == "all-reduce" for name, _ in step.findings.collectives)),
        size(sent),
        size(sent * step.devices),
    ]


def _step(one: Compiled, part: Compiled, reduced: int, rates: Rates) -> Step:
    def line(costs: tuple[float, float]) -> Line:
        return Line.through((part.batch_size, costs[0]), (one.batch_size, costs[1]))

    peak = getattr(rates, one.compute_dtype)
    arithmetic = line((part.flops / peak, one.flops / peak))
    bandwidth = rates.memory_bandwidth
    memory = line((part.findings.traffic / bandwidth, one.findings.traffic / bandwidth))
    return Step(arithmetic, memory, reduced, rates)


def _estimates(step: Step, batch: int) -> Iterator[list[str]]:
    alone = step.computing(batch)
    for devices in _COUNTS:
        if devices > step.rates.linked and not step.rates.network_bandwidth:
            return
        exchange, least = step.exchanging(devices), f"{step.half_lost_below(devices):,}"
        cells = [duration(exchange), "-", "-", least]
        if devices <= batch:
            computing = step.computing(batch / devices)
            whole = computing + exchange
            cells = [duration(exchange), f"{exchange / whole:.0%}", f"{alone / whole:.1f}", least]
            cells.insert(0, duration(computing))
            yield [str(devices), f"{batch // devices:,}", *cells]
        else:
            yield [str(devices), "-", "-", *cells]
