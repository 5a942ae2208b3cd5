"""The parts of --device_check, each in a process of its own.

Arguments: PART FILE ENDS BUDGET NETWORKS DATA_DIR. A part appends its findings to FILE as JSON lines
as they come; its last summary is shown. ENDS is when time is up, by time.monotonic(). Exit codes:
0 passed, 1 failed.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnn_jax.common import cache, environment
from cnn_jax.studies.benchmark import speedrun
from cnn_jax.studies.device_check import agreement, speed
from cnn_jax.train import checkpoint, workdir

# Seconds before its end in which a part begins nothing new.
MARGIN = 3


class Part:
    """What every part needs.

    Attributes:
      file: of the findings.
      tiny: whether to do as little as possible.
      networks: which to compare and measure.
      data_dir: of TFDS, or None.
    """

    def __init__(
        self, file: Path, ends: float, tiny: bool, networks: Sequence[str], data_dir: str | None
    ):
        self.file, self.tiny, self.networks, self.data_dir = file, tiny, networks, data_dir
        self._ends = ends

    def found(self, **finding: object) -> None:
        """Keeps a finding; numbers that JSON lacks become text."""
        kept = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in finding.items()
        }
        with self.file.open("a") as file:
            file.write(json.dumps(kept) + "\n")

    def left(self) -> float:
        """Seconds in which something new may begin."""
        return self._ends - MARGIN - time.monotonic()

    def _folder(self, name: str) -> Path:
        """A workdir beside the findings, without what an earlier check left in it."""
        path = self.file.with_name(name)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def _start(self, folder: Path, changes: list[str], *more: str) -> subprocess.Popen:
        """Starts to train the embedded dataset's experiment."""
        command = [sys.executable, "-P", "-m", "cnn_jax.main", "train", "quickstart"]
        command += [f"--workdir={folder}", *(f"--set={change}" for change in changes)]
        return subprocess.Popen([*command, *more])

    def _train(self, folder: Path, changes: list[str], *more: str) -> float:
        """Trains it to its end; the seconds that took.

        Raises:
          RuntimeError: the run failed; the part's log has its message.
        """
        began = time.monotonic()
        if code := self._start(folder, changes, *more).wait():
            raise RuntimeError(f"train in {folder.name} ended with exit code {code}")
        return time.monotonic() - began

    # -------------------------------------------------------------------- (a) agreement

    def agreement(self) -> bool:
        """One step's loss and gradients on this device against those on this machine's CPU."""
        environment.check_devices()
        return agreement.agreement(self.networks, self.found)

    # ------------------------------------------------------------------- (b) equal bits

    def equal_bits(self) -> bool:
        """The embedded dataset's run twice, and once with a kill by SIGKILL in its middle."""
        every, epochs = (8, 1) if self.tiny else (50, 6)
        changes = [
            f"epochs={epochs}",
            f"checkpoint_every_steps={every}",
            "deterministic=true",
        ]
        one, two, killed = (self._folder(f"equal_bits_{n}") for n in ("one", "two", "killed"))
        self._train(one, changes)
        process = self._start(killed, changes)
        while process.poll() is None and not checkpoint.Checkpoints(killed).steps():
            time.sleep(0.01)
        step = max(checkpoint.Checkpoints(killed).steps(), default=0)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        self.found(killed_after_checkpoint=step, exit_code=code)
        self._train(killed, changes)
        self._train(two, changes)
        first = _final(one)
        equal = {"two_runs": first == _final(two), "kill_and_resume": first == _final(killed)}
        text = ", ".join(
            f"{name} {'equal' if same else 'DIFFERENT'}" for name, same in equal.items()
        )
        arrays = sum(not name.startswith("line ") for name in first)
        text += f"; killed after step {step}, {arrays} arrays and the metrics compared"
        self.found(**equal, summary=text)
        return code == -signal.SIGKILL and all(equal.values())

    # --------------------------------------------------------------------- (c) speedrun

    def speedrun(self) -> bool:
        """As many runs of the speedrun as the time allows, at most 20."""
        environment.check_devices()
        tiny = ("epochs=1", "log_every_steps=1000")
        given = ("quickstart", tiny) if self.tiny else (speedrun.EXPERIMENT, ())
        found: list[dict] = []
        began = time.monotonic()
        for run in speedrun.runs(1 if self.tiny else 20, self.data_dir, *given):
            found.append(run)
            self.found(**run, summary=speedrun.summary(found))
            took, began = time.monotonic() - began, time.monotonic()
            if self.left() < took:
                break
        return True

    # ------------------------------------------------------------------------ (d) speed

    def speed(self) -> bool:
        """Images/s of the networks at batch 1,024 and 128, beside PyTorch's where it is installed."""
        return speed.speed(self.networks, self.tiny, self.found, self.left)

    # --------------------------------------------------------------------- (e) resident

    def resident(self) -> bool:
        """Images/s of a run with the data on the device, and of the same run streamed."""
        rates = {}
        for name, resident in (("streamed", "false"), ("resident", "true")):
            folder = self._folder(name)
            epochs = 1 if self.tiny else 6
            self._train(folder, [f"resident_data={resident}", f"epochs={epochs}"])
            rates[name] = max(line["images_per_second"] for line in workdir.metrics(folder))
        text = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
        self.found(**rates, summary=text)
        return True

    # ------------------------------------------------------------------------ (f) seeds

    def seeds(self) -> bool:
        """Several seeds at once against one alone: the time of the whole command, and equal bits."""
        # Seeds train on one device each; equal bits need deterministic algorithms on a GPU.
        changes = ["devices=1", "deterministic=true", *(["epochs=1"] if self.tiny else [])]
        count = 2 if self.tiny else 8
        alone, together = self._folder("seeds_alone"), self._folder("seeds_at_once")
        seconds = [
            self._train(alone, changes),
            self._train(together, changes, f"--seeds={count}"),
        ]
        equal = _final(alone) == _final(together / "seed_0")
        text = f"{count} seeds in {seconds[1]:.1f} s, one in {seconds[0]:.1f} s; "
        text += f"seed 0 is {'equal' if equal else 'DIFFERENT'}"
        self.found(seconds=seconds, seeds=count, equal=equal, summary=text)
        return equal


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


def main(part: str, file: str, ends: str, budget: str, networks: str, data_dir: str) -> int:
    """Runs one part. An error is a finding, and its traceback is in the log."""
    work = Part(Path(file), float(ends), budget == "tiny", networks.split(","), data_dir or None)
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    cache.enable_compilation_cache()
    try:
        return int(not getattr(work, part)())
    except Exception as error:
        work.found(error=agreement.in_one_line(error))
        raise


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
