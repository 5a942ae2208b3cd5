"""A run without the training: checkpoints and lines, one after another, in a workdir in a bucket.

It forks for each line "ADDRESS CACHE" of its input, and prints the child's number, and then how it
ended. So a child starts in no time, and many can be killed.
"""

import os
import sys
import types

import numpy as np

from cnn_jax.train import mirror, workdir
from cnn_jax.train.checkpoint import Restored
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.step import TrainState

STEPS = 12


def state_of(step: int) -> TrainState:
    """A state in which every number depends on the step."""
    kernel = np.random.default_rng(step).normal(size=(64, 1000))
    rng = np.zeros(2, np.uint32)
    parts = {"params": {"kernel": kernel}, "model_state": {}, "opt_state": {"mu": kernel + 1}}
    return TrainState(step=np.int32(step), rng=rng, sums={"loss": np.float32(step)}, **parts)


def check(restored: Restored) -> None:
    """Checks that a checkpoint is whole and that of its step."""
    wanted = state_of(restored.step)
    np.testing.assert_array_equal(restored.arrays["params/kernel"], wanted.params["kernel"])
    np.testing.assert_array_equal(restored.arrays["opt_state/mu"], wanted.opt_state["mu"])


def write(address: str) -> None:
    folder = mirror.folder_of(address)
    workdir.prepare(folder)
    signals = types.SimpleNamespace()
    with (
        workdir.locked(folder) as lock,
        mirror.attached(address, folder, lock, signals) as (check_lock, changed),
    ):
        checkpoints = CheckpointWriter(folder, keep=2, proven=changed)
        restored = checkpoints.newest()
        step = restored.step if restored else 0
        if restored:
            check(restored)
        checkpoints.start_writing(step if restored else None)
        workdir.keep_metrics_until(folder, step)
        lines = [line["step"] for line in workdir.metrics(folder)]
        assert lines in ([*range(1, step + 1)], [*range(1, step)]), (step, lines)
        if len(lines) < step:  # killed between the checkpoint and its line
            workdir.append_metrics(folder, {"step": step})
        workdir.write_json(folder / "config.json", {})
        changed(checkpoints.steps())
        for after in range(step + 1, STEPS + 1):
            check_lock()
            checkpoints.save(state_of(after), {})
            checkpoints.wait()
            workdir.append_metrics(folder, {"step": after})
            changed()
        checkpoints.close()


def main() -> None:
    for line in sys.stdin:
        address, cache = line.split()
        if not (pid := os.fork()):
            os.environ["CNN_JAX_CACHE_DIR"] = cache
            write(address)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
