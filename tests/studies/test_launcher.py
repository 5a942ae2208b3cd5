"""Tasks run one after another, or side by side with a share of the cores each."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from cnn_jax.common import cpu, gpu
from cnn_jax.common.errors import ConfigError, DataError, Preempted
from cnn_jax.studies import launcher, slurm
from cnn_jax.studies.task import Task
from tests.tiny import run_command


def work(run, *arguments):
    run(*arguments)


def tasks(count, function=work):
    return [Task(f"task {i}", i, count, function, (str(i),)) for i in range(1, count + 1)]


@pytest.fixture
def instead(monkeypatch):
    """Lets a task run some Python instead of a command; sys.argv[1] is its number."""
    popen = subprocess.Popen

    def replace(body):
        code = f"import os, pathlib, signal, sys, time\n{body}"

        def start(command, **options):
            return popen([sys.executable, "-c", code, command[-1]], **options)

        monkeypatch.setattr(subprocess, "Popen", start)

    return replace


@pytest.fixture
def two_cores(monkeypatch):
    if cpu.cores() < 2:
        pytest.skip("one core")
    monkeypatch.setattr(gpu, "visible", list)


@pytest.mark.usefixtures("two_cores")
def test_two_run_at_once_each_on_its_own_cores(instead, tmp_path, capfd):
    instead(f"""
folder = pathlib.Path({str(tmp_path)!r})
(folder / sys.argv[1]).touch()
while len([*folder.iterdir()]) < 2:  # until the other one runs too
    time.sleep(0.01)
print("cores", *sorted(os.sched_getaffinity(0)))
print("warning: mind this", file=sys.stderr)
""")
    launch = launcher.choose("local", 2)
    before = os.sched_getaffinity(0)
    assert {task.place: failure for task, failure in launch(tasks(2), tmp_path)} == {
        1: None,
        2: None,
    }
    shown = capfd.readouterr()
    cores = dict(re.findall(r"\[(\d)\] cores (.+)", shown.out))
    one, two = ({*map(int, text.split())} for text in cores.values())
    assert one.isdisjoint(two)
    assert len(one) == len(two) == len(before) // 2
    assert os.sched_getaffinity(0) == before
    assert sorted(shown.err.splitlines()) == ["[1] warning: mind this", "[2] warning: mind this"]


@pytest.mark.usefixtures("two_cores")
def test_a_signal_lets_all_save_and_starts_no_other(instead, tmp_path):
    instead(f"""
def stop(*_):
    (folder / f"saved {{sys.argv[1]}}").touch()
    print("error: saved", file=sys.stderr)
    sys.exit(130)

folder = pathlib.Path({str(tmp_path)!r})
signal.signal(signal.SIGINT, stop)
(folder / sys.argv[1]).touch()
if sys.argv[1] == "1":
    while not (folder / "2").exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)
""")
    with pytest.raises(Preempted, match="run the same command again to go on") as stopped:
        list(launcher.choose("local", 2)(tasks(3), tmp_path))
    assert stopped.value.exit_code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "saved 1", "saved 2"}


def fail(run, number):
    if number == "1":
        raise DataError("gone")


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.usefixtures("two_cores")
def test_a_failure_is_that_of_its_task(parallel, tmp_path):
    found = {
        task.place: failure
        for task, failure in launcher.choose("local", parallel)(tasks(2, fail), tmp_path)
    }
    assert (str(found[1]), found[1].exit_code, found[2]) == ("gone", 3, None)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"launcher": "pbs"}, "--launcher=pbs: must be local or slurm"),
        ({"parallel": 10**6}, "--parallel=1000000: must be at most"),
        ({"options": "time=3"}, "--slurm=time=3: is for --launcher=slurm only"),
    ],
)
def test_bad_flags_are_refused(flags, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        launcher.choose(**flags)


@pytest.mark.usefixtures("two_cores")
def test_gpus_are_shared_out_too(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(gpu, "visible", lambda: ["a", "b", "c", "d"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = [share.environment for share in launcher._shares(2)]
    assert found == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    monkeypatch.setattr(gpu, "visible", lambda: ["a"])
    with pytest.raises(ConfigError, match="--parallel=2: must be at most 1, the GPUs"):
        launcher._shares(2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", slurm.Options()),
        ("--partition=gpu time=90 gpus=2", slurm.Options("", "gpu", 90, gpus=2)),
        (
            "cpus=8 exclude=n1,n2 exclusive",
            slurm.Options(cpus=8, others={"exclude": "n1,n2", "exclusive": True}),
        ),
    ],
)
def test_options_of_slurm(text, expected):
    found = slurm.Options.parse(text)
    assert {**vars(found), "text": ""} == vars(expected)


@pytest.mark.skipif(bool(importlib.util.find_spec("submitit")), reason="submitit is installed")
def test_without_submitit_the_line_names_the_command_that_adds_it(tmp_path):
    done = run_command("sweep", "quickstart", "--launcher=slurm", f"--workdir={tmp_path}")
    assert done.returncode == 2
    needs = "needs submitit, which is missing; ./launch.sh setup --with=slurm adds it"
    assert done.stderr.splitlines()[-1] == f"error: --launcher=slurm: {needs}"
