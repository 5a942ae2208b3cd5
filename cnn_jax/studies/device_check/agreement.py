"""One training step's loss and gradient on the device, against those on the same machine's CPU.

As a program, it writes the CPU's: its arguments are FOLDER NETWORK..., and it prints each network's
name when FOLDER/NETWORK.npz is there.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from cnn_jax import models
from cnn_jax.common import cache
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.studies.benchmark.ours import noise
from cnn_jax.train import parallel
from cnn_jax.train.step import init_state, train_step

# Largest relative difference from the CPU: |a - b| / |b| of the loss and of the whole gradient. The
# default precision of an accelerator may be TF32 (10 bits of a float32's 23) or bfloat16 (7 bits).
TOLERANCES = {"highest": 1e-3, "default": 5e-2}
# Programs that are compiled at once; more would only wait for the device, which XLA asks for the
# fastest algorithms.
_THREADS = 4
_BATCH = 64


Gradients = dict[str, np.ndarray]


def agreement(networks: Sequence[str], found: Callable[..., None]) -> bool:
    """Compares each network in both precisions with the CPU in the highest one.

    Args:
      networks: their names in `NETWORKS`.
      found: called with each finding. A network that fails does not stop the others.

    Returns:
      Whether all are within TOLERANCES.
    """
    kind, compared, failed = jax.devices()[0].device_kind, 0, 0
    worst = dict.fromkeys(TOLERANCES, 0.0)
    for network, precision, off in _differences(networks):
        compared += 1
        if isinstance(off, str):
            failed += 1
            found(network=network, precision=precision, error=off)
            continue
        good = all(value <= TOLERANCES[precision] for value in off.values())  # NaN is not
        failed += not good
        largest = max(np.inf if np.isnan(value) else value for value in off.values())
        worst[precision] = max(worst[precision], largest)
        text = f"{compared - failed} of {compared} agree with the CPU; largest difference: "
        text += ", ".join(
            f"{name} precision {value:.1e} (limit {TOLERANCES[name]:g})"
            for name, value in worst.items()
        )
        found(network=network, precision=precision, **off, good=good, summary=f"{kind}: {text}")
    return not failed


def _differences(networks: Sequence[str]) -> Iterator[tuple[str, str, dict[str, float] | str]]:
    """Network, precision, and the differences by name, or why there are none."""
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tempfile.TemporaryDirectory() as folder,
        _on_the_cpu(folder, networks) as process,
    ):
        jobs = [(network, precision) for network in networks for precision in TOLERANCES]
        ours = dict(zip(jobs, [pool.submit(_tried, *job) for job in jobs], strict=True))
        for network in networks:
            reference = _next_reference(process, folder, network)
            for precision in TOLERANCES:
                gradient = ours.pop((network, precision)).result()
                if isinstance(gradient, str):
                    yield network, precision, gradient
                elif isinstance(reference, str):
                    yield network, precision, f"on the CPU: {reference}"
                else:
                    off = {k: difference(gradient[k], reference[k]) for k in gradient}
                    yield network, precision, off


def _on_the_cpu(folder: str, networks: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", __name__, folder, *networks]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def _next_reference(process: subprocess.Popen, folder: str, network: str) -> Gradients | str:
    """What the process on the CPU has found for this network, or its error; waits for it."""
    assert process.stdout is not None, "it is a pipe"
    answer = process.stdout.readline().strip()
    if not answer:
        return f"ended with exit code {process.wait()}"
    if answer != network:
        return answer
    path = Path(folder, f"{network}.npz")
    with np.load(path) as arrays:
        found = dict(arrays)
    path.unlink()
    return found


def _tried(network: str, precision: str) -> Gradients | str:
    try:
        return gradients(network, precision)
    except Exception as error:  # of the compiler, the device's memory, the driver
        return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


def gradients(network: str, precision: str) -> Gradients:
    """The loss of one training step, and its gradient as one vector."""
    spec = NETWORKS[network]
    model = getattr(models, spec.model)()
    fields: dict[str, Any] = {"batch_size": _BATCH, "matmul_precision": precision}
    config = Config(model=model, data=DataConfig("none"), **fields)
    # Its state after the step is the gradient.
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(np.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    step = functools.partial(train_step, model=model, optimizer=keep, config=config)
    # Every device draws the same whole numbers; their logarithms may differ in the last bit.
    state = init_state(model, keep, spec.image_shape, 0)
    after, loss = parallel.jit(step)(state, noise(_BATCH, spec.image_shape))
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(after.opt_state)]
    return {"loss": np.asarray(loss), "gradient": np.concatenate(leaves)}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main(folder: str, *networks: str) -> None:
    """Writes the gradients of each network; prints its name, or what went wrong."""
    cache.enable_compilation_cache()
    for network in networks:
        found = _tried(network, "highest")
        if not isinstance(found, str):
            np.savez(Path(folder, f"{network}.npz"), **found)  # type: ignore[arg-type]
        print(found if isinstance(found, str) else network, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
