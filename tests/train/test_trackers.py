"""Where a run reports besides metrics.jsonl: each record is whole, and no step is in it twice."""

import contextlib
import csv
import importlib.util
import inspect
import json
import multiprocessing
import sqlite3

import numpy as np
import pytest

from cnn_jax.common.errors import ConfigError, Preempted
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import loop, run, trackers
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.trackers import wandb_run
from tests.networks import Linear
from tests.quick import unoptimised
from tests.test_readme import PAGES, listings
from tests.tiny import run_command

OPTIONAL = [
    name
    for name, modules in trackers.NEEDED.items()
    if all(importlib.util.find_spec(module) for module in modules)
]
TIMES = ("epoch_seconds", "images_per_second")
FIELDS = {"epochs": 3, "batch_size": 32, "eval_batch_size": 48, "log_every_steps": 1, "devices": 1}
EXPERIMENT = f"""
import flax.linen as nn
from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Dense, Flatten

{inspect.getsource(Linear)}

def config():
    return Config(Linear(), DataConfig("tiny_squares"), **{FIELDS}, checkpoint_every_steps=4)
"""
# The last of the trackers, so that the others have step 7 too. W&B writes what it has later.
KILLER = """
import os, signal
from cnn_jax.train.trackers.base import Tracker
from cnn_jax.train.trackers.wandb_run import records

class tracker(Tracker):
    def __init__(self, workdir, saved):
        self.files = (workdir / "wandb").glob("offline-run-*/*.wandb")

    def metrics(self, values, step):
        if step == 7:
            for file in self.files:
                while all(record.history.step.num < 6 for record in records(file)):
                    pass
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tfds_dir):
    """What the CSV files of a run have that nothing disturbed, as {(name, step): value}."""
    workdir = tmp_path_factory.mktemp("whole")
    config = Config(Linear(), DataConfig("tiny_squares"), **FIELDS)
    loop.train(config, workdir, data_dir=str(tfds_dir), trackers=["csv"])
    return of_csv(workdir)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tfds_dir):
    """The workdir of a run that SIGKILL ended after step 7, and that was then continued."""
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "own.py").write_text(EXPERIMENT)
    (folder / "killer.py").write_text(KILLER)
    names = ",".join(["tensorboard", "csv", *OPTIONAL])
    line = [f"--workdir={folder}/run", f"--data_dir={tfds_dir}", f"--tracker={names}"]
    environment = {"WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.1", "JAX_PLATFORMS": "cpu"}
    killed = run_command(
        "train", folder / "own.py", *line[:2], f"{line[2]},{folder}/killer.py", **environment
    )
    assert killed.returncode == -9, killed.stderr
    done = run_command("train", folder / "own.py", *line, **environment)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return folder / "run"


def of_csv(workdir) -> dict[tuple[str, int], float]:
    with open(workdir / "csv" / "metrics.csv", newline="") as file:
        rows = [
            (row["name"], int(row["step"]), float(row["value"])) for row in csv.DictReader(file)
        ]
    return unique(rows)


def of_mlflow(workdir) -> dict[tuple[str, int], float]:
    with contextlib.closing(sqlite3.connect(workdir / "mlflow" / "mlflow.db")) as database:
        return unique(database.execute("select key, step, value from metrics").fetchall())


def of_wandb(workdir) -> dict[tuple[str, int], float]:
    rows = []
    for file in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_run.records(file):
            for item in record.history.item:
                name, step = item.key or item.nested_key[0], record.history.step.num
                value = json.loads(item.value_json)
                # What it keeps of a picture has two keys.
                if len(item.nested_key) < 2 and not name.startswith("_"):
                    rows.append((name, step, value))
    return unique(rows)


def unique(rows) -> dict[tuple[str, int], float]:
    found = {(name, step): value for name, step, value in rows}
    assert len(found) == len(rows)
    return found


READ = {"csv": of_csv, "mlflow": of_mlflow, "wandb": of_wandb}


@pytest.mark.parametrize("name", READ)
def test_a_killed_run_continues_its_record_and_repeats_no_step(name, whole, request):
    if name in trackers.NEEDED and name not in OPTIONAL:
        pytest.skip(f"{name} is not installed")
    found = READ[name](request.getfixturevalue("resumed"))
    assert found.keys() == whole.keys()
    assert {step for key, step in found if key == "step_loss"} == {*range(1, 16)}
    assert {step for key, step in found if key == "test_loss"} == {5, 10, 15}
    for (key, step), value in found.items():
        assert key in TIMES or value == pytest.approx(whole[key, step], rel=1e-5), (key, step)


def test_csv_has_the_checksums_of_the_checkpoints(resumed):
    with open(resumed / "csv" / "checkpoints.csv", newline="") as file:
        sums = {int(row["step"]): row["sha256"] for row in csv.DictReader(file)}
    assert sums[15] == Checkpoints(resumed).manifest(15)["sha256"]
    assert {4, 8, 10, 12, 15} <= sums.keys()


@pytest.mark.skipif("mlflow" not in OPTIONAL, reason="mlflow is not installed")
def test_mlflow_has_one_run_with_everything(resumed):
    with contextlib.closing(sqlite3.connect(resumed / "mlflow" / "mlflow.db")) as database:
        ((run, status),) = database.execute("select run_uuid, status from runs").fetchall()
        params = dict(database.execute("select key, value from params").fetchall())
        tags = dict(database.execute("select key, value from tags").fetchall())
    assert status == "FINISHED"
    assert (params["batch_size"], params["data.name"]) == ("32", "tiny_squares")
    assert tags["checkpoint_15"] == Checkpoints(resumed).manifest(15)["sha256"]
    artifacts = resumed / "mlflow" / "artifacts" / run / "artifacts"
    assert json.loads((artifacts / "config.json").read_text())["config"]["epochs"] == 3
    pictures = sorted(path.name for path in (artifacts / "confusion").iterdir())
    assert pictures == ["00000005.png", "00000010.png", "00000015.png"]


def begin(workdir, barrier):
    """Begins and ends a run in MLflow when all processes have come this far."""
    import mlflow  # noqa: F401

    barrier.wait()
    trackers.KNOWN["mlflow"](workdir, {"experiment": "mine", "config": {}}).close("finished")


@pytest.mark.skipif("mlflow" not in OPTIONAL, reason="mlflow is not installed")
def test_runs_that_begin_at_once_share_a_database(tmp_path, monkeypatch):
    """One that is new, as in a sweep with --parallel: each run would make its tables."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    monkeypatch.chdir(tmp_path)  # where MLflow puts a folder for the pictures
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    folders = [tmp_path / name for name in ("a", "b")]
    processes = [spawn.Process(target=begin, args=(folder, barrier)) for folder in folders]
    for folder, process in zip(folders, processes, strict=True):
        folder.mkdir()
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    with contextlib.closing(sqlite3.connect(tmp_path / "shared.db")) as database:
        found = database.execute("select experiment_id, status from runs").fetchall()
    assert found == [(1, "FINISHED")] * 2


@pytest.mark.skipif("mlflow" not in OPTIONAL, reason="mlflow is not installed")
def test_mlflow_goes_on_in_a_strange_folder_and_in_one_that_was_moved(tmp_path):
    """In processes of their own: each has another path to a folder that SQLAlchemy cannot name."""
    folder, moved = tmp_path / "a? [1] \u00e9 %20", tmp_path / "b? #2"
    folder.mkdir()
    spawn = multiprocessing.get_context("spawn")
    for i, place in enumerate((folder, moved)):
        process = spawn.Process(target=draw, args=(place, i))
        process.start()
        process.join(300)
        assert process.exitcode == 0
        if place == folder:
            folder.rename(moved)
    assert not folder.exists()
    pictures = moved.glob("mlflow/artifacts/*/artifacts/kernels/*.png")
    assert sorted(path.name for path in pictures) == ["00000000.png", "00000001.png"]
    with contextlib.closing(sqlite3.connect(moved / "mlflow" / "mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def draw(workdir, step):
    tracker = trackers.KNOWN["mlflow"](workdir, {"experiment": "mine", "config": {}})
    tracker.images({"kernels": np.zeros((4, 4, 3), np.uint8)}, step)
    tracker.close("finished")


@pytest.mark.skipif("wandb" not in OPTIONAL, reason="wandb is not installed")
def test_wandb_has_everything_under_one_identifier(resumed):
    first, second = sorted((resumed / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name
    steps = [
        record.history.step.num
        for file in (first, second)
        for record in wandb_run.records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    assert steps == [*range(1, 16)]
    text = "".join(map(str, wandb_run.records(second)))
    assert Checkpoints(resumed).manifest(15)["sha256"] in text
    assert "tiny_squares" in text
    pictures = resumed.glob("wandb/offline-run-*/files/media/images/confusion_*.png")
    assert sorted(int(path.name.split("_")[1]) for path in pictures) == [5, 10, 15]


# ------------------------------------------------------------------------------ one's own, errors


def config(**fields) -> Config:
    return Config(Linear(), DataConfig("tiny"), **{**FIELDS, "epochs": 1, **fields})


def own(folder, text: str) -> str:
    path = folder / "own.py"
    path.write_text(f"from cnn_jax.train.trackers.base import Tracker\n{text}")
    return str(path)


FAILS = {
    "at the start": "def __init__(self, workdir, saved):",
    "at the record": "def recorded(self):",
    "at a metric": "def metrics(self, values, step):",
    "at a picture": "def images(self, images, step):",
    "at a checkpoint": "def checkpoint(self, step, sha256):",
    "at the end": "def close(self, ending):",
}


@pytest.mark.parametrize("head", FAILS.values(), ids=FAILS)
def test_a_tracker_that_fails_costs_one_warning(tmp_path, splits, caplog, head):
    name = own(tmp_path, f"class tracker(Tracker):\n    {head}\n        raise OSError('no room')\n")
    (line,) = loop.train(config(), tmp_path / "run", splits=splits, trackers=[name, "csv"])
    (record,) = caplog.records
    said = f"warning: --tracker={name}: OSError: no room; the run goes on without it"
    assert record.getMessage() == said
    assert of_csv(tmp_path / "run")["test_loss", 5] == line["test_loss"]


def test_a_tracker_that_comes_later_gets_the_epochs_so_far(tmp_path, splits):
    loop.train(config(), tmp_path, splits=splits)
    lines = loop.train(config(epochs=2), tmp_path, splits=splits, trackers=["csv"])
    found = of_csv(tmp_path)
    assert [found["train_loss", step] for step in (5, 10)] == [e["train_loss"] for e in lines]
    with open(tmp_path / "csv" / "metrics.csv", "a") as file:
        file.write("10,half")  # as a crash leaves it
    loop.train(config(epochs=3), tmp_path, splits=splits, trackers=["csv"])
    assert {step for _, step in of_csv(tmp_path)} == {5, *range(6, 16)}


def test_the_tracker_of_the_readme(tmp_path, splits, monkeypatch):
    (text,) = [text for name, text in listings(PAGES["cnn_jax/train"]) if name == "notes.py"]
    assert len([line for line in text.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.py").write_text(text)
    (line,) = loop.train(config(), tmp_path / "run", splits=splits, trackers=["notes.py"])
    notes = (tmp_path / "run" / "notes.txt").read_text()
    assert notes == f"step 5: {line['test_accuracy']:.4f}\nfinished\n"
    assert not (tmp_path / "run" / "tensorboard").exists()  # not asked for


@pytest.mark.parametrize(
    ("error", "ending"),
    [(ValueError("broken"), "failed"), (Preempted("stopped", 143), "stopped")],
)
def test_a_tracker_hears_how_the_run_ends(tmp_path, splits, monkeypatch, error, ending):
    name = own(
        tmp_path,
        "class tracker(Tracker):\n    def __init__(self, workdir, saved):\n"
        "        self.file = workdir / 'ending.txt'\n"
        "    def close(self, ending):\n        self.file.write_text(ending)\n",
    )

    def fail(*_):
        raise error

    monkeypatch.setattr(run.Run, "epochs", fail)
    with pytest.raises(type(error)):
        loop.train(config(), tmp_path / "run", splits=splits, trackers=[name])
    assert (tmp_path / "run" / "ending.txt").read_text() == ending


def test_a_missing_package_is_named_with_the_command_that_adds_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        adds = f"./launch.sh setup --with={name} adds it"
        said = f"^--tracker={name}: needs {name}, which is missing; {adds}$"
        with pytest.raises(ConfigError, match=said):
            trackers.find([name])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "own.py fails: AttributeError: .* has no attribute 'tracker'"),
        ("1 / 0\n", "own.py fails: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_without_a_tracker_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=rf"^--tracker=.*/own.py: {said}$"):
        trackers.find([own(tmp_path, text)])
