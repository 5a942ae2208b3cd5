"""The command line: every flag, and what is said of every mistake in it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cnn_jax import main
from cnn_jax.cli import commands
from cnn_jax.cli.flags import Command
from cnn_jax.common.errors import CnnJaxError
from cnn_jax.config import experiment
from tests.quick import unoptimised
from tests.tiny import REPOSITORY, run_command

OWN = """
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP
def config(): return Config(MLP(), DataConfig('tiny_squares'), epochs=1, eval_batch_size=20)
"""


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: an experiment of the user's own, and things that are in the way."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    return tmp_path


def errors(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]


# ------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_the_overview(argv, capsys):
    assert main.main(argv) == 0
    output = capsys.readouterr().out
    for name, command in commands.COMMANDS.items():
        assert f"  {name} " in output
        assert command.title in output
    assert "COMMAND --help" in output


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_help_of_a_command(name, capsys):
    for flag in ("--help", "-h"):
        assert main.main([name, flag]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"\./launch\.sh {name}( [A-Z]+)*( \.\.\.)?: .+", lines[0])
        assert lines[0].endswith(f": {commands.COMMANDS[name].title}")
        shown = [line.split()[0] for line in lines[2:]]
        assert shown == [f"--{flag}" for flag in commands.COMMANDS[name].flags]
        assert all(len(line.split()) > 2 for line in lines[2:])  # each is explained


def test_the_public_commands_and_flags():
    """What outsiders rely on."""
    expected = {
        "list": set(),
        "train": {"experiment", "set", "workdir", "data_dir", "download", "dry_run"},
        "evaluate": {"workdir", "checkpoint", "split", "dataset", "data_dir"},
        "predict": {"workdir", "images", "checkpoint", "top_k"},
        "summary": {"experiment", "workdir", "set", "input_size"},
        "convert": {"workdir", "output", "checkpoint"},
        "class_map": {"workdir", "output", "checkpoint", "canvas", "rounds", "data_dir"},
        "explain": {"topic", "size", "kernel", "stride", "padding", "output"},
        "export": {"workdir", "output", "checkpoint"},
    }
    for name, flags in expected.items():
        assert flags | {"debug"} <= set(commands.COMMANDS[name].flags)


def test_the_help_shows_defaults(capsys):
    main.main(["evaluate", "--help"])
    output = capsys.readouterr().out
    assert re.search(r"--checkpoint .*\(default latest\)", output)
    assert re.search(r"--split .*\(default test\)", output)


def test_list(capsys):
    assert main.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == experiment.names()
    for line, name in zip(lines, experiment.names(), strict=True):
        assert line.split(maxsplit=1)[1] == experiment.title(name)


# ------------------------------------------------------------------- flags and their mistakes

MISTAKES = [  # command line, exit code, what is said
    ("trian", 2, "trian: no such command; nearest: train"),
    ("xyzzy", 2, "xyzzy: no such command; there are: list, train, lr_finder, "),
    ("--experiment=quickstart", 2, "--experiment=quickstart: no such command; there are: "),
    ("''", 2, ": no such command; there are: "),
    ("train", 2, "--experiment: train needs it (a name under experiments/, "),
    ("evaluate", 2, "--workdir: evaluate needs it"),
    ("predict --workdir=x", 2, "--images: predict needs it"),
    ("summary", 2, "--experiment: summary needs it"),
    ("verify", 2, "--workdir: verify needs it"),
    ("lr_finder", 2, "--experiment: lr_finder needs it"),
    ("lr_finder quickstart --steps=3", 2, "--steps=3: must be at least 20"),
    (
        "train quickstart --workdir=x --init_from=nowhere:3",
        4,
        "--init_from=nowhere:3: no such folder; give the workdir of a run",
    ),
    ("convert --workdir=x", 2, "--output: convert needs it"),
    (
        "summary --workdir=x --set epochs=3",
        2,
        "--set epochs=3: must not be given with --workdir",
    ),
    ("train --experiment", 2, "Missing value for flag --experiment"),
    ("train --experiment=", 2, "--experiment=: is empty"),
    ("train --experiment ''", 2, "--experiment=: is empty"),
    ("train --experiment=own.py --workdir=", 2, "--workdir=: is empty"),
    ("train --experiment=own.py --data_dir=", 2, "--data_dir=: is empty"),
    ("train --experiment=own.py --set=", 2, "--set=: is empty"),
    ("evaluate --workdir=", 2, "--workdir=: is empty"),
    ("predict --workdir=x --images=", 2, "--images=: is empty"),
    ("train --expriment=own.py", 2, "--expriment: train has no such flag; nearest: --experiment"),
    ("train --experiment=own.py --work-dir=x", 2, "--work-dir: train has no such flag; nearest: "),
    (
        "train --experiment=own.py --batch_size=3",
        2,
        "--batch_size: is a field of the configuration; write --set batch_size=VALUE",
    ),
    (
        "train --experiment=own.py --seeds=2 --workdir=gs://a/b",
        2,
        "gs://a/b: must be a folder of this machine",
    ),
    ("list --xyzzy", 2, "--xyzzy: list has no such flag; it has: --debug"),
    ("evaluate --workdir=x --set epochs=3", 2, "--set: evaluate has no such flag; "),
    (
        "list own.py",
        2,
        "own.py: list cannot use this word; it takes no word and flags, which are written --name=",
    ),
    ("train --experiment=own.py epochs=3", 2, "epochs=3: train cannot use this word"),
    ("train --experiment=own.py --set epochs 3", 2, "3: train cannot use this word"),
    ("predict --workdir=x --images a.png b.png", 4, "workdir=x: no such folder"),
    ("train --experiment=own.py --dry_run=maybe", 2, "--dry_run=maybe: must be true or false"),
    ("train --experiment=own.py --nodry_run=3", 2, "--nodry_run=3"),
    ("train --experiment=own.py --processes=x", 2, "--processes=x: must be a whole number"),
    ("predict --workdir=x --images=y --top_k=1.5", 2, "--top_k=1.5: must be a whole number"),
    ("train --experiment=own.py --processes=2", 2, "--coordinator=: must be host:port"),
    ("train --experiment=own.py --process=1", 2, "--process=1: must be from 0 to 0"),
    # The experiment and its fields
    (
        "train --experiment=lenet",
        2,
        "--experiment=lenet: no such experiment; nearest: cifar10/lenet, ",
    ),
    ("train --experiment=missing.py", 2, "--experiment=missing.py: no such file"),
    ("train --experiment=file", 2, "--experiment=file: no such experiment"),
    ("train --experiment=own.py --set epochs", 2, "--set epochs: write field=value"),
    (
        "train --experiment=own.py --set batchsize=3",
        2,
        "--set batchsize=3: the configuration has no ",
    ),
    (
        "train --experiment=own.py --set epochs=ten",
        2,
        "--set epochs=ten: 'ten' is not a whole number",
    ),
    (
        "train --experiment=own.py --set learning_rate=0",
        2,
        "learning_rate=0.0: must be greater than 0",
    ),
    ("train --experiment=own.py --set learning_rate=-1", 2, "learning_rate=-1.0: must be greater "),
    ("train --experiment=own.py --set batch_size=0", 2, "batch_size=0: must be at least 1"),
    ("train --experiment=own.py --set devices=0", 2, "devices=0: must be at least 1, or none"),
    ("train --experiment=own.py --set devices=5", 2, "devices=5: only 4 visible (cpu)"),
    (
        "train --experiment=own.py --set batch_size=30",
        2,
        "batch_size=30: must be divisible by the 4",
    ),
    (
        "sweep --experiment=own.py --tracker=neptune",
        2,
        "--tracker=neptune: must be tensorboard, csv",
    ),
    ("sweep --experiment=own.py --tracker=", 2, "--tracker=: is empty; "),
    ("train --experiment=own.py --set model.num_classes=0", 2, "model.num_classes=0: must be at "),
    (
        "train --experiment=cifar10/speedrun --set model.axis_name=data",
        2,
        "model.axis_name=data: must be none; ",
    ),
    (
        "sweep --experiment=cifar10/speedrun --set model.axis_name=a,b",
        2,
        "model.axis_name=a: must ",
    ),
    ("train --experiment=~nosuchuser/x.py", 2, "~nosuchuser/x.py: the home folder ~nosuchuser is"),
    ("train --experiment=own.py --workdir=~nosuchuser", 2, "~nosuchuser: the home folder"),
    ("evaluate --workdir=~nosuchuser/x", 2, "~nosuchuser/x: the home folder ~nosuchuser is not "),
    ("evaluate --workdir=x --output=~nosuchuser/x", 2, "~nosuchuser/x: the home folder"),
    ("train --experiment=own.py --data_dir=~nosuchuser/x", 3, "data.name=tiny_squares: "),
    ("evaluate --workdir=x --output=file", 2, "--output=file: file is a file; name a folder"),
    ("summary --experiment=own.py --set epochs=0", 2, "epochs=0: must be from 1 to "),
    (
        "summary --experiment=own.py --input_size=2X2",
        2,
        "--input_size=2X2: write SIZE, HxW or HxWxC",
    ),
    # Data
    ("train --experiment=own.py --data_dir=missing", 3, "data.name=tiny_squares: "),
    ("train --experiment=own.py --data_dir=file", 3, "data.name=tiny_squares: "),
    ("train --experiment=own.py", 3, "data.name=tiny_squares: "),
    (
        "train --experiment=fashion_mnist/mlp",
        3,
        "data.name=fashion_mnist: not prepared in data_dir=",
    ),
    # Workdirs. Tests may run as root, whom no permission stops: nobody can write to /proc.
    (
        "train --experiment=own.py --workdir=file",
        4,
        "workdir={}/file: this path or a part of it is",
    ),
    (
        "train --experiment=own.py --workdir=file/x",
        4,
        "workdir={}/file/x: this path or a part of it is",
    ),
    ("train --experiment=own.py --workdir=/proc/x", 4, "workdir=/proc/x: cannot be made: "),
    ("train --experiment=own.py --workdir=/proc", 4, "workdir=/proc: cannot be written: "),
    ("evaluate --workdir=missing", 4, "workdir=missing: no such folder; name the folder of a run"),
    (
        "evaluate --workdir=empty",
        4,
        "workdir=empty: holds no config.json; name the folder of a run",
    ),
    ("evaluate --workdir=file", 4, "file/config.json: "),
    ("predict --workdir=empty --images=x", 4, "workdir=empty: holds no config.json"),
    ("verify --workdir=missing", 4, "workdir=missing: no such folder"),
    ("evaluate --workdir=empty --experiment=xyzzy", 2, "--experiment=xyzzy: no such experiment"),
]


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_in_one_line(line, code, said, folder, caplog, capsys):
    assert main.main(shlex.split(line)) == code
    (message,) = errors(caplog)
    assert message.startswith("error: " + said.format(folder))
    assert "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "runs").exists() or code != 2  # refused before anything is made


@pytest.mark.parametrize(
    "line",
    [
        "summary --experiment own.py --set epochs=3 --input_size 28x28x1",
        "summary -experiment own.py -set epochs=3 -input_size=28x28x1",
        "summary --input_size=28x28x1 --set=epochs=3 --experiment=own.py --nodebug",
        "summary --set epochs=3 --set model.num_classes=10 --experiment=own.py --input_size=28x28x1",
        "summary --experiment=own.py --input_size=28x28x1 --debug=false",
    ],
)
def test_how_flags_may_be_written(line, folder, capsys):
    assert main.main(shlex.split(line)) == 0
    assert capsys.readouterr().out.startswith("MLP on 28x28x1\n")


def test_the_home_folder(folder, monkeypatch, caplog):
    """The shell leaves the ~ of --workdir=~/run as it is."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "empty")
    assert main.main(["evaluate", "--workdir=~/empty"]) == 4
    assert errors(caplog)[0].startswith(f"error: workdir={folder}/empty: holds no config.json")
    assert main.main(["train", "--experiment=~/own.py", "--workdir=~/file"]) == 4
    start = f"error: workdir={folder}/file: this path or a part of it is a file"
    assert errors(caplog)[1].startswith(start)
    assert not Path("~").exists()


# --------------------------------------------------------------------------- errors of others


def fail_with(monkeypatch, error):
    def run(values):
        raise error

    command = Command("list", run, {"debug": False})
    monkeypatch.setitem(commands.COMMANDS, "list", command)


@pytest.mark.parametrize("kind", CnnJaxError.__subclasses__())
def test_exit_codes(kind, monkeypatch, caplog):
    error = (
        kind("first\n  second", 143) if kind.__name__ == "Preempted" else kind("first\n  second")
    )
    expected = {
        "ConfigError": 2,
        "DataError": 3,
        "WorkdirError": 4,
        "NotFiniteError": 5,
        "Preempted": 143,
    }
    fail_with(monkeypatch, error)
    for flags in ([], ["--debug"]):
        caplog.clear()
        assert main.main(["list", *flags]) == expected[kind.__name__]
        assert errors(caplog) == ["error: first second"]
        assert bool(caplog.records[-1].exc_info) == bool(flags)


def test_an_error_that_nobody_foresaw(monkeypatch, caplog):
    fail_with(monkeypatch, KeyError("x"))
    assert main.main(["list"]) == 1
    assert main.main(["list", "--debug"]) == 1
    assert errors(caplog) == ["error: KeyError: 'x' (--debug shows where)", "error: KeyError: 'x'"]
    assert [bool(r.exc_info) for r in caplog.records] == [False, True]


def test_ctrl_c(monkeypatch, caplog):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main.main(["list"]) == 130
    assert errors(caplog) == ["error: interrupted"]


# -------------------------------------------------------------------------------- the commands


def test_train_says_what_comes_next(folder, tfds_dir, capsys):
    flags = ["--experiment=own.py", f"--data_dir={tfds_dir}"]
    assert main.main(["train", *flags, "--set", "devices=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"test accuracy 0\.\d{4} after epoch 1, in runs/own", lines[-2])
    assert lines[-1] == "next: ./launch.sh evaluate runs/own"
    assert (folder / "runs" / "own" / "config.json").is_file()
    # ... again, nothing is left to do
    assert main.main(["train", *flags, "--set", "devices=1"]) == 0
    assert "nothing left to do: 5 steps are done" in capsys.readouterr().out


def test_a_dry_run_leaves_nothing(folder, tfds_dir, caplog, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # own.py's __pycache__ is Python's own
    before = sorted(folder.rglob("*"))
    flags = ["--experiment=own.py", f"--data_dir={tfds_dir}", "--dry_run"]
    assert main.main(["train", *flags]) == 0
    assert sorted(folder.rglob("*")) == before
    assert "dry run: two batches trained, evaluated, saved and restored" in caplog.text


def test_another_experiment_on_a_workdir(folder, tfds_dir, caplog):
    flags = ["--experiment=own.py", f"--data_dir={tfds_dir}", "--workdir=run"]
    assert main.main(["train", *flags]) == 0
    assert main.main(["train", *flags, "--set", "learning_rate=0.1", "--set", "seed=3"]) == 2
    assert errors(caplog)[0] == (
        f"error: workdir={folder}/run: holds another run; learning_rate: 0.001 -> 0.1; "
        "seed: 0 -> 3 (choose another --workdir)"
    )


# ------------------------------------------------------------------------------ real processes


def test_an_error_is_the_only_line():
    done = run_command("train", "--experiment=quickstart", "--set", "learning_rate=0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: learning_rate=0.0: must be greater than 0 and finite\n"


def test_debug_shows_the_traceback():
    done = run_command("train", "--experiment=xyzzy", "--debug")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: --experiment=xyzzy: no such experiment")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1].startswith("cnn_jax.common.errors.ConfigError: ")


@pytest.mark.parametrize("buffered", ["1", ""])
@pytest.mark.parametrize(
    "command", ["list", "summary --experiment=quickstart --input_size=28x28x1"]
)
def test_a_reader_that_leaves_early(command, buffered):
    """As in `./launch.sh list | head -1`: no traceback; with nothing unread, no failure either."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cnn_jax.main", *command.split()],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": buffered},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
