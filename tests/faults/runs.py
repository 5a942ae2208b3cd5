"""A small run from the command line, what disturbs it, and what an undisturbed one leaves."""

import contextlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints
from tests.networks import Small
from tests.tiny import REPOSITORY

TIMES = ("epoch_seconds", "images_per_second")

# All that a state can consist of, small enough for a checkpoint after every step.
EXPERIMENT = f'''"""A small run with BatchNorm, dropout and augmentation."""

import flax.linen as nn

from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Conv, Dense, Dropout, Flatten, MaxPool


{inspect.getsource(Small)}

def config() -> Config:
    data = DataConfig("tiny_squares", flip=True, crop_padding=2, validation_examples=32)
    return Config(
        model=Small(),
        data=data,
        epochs=6,
        batch_size=8,
        eval_batch_size=24,
        checkpoint_every_steps=2,
        keep_checkpoints=2,
        grace_seconds=120.0,
    )
'''


def start(
    *arguments,
    devices: int = 1,
    preexec_fn=None,
    cwd: Path = REPOSITORY,
    program: tuple[str, str] = ("-m", "cnn_jax.main"),
    **environment: str,
) -> subprocess.Popen:
    """`python -m cnn_jax.main ARGUMENTS` in the background."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"XLA_FLAGS": flags} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=preexec_fn,
    )


def start_several(*each: tuple, **options) -> list[subprocess.Popen]:
    """One run of several processes on loopback, from the arguments of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = f"--coordinator=127.0.0.1:{port}", f"--processes={len(each)}"
    return [start(*own, *joined, f"--process={i}", **options) for i, own in enumerate(each)]


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str, str]:
    """Exit code, standard output, standard error; a process that hangs is killed, and fails."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"still running after {seconds} s: {output}{errors}") from None
    return process.returncode, output, errors


def wait_until(condition, process: subprocess.Popen, seconds: float = 900) -> None:
    """Polls until `condition()` or the end of the process."""
    give_up = time.monotonic() + seconds
    pause = threading.Event()
    while not condition() and process.poll() is None:
        assert time.monotonic() < give_up, "nothing happened"
        pause.wait(0.005)


def has_started(workdir: Path):
    """The condition that a run has taken its lock."""
    return lambda: (workdir / "lock").exists() and (workdir / "lock").stat().st_size > 0


def has_saved(workdir: Path, step: int = 1):
    """The condition that a checkpoint of at least that step is complete."""
    return lambda: max(Checkpoints(workdir).steps(), default=0) >= step


def signal_when(condition, process: subprocess.Popen, *numbers: signal.Signals) -> None:
    """Sends signals as soon as the condition holds."""
    wait_until(condition, process)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def lines_of(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in workdirs.metrics(workdir)
    ]


def differences(workdir: Path, other: Path) -> list[str]:
    """In what two finished runs differ: arrays of their newest checkpoints, lines of metrics."""
    one, two = Checkpoints(workdir).newest(), Checkpoints(other).newest()
    found = [
        name
        for name in one.arrays.keys() | two.arrays.keys()
        if name not in one.arrays
        or name not in two.arrays
        or one.arrays[name].dtype != two.arrays[name].dtype
        or one.arrays[name].tobytes() != two.arrays[name].tobytes()
    ]
    if one.step != two.step:
        found.append(f"step {one.step} and {two.step}")
    if lines_of(workdir) != lines_of(other):
        found.append("metrics.jsonl")
    return found
