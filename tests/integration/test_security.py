"""A workdir from a stranger: nothing in it is run, and nothing that it names outside is read."""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest

from cnn_jax import main
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP
from cnn_jax.train import loop
from tests.quick import unoptimised


class Evil:
    """Makes the folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture(scope="module")
def trained(splits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = Config(MLP(), DataConfig("tiny_squares"), epochs=1, eval_batch_size=48, devices=1)
    with unoptimised():
        loop.train(config, workdir, "mine", splits=splits)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def run(command, workdir, data_dir):
    more = {
        "evaluate": [f"--data_dir={data_dir}"],
        "predict": [f"--images={workdir}/**"],
        "report": [f"--data_dir={data_dir}"],
        "verify": [],
        "train": ["--experiment=quickstart"],
    }
    return main.main([command, f"--workdir={workdir}", *more[command]])


def change(workdir, part, fields):
    path = workdir / "config.json"
    saved = json.loads(path.read_text())
    (saved["config"][part] if part else saved["config"]).update(fields)
    path.write_text(json.dumps(saved))


# ------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("command", ["evaluate", "predict", "report", "verify", "train"])
@pytest.mark.parametrize("kind", ["pickle", "object array", "archive"])
def test_a_workdir_full_of_pickles_runs_no_code(workdir, tfds_dir, tmp_path, command, kind):
    trace = tmp_path / "ran"
    evil = np.array([Evil(trace)], dtype=object)
    paths = [path for path in workdir.rglob("*") if path.is_file() and path.name != "config.json"]
    step = next((workdir / "checkpoints").iterdir())
    # Names that other formats of checkpoints use.
    paths += [step / "checkpoint", step / "variables" / "aggregate", workdir / "state.pkl"]
    for path in paths:
        with open(path, "wb") as file:
            if kind == "pickle":
                pickle.dump(Evil(trace), file)
            elif kind == "object array":
                np.save(file, evil, allow_pickle=True)
            else:
                np.savez(file, params=evil)
    assert run(command, workdir, tfds_dir) in (2, 4)
    assert not trace.exists()
    with open(workdir / "state.pkl", "rb") as file:
        loaded = pickle.load(file) if kind == "pickle" else np.load(file, allow_pickle=True)
        _ = loaded["params"] if kind == "archive" else loaded
    assert trace.exists()  # it would have run


# --------------------------------------------------------------------------------- config.json


HOSTILE = [
    ("model", {"class": "os.system"}),
    ("model", {"class": "__import__('os').mkdir('ran')"}),
    ("model", {"class": "../../evil"}),
    ("model", {"class": "__class__"}),
    ("model", {"class": ["MLP"]}),
    ("model", {"class": None}),
    ("model", {"parent": "os"}),
    ("model", {"num_classes": "__import__('os').mkdir('ran')"}),
    ("model", {"num_classes": -1}),
    ("model", {"__reduce__": ["os.mkdir", "ran"]}),
    ("data", {"name": "../outside/tiny_squares"}),
    ("data", {"name": "/"}),
    ("data", {"name": "huggingface:mnist"}),
    ("data", {"name": {"dataset": "mnist"}}),
    ("data", {"test_split": "../../outside/tiny_squares"}),
    ("data", {"test_split": "__import__('os').mkdir('ran')"}),
    ("data", {"mean": ["__import__('os').mkdir('ran')"]}),
    ("", {"compute_dtype": "__class__"}),
    ("", {"eval_batch_size": "48"}),
    ("", {"eval_batch_size": 0}),
    ("", {"eval_batch_size": -48}),
]


@pytest.mark.parametrize(("part", "fields"), HOSTILE, ids=[json.dumps(f) for _, f in HOSTILE])
def test_a_hostile_configuration_is_refused_in_one_line(
    workdir, tfds_dir, tmp_path, part, fields, monkeypatch, caplog
):
    outside = shutil.copytree(tfds_dir / "tiny_squares", tmp_path / "outside/tiny_squares")
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "tiny_squares").symlink_to(tfds_dir / "tiny_squares")
    monkeypatch.chdir(tmp_path)
    change(workdir, part, fields)
    opened = []
    watch = opened.append
    sys.addaudithook(lambda event, arguments: watch and event == "open" and watch(arguments[0]))
    assert run("evaluate", workdir, data_dir) in (2, 3, 4)
    watch = None
    (record,) = [record for record in caplog.records if record.getMessage().startswith("error: ")]
    assert "\n" not in record.getMessage()
    assert not [path for path in opened if str(path).startswith(str(outside))]
    assert not (tmp_path / "ran").exists()
    assert not (workdir / "evaluation.json").exists()
    assert opened  # the hook was there


def test_without_changes_the_same_command_works(workdir, tfds_dir):
    assert run("evaluate", workdir, tfds_dir) == 0


def test_the_name_of_the_experiment_is_a_word_among_others(workdir, tfds_dir, tmp_path):
    """It is only shown: it must not be looked up, here or outside."""
    path = workdir / "config.json"
    saved = json.loads(path.read_text())
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    path.write_text(json.dumps(saved | {"experiment": str(tmp_path / "evil.py")}))
    for command in ("evaluate", "report"):
        assert run(command, workdir, tfds_dir) == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("step", ["../1", "..", "/", "1/../../x"])
def test_a_checkpoint_cannot_be_named_by_a_path(workdir, tfds_dir, step, caplog):
    flags = [f"--workdir={workdir}", f"--data_dir={tfds_dir}", f"--checkpoint={step}"]
    assert main.main(["evaluate", *flags]) == 4
    assert f"must be latest, best or a step in {workdir}/checkpoints: 5" in caplog.text
