"""The contenders, one worker process each; PyTorch and Keras run in their own environment."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cnn_jax.common import cpu
from cnn_jax.common.errors import ConfigError
from cnn_jax.studies.benchmark.figures import OURS, OURS_BF16, Measured

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
REPOSITORY = _HERE.parent.parent.parent
_PEERS_ENVIRONMENT = REPOSITORY / ".venv-peers"
_PEERS_REQUIREMENTS = ("torch==2.13.0", "keras==3.15.0", "tensorflow==2.21.0", "jax==0.10.1")


class Contender:
    """A worker process."""

    def __init__(self, name: str, command: list[str], device: bool = False):
        """Starts it, on the accelerator if `device`, else on the CPU."""
        self.name = name
        cpu_only = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env = {**os.environ, **({} if device else cpu_only)}
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
        """Measures one round."""
        assert self._process.stdin is not None, "it is a pipe"
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
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            reason = self._process.communicate()[1].strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name} ended: {' '.join(reason)}")
        return json.loads(line)


def contenders(peers: bool) -> dict[str, list[str]]:
    """Name -> command, with the placeholders "{network}" and "{batch}"."""
    job = ["{network}", "{batch}"]
    commands = {OURS: [sys.executable, "-m", "cnn_jax.studies.benchmark.ours", *job]}
    if peers and cpu.multiplies_bfloat16():
        commands[OURS_BF16] = [*commands[OURS], "bfloat16"]
    if peers:
        python = str(_PEERS_ENVIRONMENT / "bin" / "python")
        variants = ["default", "channels_last", "compile"]
        if "avx512f" in cpu.features():
            variants.append("bf16")
        for variant in variants:
            commands[f"torch {variant}"] = [python, str(_HERE / "peer_torch.py"), *job, variant]
        for backend in ("tensorflow", "jax"):
            commands[f"keras {backend}"] = [python, str(_HERE / "peer_keras.py"), *job, backend]
    return commands


def install_peers() -> None:
    """Makes .venv-peers if it is absent or outdated.

    Raises:
      ConfigError: pip could not install the packages.
    """
    stamp = _PEERS_ENVIRONMENT / "requirements.txt"
    wanted = "\n".join(_PEERS_REQUIREMENTS) + "\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    log.info("installing %s into %s", ", ".join(_PEERS_REQUIREMENTS), _PEERS_ENVIRONMENT)
    shutil.rmtree(_PEERS_ENVIRONMENT, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", _PEERS_ENVIRONMENT], check=True)
    pip: list[str | Path] = [
        _PEERS_ENVIRONMENT / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
    ]
    done = subprocess.run([*pip, *_PEERS_REQUIREMENTS], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"--peers: pip could not install them: {' '.join(last)}")
    stamp.write_text(wanted)
