"""The contenders, one worker process each; PyTorch and Keras run in their own environment."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
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

    def __init__(
        self,
        name: str,
        command: list[str],
        device: bool = False,
        patience: float | None = None,
    ):
        """Starts it, and waits until it has compiled.

        Args:
          name: for messages.
          command: of a worker.
          device: on the accelerator, else on the CPU.
          patience: the seconds in which it must answer; then it is killed.

        Raises:
          RuntimeError: it ended; so do `measure` and `stop`.
        """
        self.name, self._patience = name, patience
        cpu_only = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # JAX takes most of a GPU's memory at its start otherwise, and several contenders share it.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        env = {**os.environ, **(shared if device else cpu_only)}
        # Not a pipe: nobody reads it before the end, and a full one would stop the worker.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
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
        self._errors.close()
        return Measured(
            self.rates,
            self.about["compile_seconds"],
            self.peak_memory,
            self.about["parameters"],
            self.about["version"],
        )

    def _answer(self) -> dict:
        assert self._process.stdout is not None, "it is a pipe"
        late = threading.Timer(self._patience or threading.TIMEOUT_MAX, self._process.kill)
        late.start()
        line = self._process.stdout.readline()
        late.cancel()
        if not line:
            self._process.communicate()
            code = self._process.returncode
            with self._errors as errors:
                errors.seek(0)
                reason = errors.read().strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name} ended with exit code {code}: {' '.join(reason)}")
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
