"""Measures the contenders in turn, A B A B, and writes the table.

All contenders of a network are loaded and warm at once. In each round, each of them runs alone for
a few seconds. The figures are medians over the rounds. A ratio is the median of the rounds' ratios,
so a machine whose speed drifts favours no contender.
"""

import logging
import statistics

import rich.console

from cnn_jax.common.errors import ConfigError
from cnn_jax.config.experiment import RESULTS
from cnn_jax.studies.benchmark import table
from cnn_jax.studies.benchmark.contenders import Contender, contenders, install_peers
from cnn_jax.studies.benchmark.figures import OURS, Measured, fastest_peer, peak_share, ratio
from cnn_jax.studies.benchmark.networks import NETWORKS

log = logging.getLogger(__name__)


def measure(
    network: str, batch_size: int, commands: dict[str, list[str]], rounds: int, seconds: float
) -> dict[str, Measured]:
    """All contenders on one network, by name; one that fails is left out with a warning."""
    running: dict[str, Contender] = {}
    for name, command in commands.items():
        filled = [part.format(network=network, batch=batch_size) for part in command]
        try:
            running[name] = Contender(name, filled)
        except RuntimeError as error:
            if name == OURS:
                raise
            log.warning("warning: %s: %s", network, error)
    counts = {name: contender.about["parameters"] for name, contender in running.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(
            f"{network}: the networks must have equally many parameters, but have {counts}"
        )
    for _ in range(rounds):
        for mode in ("train", "eval"):
            for contender in running.values():
                contender.measure(mode, seconds, batch_size)
        running[OURS].measure("peak", seconds / 4, batch_size)
    return {name: contender.stop() for name, contender in running.items()}


def check(networks: list[str], seconds: float) -> None:
    """Raises a ConfigError for an unknown network, or if `seconds` is not greater than 0."""
    if seconds <= 0:
        raise ConfigError(f"--seconds={seconds}: must be greater than 0")
    for name in networks:
        if name not in NETWORKS:
            raise ConfigError(f"--networks={name}: must be among {', '.join(NETWORKS)}")


def benchmark(
    networks: list[str], peers: bool, batch_size: int, rounds: int, seconds: float, write: bool
) -> None:
    """Measures, prints a line per network, and with `write` puts tables into RESULTS.md.

    Raises:
      ConfigError: an unknown network, or `seconds` is not greater than 0.
    """
    check(networks, seconds)
    if peers:
        install_peers()
    commands = contenders(peers)
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    results = {}
    for name in networks or NETWORKS:
        with console.status(f"{name}: {', '.join(commands)}"):
            results[name] = measure(name, batch_size, commands, rounds, seconds)
        console.print(_line(name, results[name], batch_size), soft_wrap=True)
    if write:
        text = table.render(results, batch_size, rounds, seconds)
        path = RESULTS / "RESULTS.md"
        table.put_into(path, text, batch_size)
        console.print(f"written to {path}")


def _line(network: str, measured: dict[str, Measured], batch_size: int) -> str:
    ours = measured[OURS]
    gflops, share = peak_share(network, ours)
    text = (
        f"{network}: {statistics.median(ours.rates['train']):,.0f} images/s in training, {gflops:,.0f} "
        f"GFLOP/s, {share:.0%} of the matmul peak, {ours.peak_memory / 2**20:,.0f} MiB, compiled in "
        f"{ours.compile_seconds['train']:.1f} s"
    )
    if (peer := fastest_peer(measured, "train")) and (other := fastest_peer(measured, "eval")):
        text += f"; {ratio(measured, peer, 'train'):.2f} x {peer}"
        text += f"; evaluation {ratio(measured, other, 'eval'):.2f} x {other}"
    return text
