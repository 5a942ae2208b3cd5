"""Where a run reports besides metrics.jsonl: the trackers of --tracker, and all of them as one."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cnn_jax.common import extras
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import user_path
from cnn_jax.config import experiment
from cnn_jax.train.trackers.base import Ending, Tracker
from cnn_jax.train.trackers.csv_files import CsvFiles
from cnn_jax.train.trackers.mlflow_run import MlflowRun
from cnn_jax.train.trackers.tensorboard import TensorBoard
from cnn_jax.train.trackers.wandb_run import WandbRun

log = logging.getLogger(__name__)

DEFAULT = ("tensorboard",)
KNOWN: dict[str, Callable[[Path, dict], Tracker]] = {
    "tensorboard": TensorBoard,
    "csv": CsvFiles,
    "wandb": WandbRun,
    "mlflow": MlflowRun,
}
NEEDED = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy")}  # each an extra in setup.cfg


def find(names: Sequence[str]) -> dict[str, Callable[[Path, dict], Tracker]]:
    """What makes each of these trackers, by name.

    Args:
      names: of KNOWN, or paths that end in .py: files with a function or class `tracker`.

    Raises:
      ConfigError: there is no such tracker, it needs a package that is missing, or its file fails.
    """
    found = {}
    for name in names:
        if name.endswith(".py"):
            found[name] = _of_file(name)
            continue
        if name not in KNOWN:
            raise ConfigError(
                f"--tracker={name}: must be {', '.join(KNOWN)} or the path of a .py file; several are "
                "separated by commas"
            )
        for module in NEEDED.get(name, ()):
            extras.need(module, f"--tracker={name}", name)
        found[name] = KNOWN[name]
    return found


def _of_file(path: str) -> Callable[[Path, dict], Tracker]:
    file = user_path(path).absolute()
    if not file.is_file():
        raise ConfigError(f"--tracker={path}: no such file")
    return experiment.run_file(file, f"--tracker={path}", lambda module: module.tracker)


class Trackers:
    """All trackers of a run. One that fails costs a warning, and the run continues without it."""

    def __init__(self, makers: dict[str, Callable[[Path, dict], Tracker]], workdir: Path):
        """Args:
        makers: from `find`; empty in all processes but the main one.
        workdir: the run's folder.
        """
        self._makers, self._workdir = makers, workdir
        self._running: dict[str, Tracker] = {}
        self._recorded: dict[str, dict[str, int]] = {}

    def start(self, saved: dict, lines: Sequence[dict]) -> None:
        """Makes the trackers, and sends what their records lack of the epochs so far.

        Args:
          saved: the content of config.json.
          lines: of metrics.jsonl.
        """
        for name, make in self._makers.items():
            with self._guarded(name):
                self._running[name] = tracker = make(self._workdir, saved)
                recorded = tracker.recorded()
                if recorded is None:
                    continue
                self._recorded[name] = recorded
                for line in lines:
                    if values := self._new(name, metrics_of(line), line["step"]):
                        tracker.metrics(values, line["step"])

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Sends metrics of training step `step`."""
        for name, tracker in [*self._running.items()]:
            if new := self._new(name, values, step):
                with self._guarded(name):
                    tracker.metrics(new, step)

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        """Sends pictures, uint8 [H, W, C]."""
        for name, tracker in [*self._running.items()]:
            if new := self._new(name, images, step):
                with self._guarded(name):
                    tracker.images(new, step)

    def checkpoint(self, step: int, sha256: str) -> None:
        """Sends the checksum of a checkpoint."""
        self._each(lambda tracker: tracker.checkpoint(step, sha256))

    def flush(self) -> None:
        """Has written what is buffered, after an epoch."""
        self._each(lambda tracker: tracker.flush())

    def close(self, ending: Ending) -> None:
        """Ends all records."""
        self._each(lambda tracker: tracker.close(ending))
        self._running.clear()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._running.items()]:
            with self._guarded(name):
                action(tracker)

    def _new(self, name: str, values: dict, step: int) -> dict:
        """Those of `values` that the record of this tracker does not have."""
        recorded = self._recorded.get(name, {})
        return {key: value for key, value in values.items() if step > recorded.get(key, -1)}

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker must not end a run
            self._running.pop(name, None)
            kind, reason = type(error).__name__, " ".join(str(error).split())
            log.warning(
                "warning: --tracker=%s: %s: %s; the run goes on without it", name, kind, reason
            )


def metrics_of(line: dict) -> dict[str, float]:
    """The metrics in a line of metrics.jsonl."""
    return {name: value for name, value in line.items() if name not in ("step", "epoch")}
