"""Measures the contenders in turn, A B A B, and writes the table.

All contenders of a network are alive and warm at once; each round gives every one of them a few
seconds alone. The figures are medians over the rounds; a ratio is the median of the rounds' ratios,
so that a machine whose speed drifts does not favour anyone.
"""

import dataclasses
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import rich.console
import rich.progress

from cnn_jax import models, summary
from cnn_jax.benchmark.networks import NETWORKS
from cnn_jax.errors import ConfigError

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
PEERS_ENVIRONMENT = REPOSITORY / ".venv-peers"
PEERS_REQUIREMENTS = ("torch==2.13.0", "keras==3.15.0", "tensorflow==2.21.0", "jax==0.10.1")
RESULTS = REPOSITORY / "experiments" / "RESULTS.md"
OURS = "cnn_jax"
# Contenders whose arithmetic is not float32 are shown, but no ratio is taken against them.
NOT_FLOAT32 = ("torch bf16",)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender's figures on one network.

    Attributes:
      rates: mode -> images/s of each round ("peak": multiplications of 2048 x 2048 matrices a second).
      compile_seconds: mode -> seconds of its first step.
      peak_memory: bytes, of the whole process.
      parameters: how many are trained.
      version: of the framework.
    """

    rates: dict[str, list[float]]
    compile_seconds: dict[str, float]
    peak_memory: int
    parameters: int
    version: str


class Contender:
    """A worker process."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=REPOSITORY,
        )
        self.about = self._answer()
        self.rates: dict[str, list[float]] = {}
        self.peak_memory = 0

    def measure(self, mode: str, seconds: float, batch_size: int) -> None:
        """One round."""
        self._process.stdin.write(json.dumps({"mode": mode, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        per_step = 1 if mode == "peak" else batch_size
        rate = answer["steps"] * per_step / answer["seconds"]
        self.rates.setdefault(mode, []).append(rate)
        if mode != "peak":
            self.peak_memory = answer["peak_memory"]

    def stop(self) -> Measured:
        self._process.communicate()
        return Measured(
            self.rates,
            self.about["compile_seconds"],
            self.peak_memory,
            self.about["parameters"],
            self.about["version"],
        )

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            reason = self._process.communicate()[1].strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name} ended: {' '.join(reason)}")
        return json.loads(line)


def contenders(peers: bool) -> dict[str, list[str]]:
    """Name -> command, to which NETWORK BATCH [VARIANT] are added as "{network}" and "{batch}"."""
    job = ["{network}", "{batch}"]
    commands = {OURS: [sys.executable, "-m", "cnn_jax.benchmark.ours", *job]}
    if peers:
        python = str(PEERS_ENVIRONMENT / "bin" / "python")
        variants = ["default", "channels_last", "compile"]
        if "avx512f" in _cpu_flags():
            variants.append("bf16")
        for variant in variants:
            commands[f"torch {variant}"] = [python, str(HERE / "peer_torch.py"), *job, variant]
        for backend in ("tensorflow", "jax"):
            commands[f"keras {backend}"] = [python, str(HERE / "peer_keras.py"), *job, backend]
    return commands


def install_peers() -> None:
    """Makes .venv-peers, once.

    Raises:
      ConfigError: pip could not.
    """
    stamp = PEERS_ENVIRONMENT / "requirements.txt"
    wanted = "\n".join(PEERS_REQUIREMENTS) + "\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    log.info("installing %s into %s", ", ".join(PEERS_REQUIREMENTS), PEERS_ENVIRONMENT)
    shutil.rmtree(PEERS_ENVIRONMENT, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", PEERS_ENVIRONMENT], check=True)
    pip = [PEERS_ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "--quiet"]
    done = subprocess.run([*pip, *PEERS_REQUIREMENTS], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"--peers: pip could not install them: {' '.join(last)}")
    stamp.write_text(wanted)


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
        raise RuntimeError(f"{network}: not the same network everywhere: {counts} parameters")
    for _ in range(rounds):
        for mode in ("train", "eval"):
            for contender in running.values():
                contender.measure(mode, seconds, batch_size)
        running[OURS].measure("peak", seconds / 4, batch_size)
    return {name: contender.stop() for name, contender in running.items()}


def benchmark(
    networks: list[str], batch_size: int, peers: bool, rounds: int, seconds: float, write: bool
) -> None:
    """Measures, prints the tables, and puts them into experiments/RESULTS.md if `write`.

    Raises:
      ConfigError: an unknown network, or a number out of range.
    """
    for field, value in (("batch_size", batch_size), ("rounds", rounds), ("seconds", seconds)):
        if value <= 0:
            raise ConfigError(f"--{field}={value}: must be greater than 0")
    for name in networks:
        if name not in NETWORKS:
            raise ConfigError(f"--networks={name}: must be among {', '.join(NETWORKS)}")
    if peers:
        install_peers()
    commands = contenders(peers)
    console = rich.console.Console(highlight=False)
    results = {}
    for name in networks or NETWORKS:
        with console.status(f"{name}: {', '.join(commands)}"):
            results[name] = measure(name, batch_size, commands, rounds, seconds)
        console.print(_line(name, results[name], batch_size), soft_wrap=True)
    if write:
        from cnn_jax.benchmark import table

        text = table.render(results, batch_size, rounds, seconds)
        table.put_into(RESULTS, text, batch_size)
        console.print(f"written to {RESULTS}")


def training_flops(network: str) -> int:
    """FLOPs of one image's forward pass and both gradients."""
    spec = NETWORKS[network]
    return summary.summarise(getattr(models, spec.model)(), spec.image_shape).training_flops


def fastest_peer(measured: dict[str, Measured], mode: str) -> str | None:
    """The float32 contender, other than ours, with the highest median."""
    peers = [name for name in measured if name != OURS and name not in NOT_FLOAT32]
    return max(peers, key=lambda name: statistics.median(measured[name].rates[mode]), default=None)


def ratio(measured: dict[str, Measured], peer: str, mode: str) -> float:
    """Median over the rounds of our rate to the peer's in the same round."""
    pairs = zip(measured[OURS].rates[mode], measured[peer].rates[mode], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def peak_share(network: str, measured: Measured) -> tuple[float, float]:
    """GFLOP/s of our training step, and its share of the matmul peak of the same process."""
    from cnn_jax.benchmark.ours import PEAK_SIZE

    gflops = statistics.median(measured.rates["train"]) * training_flops(network) / 1e9
    peak = statistics.median(measured.rates["peak"]) * 2 * PEAK_SIZE**3 / 1e9
    return gflops, gflops / peak


def _line(network: str, measured: dict[str, Measured], batch_size: int) -> str:
    ours = measured[OURS]
    gflops, share = peak_share(network, ours)
    text = (
        f"{network}: {statistics.median(ours.rates['train']):,.0f} images/s in training, {gflops:,.0f} "
        f"GFLOP/s, {share:.0%} of the matmul peak, {ours.peak_memory / 2**20:,.0f} MiB, compiled in "
        f"{ours.compile_seconds['train']:.1f} s"
    )
    if peer := fastest_peer(measured, "train"):
        text += f"; {ratio(measured, peer, 'train'):.2f} x {peer}"
        peer = fastest_peer(measured, "eval")
        text += f"; evaluation {ratio(measured, peer, 'eval'):.2f} x {peer}"
    return text


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {
        flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()
    }
