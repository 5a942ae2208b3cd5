"""A workdir that version 0.1.0 wrote on jax 0.10.1: all that reads a run reads it."""

import json
import shutil
from pathlib import Path

import pytest

from cnn_jax import main
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture
def run(tmp_path) -> Path:
    return shutil.copytree(FIXTURES / "run_of_jax_0_10_1", tmp_path / "run")


def command(*arguments) -> int:
    return main.main([str(argument) for argument in arguments])


def test_it_evaluates_to_what_was_recorded(run):
    recorded = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").unlink()
    assert command("evaluate", f"--workdir={run}") == 0
    found = json.loads((run / "evaluation.json").read_text())
    # Another processor or version changes the last bits of the loss, and no class.
    assert found.pop("loss") == pytest.approx(recorded.pop("loss"), abs=1e-5)
    assert {name: found[name] for name in recorded} == recorded  # newer versions measure more


def test_it_goes_on_training(run):
    before = workdirs.metrics(run)
    code = command(
        "train", f"--experiment={FIXTURES / 'lenet.py'}", f"--workdir={run}", "--set=epochs=3"
    )
    assert code == 0
    after = workdirs.metrics(run)
    assert after[:2] == before
    assert after[2]["epoch"] == 3
    assert after[2]["train_loss"] < after[1]["train_loss"]
    assert Checkpoints(run).newest().step == 3 * 56


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("export", "export/model.zip"),
        ("report", "report/index.html"),
        ("convert --output={}", "config.json"),
        ("verify", ""),
        ("summary", ""),
    ],
)
def test_other_commands_read_it(run, tmp_path, words, made):
    name, *flags = words.format(tmp_path / "converted").split()
    assert command(name, f"--workdir={run}", *flags) == 0
    folder = tmp_path / "converted" if name == "convert" else run
    assert (folder / made).exists()
