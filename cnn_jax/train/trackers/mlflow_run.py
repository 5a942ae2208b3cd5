"""A run in MLflow: at MLFLOW_TRACKING_URI, or else in a database in the workdir."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cnn_jax.common.files import library_path
from cnn_jax.train.trackers.base import Ending, Tracker
from cnn_jax.train.workdir import write_text

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# Of MLflow's parameters.
MOST_IN_A_CALL, LONGEST_VALUE = 100, 6000


class MlflowRun(Tracker):
    """A run of the MLflow experiment that is called as the experiment of the workdir."""

    def __init__(self, workdir: Path, saved: dict):
        """`workdir`/mlflow need not exist; `saved` is what config.json has."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would ask the network
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of its database's tables
        folder = library_path(workdir) / "mlflow"
        folder.mkdir(exist_ok=True)
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        self._metric = Metric
        identity = folder / "run_id.txt"
        # SQLAlchemy misreads some paths, so it gets one of this process. The pictures have the real
        # path, because MLflow keeps it.
        database, artifacts = folder / "mlflow.db", workdir.resolve() / "mlflow" / "artifacts"
        address = asked or f"sqlite:///{database}"
        with _alone_at(address):
            self._client = MlflowClient(address)
            if identity.exists():
                self._id = identity.read_text()
                self._client.update_run(self._id, "RUNNING")
            else:
                place = None if asked else artifacts.as_uri()
                experiment = self._experiment(saved["experiment"] or workdir.name, place)
                name = "/".join(workdir.parts[-2:])
                self._id = self._client.create_run(experiment, run_name=name).info.run_id
                write_text(identity, self._id)
        if not asked:
            _say_where(database, self._id, artifacts.as_uri())
        known = self._client.get_run(self._id).data.params  # which MLflow lets nobody change
        params = [
            Param(name, str(value)[:LONGEST_VALUE])
            for name, value in _flat(saved["config"])
            if name not in known
        ]
        for first in range(0, len(params), MOST_IN_A_CALL):
            self._client.log_batch(self._id, params=params[first : first + MOST_IN_A_CALL])
        self._client.log_dict(self._id, saved, "config.json")

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The identifier of MLflow's experiment `name`, which is made if it is missing."""
        from mlflow.exceptions import MlflowException

        if not (found := self._client.get_experiment_by_name(name)):
            try:
                return self._client.create_experiment(name, artifacts)
            except MlflowException:  # another run may have made it since
                if not (found := self._client.get_experiment_by_name(name)):
                    raise
        return found.experiment_id

    def recorded(self) -> dict[str, int]:
        return {
            name: max(entry.step for entry in self._client.get_metric_history(self._id, name))
            for name in self._client.get_run(self._id).data.metrics
        }

    def metrics(self, values: dict[str, float], step: int) -> None:
        now = round(1000 * time.time())
        entries = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=entries)

    def images(self, images: dict[str, np.ndarray], step: int) -> None:
        for name, image in images.items():  # the same step again replaces the file
            self._client.log_image(self._id, image, f"{name}/{step:08}.png")

    def checkpoint(self, step: int, sha256: str) -> None:
        self._client.set_tag(self._id, f"checkpoint_{step}", sha256)

    def close(self, ending: Ending) -> None:
        self._client.set_terminated(self._id, STATUS[ending])


def _say_where(database: Path, run: str, artifacts: str) -> None:
    """Writes the address of the pictures, which is another one after the workdir was moved."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "update runs set artifact_uri = ? where run_uuid = ?",
            (f"{artifacts}/{run}/artifacts", run),
        )
        connection.execute(
            "update experiments set artifact_location = ? where experiment_id in "
            "(select experiment_id from runs where run_uuid = ?)",
            (artifacts, run),
        )


@contextlib.contextmanager
def _alone_at(address: str) -> Iterator[None]:
    """One process at a time: MLflow makes the tables of a database without a lock."""
    path = address.partition("sqlite:///")[2].partition("?")[0]
    with contextlib.ExitStack() as stack:
        if path:
            file = stack.enter_context(open(f"{path}.lock", "a"))
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of every field, those inside of others as data.name."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
