"""The speedrun beside the original in PyTorch; a script that prints the same table stands for it."""

import pytest

from cnn_jax import main
from cnn_jax.common.errors import ConfigError
from cnn_jax.studies.benchmark import speedrun

PRINTS = """
import sys, time
def row(*cells):
    print("".join(f"|  {cell:>12}  " for cell in cells) + "|")
    print("-" * 90)
row("run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds")
for run in ["warmup", *range(RUNS)]:
    row(run, 1, 0.5, 0.4, "", 1.5)
    found = (0.25, 99) if run == "warmup" else (0.94 + 0.01 * run, 2.5)
    row("", "eval", 0.5, 0.4, *found)
THEN
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script of so many runs that ends in some way; all that it needs is there."""
    monkeypatch.setattr(speedrun, "_CHECK", "")

    def write(runs, then):
        path = tmp_path / "airbench94_muon.py"
        path.write_text(PRINTS.replace("RUNS", str(runs)).replace("THEN", then))
        return path

    return write


def test_it_is_ended_after_the_runs_that_were_asked_for(script, capsys):
    found = speedrun.original(script(3, "time.sleep(1000)"), 2)
    assert found == [
        {"test_accuracy": 0.94, "seconds": 2.5},
        {"test_accuracy": pytest.approx(0.95), "seconds": 2.5},
    ]
    assert capsys.readouterr().out.splitlines()[0] == "original: 0.9400 in 2.50 s"


def test_one_that_ends_early_says_why(script):
    path = script(1, 'sys.exit("CUDA out of memory")')
    with pytest.raises(ConfigError, match=r"muon.py: ended after 1 runs: CUDA out of memory"):
        speedrun.original(path, 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speedrun", "--peer={}/no.py"], "no.py: no such file"),
        (["--peer={}/no.py"], "no.py: needs --speedrun"),
        (["--speedrun", "--peer={}/is.py"], "is.py: needs torch and torchvision in "),
    ],
)
def test_what_is_refused_in_one_line(flags, said, tmp_path, caplog, monkeypatch):
    blocked = "import sys; sys.modules['torch'] = None"
    monkeypatch.setattr(speedrun, "_CHECK", blocked + speedrun._CHECK)
    (tmp_path / "is.py").touch()
    assert main.main(["benchmark", *(flag.format(tmp_path) for flag in flags)]) == 2
    assert said in caplog.messages[-1]
