"""A run as a process of its own, and what can happen to it from outside."""

import os
import resource
import signal
import socket

import pytest

from cnn_jax.train.checkpoint import Checkpoints
from tests.faults import runs
from tests.faults.runs import differences, finish, has_saved, signal_when, start, wait_until


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(runs.EXPERIMENT)
    return path


@pytest.fixture
def arguments(experiment, tfds_dir):
    def train(workdir, *more):
        return (
            "train",
            f"--experiment={experiment}",
            f"--workdir={workdir}",
            f"--data_dir={tfds_dir}",
            *more,
        )

    return train


@pytest.fixture(scope="module")
def undisturbed(experiment, tfds_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, _, errors = finish(
        start(
            "train", f"--experiment={experiment}", f"--workdir={workdir}", f"--data_dir={tfds_dir}"
        )
    )
    assert code == 0, errors
    return workdir


def only_line(errors):
    """The one line of ours; XLA may complain about programs from the cache."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    arguments, undisturbed, tmp_path, number, code
):
    process = start(*arguments(tmp_path))
    # Twice: a second one changes nothing. Signals of two kinds sent at once come in either order.
    signal_when(has_saved(tmp_path, 3), process, number, number)
    ended, _, errors = finish(process)
    assert ended == code
    assert "and saved; run the same command again" in only_line(errors)
    assert Checkpoints(tmp_path).newest().step < 96
    code, output, errors = finish(start(*arguments(tmp_path)))
    assert (code, "resumed from step" in output) == (0, True), errors
    assert differences(tmp_path, undisturbed) == []


def test_a_signal_before_the_first_step_ends_the_run(arguments, tmp_path):
    process = start(*arguments(tmp_path))
    signal_when(runs.has_started(tmp_path), process, signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 143
    assert Checkpoints(tmp_path).steps() == []
    assert "stopped by a signal" in only_line(errors)


def test_a_run_that_does_not_end_within_its_grace_is_ended(arguments, tmp_path):
    process = start(*arguments(tmp_path, "--set=grace_seconds=0.0001"))
    signal_when(has_saved(tmp_path, 3), process, signal.SIGTERM)
    code, _, errors = finish(process)
    assert code == 143
    assert "saving took longer than grace_seconds=0.0001: ended without saving" in only_line(errors)
    assert Checkpoints(tmp_path).newest().step >= 3


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(arguments, undisturbed, tmp_path):
    process = start(*arguments(tmp_path))
    wait_until(runs.has_started(tmp_path), process)
    process.send_signal(signal.SIGSTOP)
    code, _, errors = finish(start(*arguments(tmp_path)))
    process.kill()
    finish(process)
    assert code == 4
    assert f"in use by process {process.pid} on {socket.gethostname()}; wait" in only_line(errors)
    code, _, errors = finish(start(*arguments(tmp_path)))
    assert code == 0, errors
    assert differences(tmp_path, undisturbed) == []


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(arguments, tmp_path):
    """As if the disk were full: no file may grow beyond 500 bytes."""
    process = start(*arguments(tmp_path))
    wait_until(has_saved(tmp_path, 5), process)
    process.send_signal(signal.SIGSTOP)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500, 500))
    process.send_signal(signal.SIGCONT)
    code, _, errors = finish(process)
    assert code == 4, errors
    assert "written" in only_line(errors)
    assert Checkpoints(tmp_path).newest().step >= 5


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(
    arguments, undisturbed, tmp_path
):
    process = start(*arguments(tmp_path))
    wait_until(has_saved(tmp_path, 3), process)
    (tmp_path / "checkpoints/80").write_text("in the way")
    code, _, errors = finish(process)
    assert code == 0, errors
    assert "warning: " in errors
    assert "checkpoints/80: could not be written: " in errors
    assert differences(tmp_path, undisturbed) == []


def test_a_last_checkpoint_that_can_never_be_written_is_an_error(arguments, undisturbed, tmp_path):
    process = start(*arguments(tmp_path))
    wait_until(has_saved(tmp_path, 3), process)
    (tmp_path / "checkpoints/96").write_text("in the way")
    code, _, errors = finish(process)
    assert code == 4, errors
    assert "checkpoints/96: could not be written: " in only_line(errors)
    code, _, errors = finish(start(*arguments(tmp_path)))
    assert code == 0, errors
    assert differences(tmp_path, undisturbed) == []


def test_a_strange_workdir_named_from_below_trains_evaluates_and_goes_on(
    arguments, undisturbed, tmp_path
):
    (tmp_path / "below").mkdir()
    workdir = "../[2024] a\\b*/x"
    for _ in range(2):
        code, output, errors = finish(start(*arguments(workdir), cwd=tmp_path / "below"))
        assert code == 0, errors
    assert "resumed from step 96" in output
    assert differences(tmp_path / workdir[3:], undisturbed) == []
    for command in ("evaluate", "verify"):
        flags = [flag for flag in arguments(workdir)[1:] if command == "evaluate" or "work" in flag]
        code, _, errors = finish(start(command, *flags, cwd=tmp_path / "below"))
        assert code == 0, errors


def test_a_workdir_deleted_during_the_run_ends_it(arguments, tmp_path):
    workdir = tmp_path / "run"
    process = start(*arguments(workdir))
    wait_until(has_saved(workdir, 3), process)
    process.send_signal(signal.SIGSTOP)
    os.rename(workdir, tmp_path / "elsewhere")
    process.send_signal(signal.SIGCONT)
    code, _, errors = finish(process)
    assert code == 4, errors
    assert str(workdir) in only_line(errors)
    assert Checkpoints(tmp_path / "elsewhere").newest().step >= 3
