"""The parts of --device_check, each in a process of its own. Arguments: PART FILE BUDGET DATA_DIR.

A part appends its findings to FILE as JSON lines as they come; its last line has a summary. Exit
codes: 0 passed, 1 failed.
"""

import functools
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from cnn_jax import models
from cnn_jax.common import cache, environment
from cnn_jax.config import Config, DataConfig
from cnn_jax.studies.benchmark import contenders, speedrun
from cnn_jax.studies.benchmark.networks import NETWORKS
from cnn_jax.train import checkpoint, parallel, workdir
from cnn_jax.train.step import init_state, train_step

# Largest relative difference from the CPU: |a - b| / |b| of the loss and of the whole gradient. The
# default precision of an accelerator may be TF32 (10 bits of a float32's 23) or bfloat16 (7 bits).
TOLERANCES = {"highest": 1e-3, "default": 5e-2}


class Part:
    """What every part needs.

    Attributes:
      file: of the findings.
      tiny: whether to do as little as possible.
      data_dir: of TFDS, or None.
    """

    def __init__(self, file: Path, tiny: bool, data_dir: str | None):
        self.file, self.tiny, self.data_dir = file, tiny, data_dir
        self.networks = ["lenet"] if tiny else list(NETWORKS)

    def found(self, **finding: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(finding) + "\n")

    def _folder(self, name: str) -> Path:
        """A workdir beside the findings, without what an earlier check left in it."""
        path = self.file.with_name(name)
        shutil.rmtree(path, ignore_errors=True)
        return path

    # -------------------------------------------------------------------- (a) agreement

    def agreement(self) -> bool:
        """One step's loss and gradients on this device against those on this machine's CPU."""
        worst = {}
        for precision, tolerance in TOLERANCES.items():
            reference = self._reference(precision)
            largest = 0.0
            for network in self.networks:
                ours = gradients(network, precision)
                theirs = {k: reference[f"{network} {k}"] for k in ours}
                off = {k: difference(ours[k], theirs[k]) for k in ours}
                good = all(value <= tolerance for value in off.values())
                self.found(
                    network=network, precision=precision, tolerance=tolerance, **off, good=good
                )
                largest = max(largest, *(v if v == v else np.inf for v in off.values()))
            worst[precision] = largest
        kind = jax.devices()[0].device_kind
        text = ", ".join(
            f"{k} precision {v:.1e} (limit {TOLERANCES[k]:g})" for k, v in worst.items()
        )
        self.found(device=kind, summary=f"{kind} against the CPU, largest difference: {text}")
        return all(worst[k] <= TOLERANCES[k] for k in worst)

    def _reference(self, precision: str) -> dict[str, np.ndarray]:
        path = self.file.with_name(f"cpu_{precision}.npz")
        command = [sys.executable, "-P", "-m", __spec__.name, "cpu", str(path)]
        command += ["tiny" if self.tiny else "whole", precision]
        subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        with np.load(path) as arrays:
            found = dict(arrays)
        path.unlink()
        return found

    # ------------------------------------------------------------------- (b) equal bits

    def equal_bits(self) -> bool:
        """The embedded dataset's run twice, and once with a kill by SIGKILL in its middle."""
        folders = [self._folder(f"equal_bits_{name}") for name in ("one", "two", "killed")]
        once = self._train(folders[0])
        once.wait()
        killed = self._train(folders[2])
        while killed.poll() is None and not checkpoint.Checkpoints(folders[2]).steps():
            time.sleep(0.01)
        step = max(checkpoint.Checkpoints(folders[2]).steps(), default=0)
        killed.send_signal(signal.SIGKILL)
        code = killed.wait()
        self.found(killed_after_checkpoint=step, exit_code=code)
        self._train(folders[2]).wait()
        self._train(folders[1]).wait()
        one, two, resumed = map(_final, folders)
        equal = {"two_runs": one == two, "kill_and_resume": one == resumed}
        passed = code == -signal.SIGKILL and all(equal.values())
        text = ", ".join(
            f"{name} {'equal' if same else 'DIFFERENT'}" for name, same in equal.items()
        )
        self.found(**equal, summary=f"{text}; killed after step {step}, {len(one)} arrays compared")
        return passed

    def _train(self, folder: Path) -> subprocess.Popen:
        every = 8 if self.tiny else 50
        changes = [f"epochs={1 if self.tiny else 6}", f"checkpoint_every_steps={every}"]
        changes.append("deterministic=true")
        return self._command(folder, "quickstart", changes)

    def _command(
        self, folder: Path, experiment: str, changes: list[str], more: list[str] | None = None
    ) -> subprocess.Popen:
        command = [sys.executable, "-P", "-m", "cnn_jax.main", "train", experiment]
        command += [f"--workdir={folder}", *(f"--set={change}" for change in changes)]
        command += [f"--data_dir={self.data_dir}"] if self.data_dir else []
        return subprocess.Popen([*command, *(more or [])])

    # --------------------------------------------------------------------- (c) speedrun

    def speedrun(self) -> bool:
        """As many runs of the speedrun as the time allows, at most 20."""
        tiny = ("epochs=1", "log_every_steps=1000")
        given = ("quickstart", tiny) if self.tiny else (speedrun.EXPERIMENT, ())
        found = []
        for run in speedrun.runs(1 if self.tiny else 20, self.data_dir, *given):
            found.append(run)
            self.found(**run, summary=speedrun.summary(found))
        return True

    # ------------------------------------------------------------------------ (d) speed

    def speed(self) -> bool:
        """Images/s of the networks at batch 128 and 1,024; then PyTorch's where it is installed."""
        seconds, sizes = (0.05, (128,)) if self.tiny else (1.0, (128, 1024))
        commands = {"cnn_jax": [sys.executable, "-m", "cnn_jax.studies.benchmark.ours"]}
        if importlib.util.find_spec("torch") and not self.tiny:
            script = str(Path(contenders.__file__).with_name("peer_torch.py"))
            commands |= {f"torch {v}": [sys.executable, script, v] for v in ("compile", "bf16")}
        good, rates = True, 0
        for name, (python, *arguments) in commands.items():
            for batch in sizes:
                for network in self.networks:
                    variant = arguments[1:] if name != "cnn_jax" else []
                    start = arguments[:1] if name != "cnn_jax" else arguments
                    command = [python, *start, network, str(batch), *variant]
                    try:
                        one = contenders.Contender(name, command, device=True)
                        one.measure("train", seconds, batch)
                        rate = statistics.median(one.stop().rates["train"])
                    except RuntimeError as error:
                        self.found(network=network, batch=batch, contender=name, error=str(error))
                        good = good and name != "cnn_jax"
                        continue
                    rates += 1
                    place = f"{rates} rates; the last: {network} at batch {batch}"
                    text = f"{place}, {name}, {rate:,.0f} images/s"
                    self.found(
                        network=network, batch=batch, contender=name, rate=rate, summary=text
                    )
        return good

    # --------------------------------------------------------------------- (e) resident

    def resident(self) -> bool:
        """Images/s of a run with the data on the device, and of the same run streamed."""
        rates = {}
        for resident in ("false", "true"):
            folder = self._folder(f"resident_{resident}")
            changes = [f"resident_data={resident}", f"epochs={1 if self.tiny else 6}"]
            self._command(folder, "quickstart", changes).wait()
            lines = workdir.metrics(folder)
            rates[resident] = max(line["images_per_second"] for line in lines)
        text = f"resident {rates['true']:,.0f} images/s, streamed {rates['false']:,.0f}"
        self.found(**rates, summary=text)
        return True

    # ------------------------------------------------------------------------ (f) seeds

    def seeds(self) -> bool:
        """Several seeds at once against one alone: the time of the whole command, and equal bits."""
        count, changes = (2, ["epochs=1"]) if self.tiny else (8, [])
        folders = self._folder("seeds_alone"), self._folder("seeds_at_once")
        seconds = []
        for folder, more in zip(folders, ([], [f"--seeds={count}"]), strict=True):
            began = time.monotonic()
            self._command(folder, "quickstart", changes, more).wait()
            seconds.append(time.monotonic() - began)
        equal = _final(folders[0]) == _final(folders[1] / "seed_0")
        text = f"{count} seeds in {seconds[1]:.1f} s, one in {seconds[0]:.1f} s; "
        text += f"seed 0 is {'equal' if equal else 'DIFFERENT'}"
        self.found(seconds=seconds, seeds=count, equal=equal, summary=text)
        return equal


def gradients(network: str, precision: str) -> dict[str, np.ndarray]:
    """The loss of one training step, and its gradient as one vector."""
    spec = NETWORKS[network]
    model = getattr(models, spec.model)()
    fields: dict[str, Any] = {"batch_size": 64, "matmul_precision": precision}
    config = Config(model=model, data=DataConfig("none"), **fields)
    # Its state after the step is the gradient.
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(np.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (64, *spec.image_shape), dtype=np.uint8),
        "label": random.integers(0, 10, 64).astype(np.int32),
        "index": np.arange(64, dtype=np.int32),
    }
    step = functools.partial(train_step, model=model, optimizer=keep, config=config)
    # Every device draws the same whole numbers; their logarithms may differ in the last bit.
    state = init_state(model, keep, spec.image_shape, 0)
    after, loss = parallel.jit(step)(state, batch)
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(after.opt_state)]
    return {"loss": np.asarray(loss), "gradient": np.concatenate(leaves)}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _final(folder: Path) -> dict[str, bytes]:
    """The bits of the last checkpoint, and of the metrics without times."""
    restored = checkpoint.Checkpoints(folder).newest()
    if restored is None:
        raise FileNotFoundError(f"{folder}: the run left no checkpoint")
    found = {name: np.asarray(array).tobytes() for name, array in restored.arrays.items()}
    timed = ("epoch_seconds", "images_per_second")
    for line in workdir.metrics(folder):
        kept = {name: value for name, value in line.items() if name not in timed}
        found[f"line {line['epoch']}"] = json.dumps(kept).encode()
    return found


def _end_with_parent() -> None:
    """Ends this part and the processes that it started as soon as the parent has ended."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main(part: str, file: str, budget: str, rest: str) -> int:
    """Runs one part; "cpu" writes the reference of `agreement` and takes the precision last."""
    tiny = budget == "tiny"
    work = Part(Path(file), tiny, None if part == "cpu" else rest or None)
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    cache.enable_compilation_cache()
    if part == "cpu":
        arrays: dict[str, Any] = {
            f"{network} {name}": value
            for network in work.networks
            for name, value in gradients(network, rest).items()
        }
        np.savez(file, **arrays)
        return 0
    if part in ("agreement", "speedrun"):  # the other parts' processes open the device themselves
        environment.check_devices()
    return int(not getattr(work, part)())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
