"""Most of it in processes of their own, which import nothing but signals.py, because they end."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from cnn_jax.cli.commands import COMMANDS
from cnn_jax.train.signals import StopSignals
from tests.tiny import REPOSITORY, run_command

STOPS = [
    (signal.SIGTERM, 143),
    (signal.SIGUSR1, 143),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 129),
]

# A run, from which the test reads what it waits for, and which ends when its input does.
HEAD = """
import os, signal, sys, threading
from cnn_jax.train.signals import StopSignals

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

def noted(signals):
    while not signals.exit_code:
        threading.Event().wait(0.001)
"""


def run(body: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + body],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ends(process: subprocess.Popen, expected: int) -> str:
    """What the process said on standard error."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == expected, errors
    return errors


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_before_there_is_something_to_save_a_signal_ends_the_process_at_once(number, code):
    process = run("with StopSignals(): print('ready', flush=True); sys.stdin.read()")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert ends(process, code) == (
        "error: stopped by a signal before training; run the same command again\n"
    )


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_run_that_may_finish_is_told_and_the_first_signal_decides(number, code):
    process = run(
        f"""
with StopSignals() as signals:
    signals.let_finish(600)
    os.kill(os.getpid(), {int(number)})
    noted(signals)
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), other)
    print("saved", flush=True)
    sys.exit(signals.exit_code)
"""
    )
    assert process.stdout.readline() == "saved\n"
    assert ends(process, code) == ""


def test_when_the_grace_is_over_the_process_ends_whatever_it_does():
    """It waits for an input that does not come, so nothing else could end it."""
    process = run(
        """
with StopSignals() as signals:
    signals.let_finish(0.05)
    os.kill(os.getpid(), signal.SIGUSR1)
    sys.stdin.read()
"""
    )
    process.wait(120)
    assert (
        ends(process, 143)
        == "error: saving took longer than grace_seconds=0.05: ended without saving\n"
    )


def test_the_grace_counts_while_the_main_thread_runs_no_python():
    """As during a compilation: a lock of C's, taken twice, is a call that never returns."""
    process = run(
        """
import ctypes
lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with StopSignals() as signals:
    signals.let_finish(0.05)
    library.pthread_mutex_lock(lock)
    print("ready", flush=True)
    library.pthread_mutex_lock(lock)
"""
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.wait(120)
    ends(process, 143)


def test_afterwards_all_is_as_before():
    handlers = [signal.getsignal(number) for number, _ in STOPS]
    count, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with StopSignals() as outer:
        with StopSignals() as inner:
            inner.let_finish(600)
            os.kill(os.getpid(), signal.SIGUSR1)
            while not inner.exit_code:
                threading.Event().wait(0.001)
        assert (outer.exit_code, inner.exit_code) == (0, 143)
    assert [signal.getsignal(number) for number, _ in STOPS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (count, threads)


def test_what_nohup_ignores_stays_ignored():
    process = run(
        """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopSignals() as signals:
    signals.let_finish(600)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    noted(signals)
print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
sys.exit(signals.exit_code)
"""
    )
    assert process.stdout.readline() == "True\n"
    assert ends(process, 143) == ""


def test_other_threads_leave_signals_alone():
    """Python lets the main thread alone handle them: training in another one works without."""
    seen = []

    def body():
        with StopSignals() as signals:
            seen.append(signals.exit_code)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [0]
    assert signal.getsignal(signal.SIGTERM) is before


# What a process does before its first line is run: sends itself SIGINT at a certain moment.
AT_START = """
import atexit, gc, os, signal, sys, threading

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["MOMENT"]:
            interrupt()

def in_the_garbage_collector(phase, info):  # where JAX, too, has a call that swallows exceptions
    if "jax._src.lib" in sys.modules:
        interrupt()

def at_the_end():
    interrupt()
    threading.Event().wait(60)

sys.meta_path.insert(0, AtImport())
if os.environ["MOMENT"] == "the garbage collector":
    gc.callbacks.append(in_the_garbage_collector)
if os.environ["MOMENT"] == "the end":
    atexit.register(at_the_end)
"""
MOMENTS = ("absl", "numpy.exceptions", "jax", "jax._src.lib", "cnn_jax.cli.commands")
PRESSED = [
    *[("list", moment) for moment in (*MOMENTS, "the garbage collector", "the end")],
    ("summary --experiment=quickstart --input_size=28x28x1", "flax.linen"),
    ("summary --experiment=quickstart --input_size=28x28x1", "the end"),
    ("train --experiment=quickstart --workdir={}", "orbax.checkpoint"),
    *[(name, "numpy.random") for name in COMMANDS],
]


@pytest.mark.parametrize(("command", "moment"), PRESSED)
def test_ctrl_c_ends_every_command_at_every_moment(command, moment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_START)
    done = run_command(
        *command.format(tmp_path / "run").split(), PYTHONPATH=str(tmp_path), MOMENT=moment
    )
    assert done.returncode == 130, done.stderr
    assert re.fullmatch(
        r"(error: (interrupted|stopped by a signal before training.*)\n)?", done.stderr
    )


def test_ctrl_c_before_the_first_line_of_ours():
    """launch.sh starts Python with SIGINT held back, until this process is ready for it."""
    process = run("""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
os.kill(os.getpid(), signal.SIGINT)
os.execv(sys.executable, [sys.executable, "-m", "cnn_jax.main", "list"])
""")
    ends(process, 130)
