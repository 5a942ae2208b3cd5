"""launch.sh, driven in a copy of the repository with a stand-in for Python: nothing is installed."""

import ast
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# When one of them changes, everything is installed again.
SOURCES = ("setup.cfg", "pyproject.toml", ".ci/constraints.txt")

# All that launch.sh may need besides Python.
TOOLS = "bash cat cksum dirname ls readlink timeout"

# Behaves as Python does towards launch.sh and notes what it is asked in $FAKE_LOG. FAKE_VENV and
# FAKE_PIP say how these two steps end: "killed" takes launch.sh along, "failed" is an ordinary
# failure, "held" waits until $FAKE_GO is written. It imports little because each test starts it often.
FAKE_PYTHON = r"""
import os, sys

me, *arguments = sys.argv[1:]
venv = os.path.dirname(os.path.dirname(me))
if "FAKE_STARTS" in os.environ:
    with open(os.environ["FAKE_STARTS"], "a") as starts:
        print(*arguments, file=starts)


def step(name, text):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(text + "\n")
    end = os.environ.get("FAKE_" + name)
    if end == "killed":
        os.kill(os.getppid(), 9)
        sys.exit(1)
    if end == "failed":
        sys.exit("ERROR: No matching distribution found for jax")
    if end == "held":
        with open(os.environ["FAKE_STARTED"], "w") as started:
            started.write(".")
        open(os.environ["FAKE_GO"]).read()


if arguments[0] == "-c":
    kind, version, has_venv = os.environ["FAKE_ANSWER"].split()
    print(f"{kind} {version}\n{me}")
    sys.exit(has_venv != "yes")
elif arguments[0] == "-I":
    import runpy

    version = os.environ["FAKE_ANSWER"].split()[1]
    sys.executable, sys.argv, sys.version_info = me, arguments[1:], version.split(".")
    runpy.run_path(arguments[1], run_name="__main__")
elif arguments[:2] == ["-m", "venv"]:
    os.mkdir(arguments[2] + "/bin")
    step("VENV", "venv")
    os.symlink(me, arguments[2] + "/bin/python")
    open(arguments[2] + "/pip", "w").close()
elif arguments[:3] == ["-m", "pip", "--version"]:
    sys.exit(not os.path.exists(venv + "/pip"))
elif arguments[:3] == ["-m", "pip", "install"]:
    pinned = "pinned " if "--constraint" in arguments else ""
    alone = "--no-deps " if "--no-deps" in arguments else ""
    step("PIP", "pip " + pinned + alone + arguments[-1])
    os.makedirs(venv + "/lib/python3.11/site-packages/cnn_jax-0.1.0.dist-info", exist_ok=True)
else:
    report = {"arguments": arguments, "pid": os.getpid(), "cwd": os.getcwd()}
    report["launcher"] = os.environ.get("CNN_JAX_LAUNCHER")
    if "FAKE_WAIT" not in os.environ:
        print(report)
        sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
    import signal

    handled = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    print(report, flush=True)
    sys.exit(100 + signal.sigwait(handled))
"""


class House:
    """A copy of what launch.sh needs, in a folder whose name asks for quoting."""

    def __init__(self, folder: Path):
        self.root = folder / "a [house]"
        self.tools = folder / "tools"
        self.home = folder / "home"
        self.log = folder / "log"
        (self.root / ".ci").mkdir(parents=True)
        self.tools.mkdir()
        (self.root / "cnn_jax/common").mkdir(parents=True)
        for name in (*SOURCES, "cnn_jax/common/set_up.py"):
            shutil.copy(REPOSITORY / name, self.root / name)
        # The folders outside PATH where it looks for Python are this one's own.
        text = (REPOSITORY / "launch.sh").read_text()
        for name in ("/usr/local/bin", "/opt/"):
            assert f" {name}" in text
            text = text.replace(f" {name}", f" '{self.home}'{name}")
        (self.root / "launch.sh").write_text(text)
        (self.root / "launch.sh").chmod(0o755)
        for name in TOOLS.split():
            if found := shutil.which(name):
                (self.tools / name).symlink_to(found)
        self.fake = folder / "fake_python.py"
        self.fake.write_text(FAKE_PYTHON)
        self.python = self.add_python(self.tools / "python3.11")

    def add_python(self, path: Path, answer: str = "cpython 3.11 yes") -> Path:
        """A Python at `path`; the answer: implementation, version, whether venv is there."""
        start = f"'{sys.executable}' -SE '{self.fake}' \"$0\" \"$@\""
        return self.add_tool(path, f"FAKE_ANSWER='{answer}' exec {start}")

    def add_tool(self, name: Path | str, line: str) -> Path:
        path = self.tools / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return path

    def add_gpu(self, driver: str, capability: str = "9.0"):
        lines = f"*=driver_version) echo '{driver}' ;; *=compute_cap) echo '{capability}' ;;"
        self.add_tool("nvidia-smi", f'case "$1" in {lines} esac')

    def environment(self) -> dict[str, str]:
        return {"PATH": str(self.tools), "HOME": str(self.home), "FAKE_LOG": str(self.log)}

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str):
        return subprocess.Popen(
            [self.root / "launch.sh", *arguments],
            cwd=cwd or self.root,
            env={**self.environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        with self.start(*arguments, **options) as process:
            stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def run(self, *arguments: str, **options) -> list[str]:
        """A call that has to succeed; returns what Python was run with."""
        result = self.call(*arguments, **options)
        assert result.returncode == 0, result.stderr
        return handed_on(result.stdout)

    def steps(self) -> list[str]:
        """The steps of a set-up since the last question."""
        steps = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return steps

    def change_setup_cfg(self):
        with open(self.root / "setup.cfg", "a") as file:
            file.write("# changed\n")


def handed_on(stdout: str) -> list[str]:
    return ast.literal_eval(stdout)["arguments"]


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line of a call that has to end before it does anything."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture
def ready_house(house):
    house.run("list")
    house.steps()
    return house


@pytest.fixture
def held_pip(tmp_path):
    """Named pipes on which a held pip says that it has started, and waits to be let go."""
    started, go = tmp_path / "started", tmp_path / "go"
    os.mkfifo(started)
    os.mkfifo(go)
    reader = os.open(started, os.O_RDONLY | os.O_NONBLOCK)

    class HeldPip:
        options: ClassVar = {"FAKE_PIP": "held", "FAKE_STARTED": f"{started}", "FAKE_GO": f"{go}"}

        def wait_until_started(self):
            assert select.select([reader], [], [], 60)[0]

        def let_go(self):
            go.write_text(".")

    yield HeldPip()
    os.close(reader)


def test_alone_it_sets_up_and_runs_the_quick_start(house):
    assert house.run() == ["-P", "-m", "cnn_jax.main", "train", "--experiment=quickstart"]
    assert house.steps() == ["venv", "pip ."]


def test_hands_on_arguments_and_keeps_the_folder(ready_house, tmp_path):
    result = ready_house.call("train", "--set", "a.b=x y", "", "*", cwd=tmp_path)
    assert handed_on(result.stdout)[3:] == ["train", "--set", "a.b=x y", "", "*"]
    assert ast.literal_eval(result.stdout)["cwd"] == str(tmp_path)


def test_runs_through_a_link_to_it(ready_house, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(Path(ready_house.root.name) / "launch.sh")
    stdout = subprocess.check_output([link, "list"], env=ready_house.environment(), text=True)
    assert handed_on(stdout)[3:] == ["list"]
    assert ready_house.steps() == []


def test_hands_on_the_exit_code(ready_house):
    assert ready_house.call("train", FAKE_EXIT="5").returncode == 5


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_python(ready_house, sent):
    with ready_house.start("train", FAKE_WAIT="1") as process:
        assert ast.literal_eval(process.stdout.readline())["pid"] == process.pid
        process.send_signal(sent)
    assert process.returncode == 100 + sent


def test_help_without_a_set_up(house):
    result = house.call("--help")
    assert result.returncode == 0
    assert "./launch.sh test" in result.stdout
    assert house.steps() == []


def test_setup_runs_nothing(house):
    result = house.call("setup")
    assert (result.returncode, result.stdout) == (0, "")
    assert "for cpu (nvidia-smi finds no GPU)" in result.stderr
    assert house.steps() == ["venv", "pip ."]


@pytest.mark.parametrize("argument", ["--gpu", "--with=gpu", "--pinned=no", "list"])
def test_setup_refuses_other_arguments(house, argument):
    result = house.call("setup", "--pinned", argument)
    assert result.returncode == 2
    allowed = (
        "--pinned and --with=prepare, gcs, s3, slurm, wandb, mlflow, onnx, notebook, test, "
        "compile-tpu or compile-cuda"
    )
    assert error_line(result) == f"launch.sh: setup takes {allowed}, got '{argument}'"
    assert house.steps() == []


def test_additions_stay_and_are_made_once(ready_house):
    def steps(*arguments):
        assert ready_house.call(*arguments).returncode == 0
        return ready_house.steps()

    assert steps("setup") == []
    assert steps("setup", "--with=prepare") == ["pip .[prepare]"]
    assert steps("setup", "--with=prepare") == []
    assert steps("setup", "--pinned", "--with=test") == ["pip pinned .[prepare,test]"]
    assert steps("setup", "--with=compile-tpu") == ["pip pinned .[prepare,test,compile-tpu]"]
    assert steps("setup") == steps("list") == []
    ready_house.change_setup_cfg()
    assert steps("list") == ["pip pinned .[prepare,test,compile-tpu]"]


def test_jax2onnx_is_added_without_what_it_requires(ready_house):
    assert ready_house.call("setup", "--with=onnx").returncode == 0
    assert ready_house.steps() == ["pip .[onnx]", "pip --no-deps jax2onnx"]


def test_the_program_can_have_tensorflow_added_once(ready_house):
    """It calls the launcher that it is told of, which then tells of none."""
    launcher = ast.literal_eval(ready_house.call("train", "--download").stdout)["launcher"]
    assert launcher == str(ready_house.root / "launch.sh")
    result = ready_house.call("--with=prepare", "train", "--download")
    assert handed_on(result.stdout)[3:] == ["train", "--download"]
    assert ast.literal_eval(result.stdout)["launcher"] is None
    assert ready_house.steps() == ["pip .[prepare]"]


def test_a_second_call_starts_one_python(ready_house, tmp_path):
    starts = tmp_path / "starts"
    result = ready_house.call("list", FAKE_STARTS=str(starts))
    assert (result.returncode, result.stderr) == (0, "")
    assert starts.read_text() == "-P -m cnn_jax.main list\n"
    assert ready_house.steps() == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_changed_file_is_installed_again(ready_house, name):
    with open(ready_house.root / name, "a") as file:
        file.write("# changed\n")
    ready_house.run("list")
    ready_house.run("list")
    assert ready_house.steps() == ["pip ."]


def test_tests_add_their_tools_once(ready_house, tmp_path):
    arguments = ready_house.run("test", "-k", "a or b", cwd=tmp_path)
    assert arguments[:2] == ["-m", "pytest"]
    assert arguments[-2:] == ["-k", "a or b"]
    ready_house.run("test")
    ready_house.run("list")
    assert ready_house.steps() == ["pip .[test]"]
    ready_house.change_setup_cfg()
    ready_house.run("list")
    assert ready_house.steps() == ["pip .[test]"]


def test_faults_selects_every_test_before_other_arguments(ready_house):
    arguments = ready_house.run("test", "-x", "--faults", "-m", "slow")
    assert arguments[-4:] == ["-x", "-mfaults or not faults", "-m", "slow"]


@pytest.mark.parametrize("step", ["FAKE_VENV", "FAKE_PIP"])
def test_a_killed_set_up_starts_anew(house, step):
    assert house.call("list", **{step: "killed"}).returncode == -signal.SIGKILL
    house.steps()
    house.run("list")
    assert house.steps() == ["venv", "pip ."]


def test_a_killed_addition_starts_anew(ready_house):
    assert ready_house.call("test", FAKE_PIP="killed").returncode == -signal.SIGKILL
    ready_house.steps()
    ready_house.run("list")
    assert ready_house.steps() == ["venv", "pip ."]


def test_sigterm_ends_a_set_up_at_once(house, held_pip):
    with house.start("list", **held_pip.options) as process:
        held_pip.wait_until_started()
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "cut short" in stderr
    house.steps()
    house.run("list")
    assert house.steps() == ["venv", "pip ."]


def lose_base_python(house):
    (house.root / ".venv/bin/python").unlink()
    (house.root / ".venv/bin/python").symlink_to("gone")


def lose_site_packages(house):
    shutil.rmtree(house.root / ".venv/lib")
    (house.root / ".venv/pip").unlink()


def lose_pip(house):
    (house.root / ".venv/pip").unlink()
    house.change_setup_cfg()


def lose_folder(house):
    shutil.rmtree(house.root / ".venv")
    (house.root / ".venv").touch()


def move(house):
    house.root = house.root.rename(house.root.with_name("moved"))


@pytest.mark.parametrize(
    "damage", [lose_base_python, lose_site_packages, lose_pip, lose_folder, move]
)
def test_a_damaged_environment_is_made_anew(ready_house, damage):
    stray = ready_house.root / ".venv/stray"
    stray.touch()
    damage(ready_house)
    ready_house.run("list")
    ready_house.run("list")
    assert ready_house.steps() == ["venv", "pip ."]
    assert not stray.exists()


def test_a_linked_environment_stays_where_it_is(house, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (house.root / ".venv").symlink_to(elsewhere)
    house.call("list", FAKE_PIP="killed")
    house.run("list")
    assert (house.root / ".venv").is_symlink()
    assert (elsewhere / "bin/python").exists()


def test_somebody_elses_environment_is_installed_into(ready_house):
    (ready_house.root / ".venv/.cnn_jax-ready").unlink()
    ready_house.run("list")
    assert ready_house.steps() == ["pip ."]


def test_a_failure_of_pip_is_one_line(house):
    result = house.call("list", FAKE_PIP="failed")
    assert result.returncode == 1
    log = house.root / ".venv-setup.log"
    cause = "ERROR: No matching distribution found for jax"
    assert result.stderr.splitlines()[-1] == (
        f"launch.sh: pip could not install cnn_jax (exit 1): {cause}; see {log}"
    )
    assert cause in log.read_text()
    house.steps()
    house.run("list")
    assert house.steps() == ["venv", "pip ."]


def test_a_failed_addition_leaves_what_was_there(ready_house):
    assert ready_house.call("test", FAKE_PIP="failed").returncode == 1
    ready_house.steps()
    ready_house.run("list")
    assert ready_house.steps() == []


def test_two_at_once_set_up_once(house, held_pip):
    with house.start("list", **held_pip.options) as first:
        held_pip.wait_until_started()
        with house.start("list") as second:
            assert "waiting for another set-up" in second.stderr.readline()
            held_pip.let_go()
            second_output, _ = second.communicate(timeout=60)
        first_output, _ = first.communicate(timeout=60)
    assert handed_on(first_output) == handed_on(second_output)
    assert house.steps() == ["venv", "pip ."]


def test_refuses_an_unknown_platform(house):
    result = house.call("list", CNN_JAX_PLATFORM="gpu")
    assert result.returncode == 2
    assert error_line(result) == (
        "launch.sh: CNN_JAX_PLATFORM is 'gpu'; allowed: cpu, cuda, cuda12, cuda13, tpu"
    )
    assert not (house.root / ".venv").exists()


def test_the_platform_that_is_found_stays(house):
    house.add_gpu("580.65.06")
    result = house.call("list", CNN_JAX_PLATFORM="cuda")
    assert "installing cnn_jax for cuda13 (driver 580.65.06 is 580 or newer)" in result.stderr
    assert house.steps() == ["venv", "pip .[cuda13]"]
    house.run("list", CNN_JAX_PLATFORM="cuda")
    house.run("list")
    assert house.steps() == []


def test_without_nvidia_smi_it_is_the_cpu(house):
    assert "for cpu (nvidia-smi finds no GPU)" in house.call("list").stderr


def test_the_tests_tools_are_added_for_the_same_device(house):
    house.add_gpu("580.65.06")
    house.run("list")
    house.run("test")
    assert house.steps() == ["venv", "pip .[cuda13]", "pip .[test,cuda13]"]


def test_setup_looks_again_for_a_gpu(ready_house):
    ready_house.add_gpu("550.54.14")
    ready_house.run("list")
    assert ready_house.steps() == []
    assert ready_house.call("setup").returncode == 0
    assert ready_house.steps() == ["pip .[cuda12]"]
    ready_house.add_gpu("580.65.06")  # a new driver
    assert ready_house.call("setup").returncode == 0
    assert ready_house.steps() == ["venv", "pip .[cuda13]"]


def test_another_device_makes_the_environment_anew(house):
    house.run("list", CNN_JAX_PLATFORM="tpu")
    house.run("list")
    assert house.steps() == ["venv", "pip .[tpu]"]
    house.run("list", CNN_JAX_PLATFORM="cpu")
    assert house.steps() == ["venv", "pip ."]


# Each place where it looks for Python beside PATH, and an environment that moves it.
PLACES = [
    (".pyenv/versions/3.13.0/bin", {}),
    ("elsewhere/versions/3.13.0/bin", {"PYENV_ROOT": "elsewhere"}),
    (".local/share/uv/python/cpython-3.13.0-linux/bin", {}),
    ("data/uv/python/cpython-3.13.0-linux/bin", {"XDG_DATA_HOME": "data"}),
    ("pythons/cpython-3.13.0-linux/bin", {"UV_PYTHON_INSTALL_DIR": "pythons"}),
    ("usr/local/bin", {}),
    ("opt/python/bin", {}),
]


@pytest.mark.parametrize(("folder", "environment"), PLACES)
def test_takes_the_newest_python_wherever_it_is(house, folder, environment):
    path = house.home / folder / "python3.13"
    house.add_python(path, "cpython 3.13 yes")
    environment = {name: str(house.home / value) for name, value in environment.items()}
    result = house.call("list", **environment)
    assert result.returncode == 0
    assert f"creating .venv with {path} (Python 3.13)" in result.stderr


def test_takes_the_newest_release_of_a_folder_and_an_untested_python_last(house):
    for version in ("3.12.1", "3.12.10", "3.12.9", "3.14.0"):
        minor = version[:4]
        path = house.home / f".pyenv/versions/{version}/bin/python{minor}"
        house.add_python(path, f"cpython {minor} yes")
    assert "/versions/3.12.10/bin/python3.12 (Python 3.12)" in house.call("list").stderr
    house.python.unlink()
    for path in house.home.glob(".pyenv/versions/3.12*/bin/*"):
        path.unlink()
    shutil.rmtree(house.root / ".venv")
    assert "/versions/3.14.0/bin/python3.14 (Python 3.14)" in house.call("list").stderr


@pytest.mark.parametrize(
    "unusable",
    [
        "echo 'pyenv: python3.13: command not found' >&2; exit 127",
        "echo pypy 3.13; echo /usr/bin/pypy",
        "echo cpythont 3.13; echo /usr/bin/python3.13t",
        "echo cpython 3.13; echo /usr/bin/python3.13; exit 1",
    ],
)
def test_passes_over_an_unusable_python(house, unusable):
    house.add_tool("python3.13", unusable)
    result = house.call("list")
    assert result.returncode == 0
    assert f"creating .venv with {house.python} (Python 3.11)" in result.stderr


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("cpython 3.9 yes", "it is cpython 3.9"),
        ("cpython 3.15 yes", "it is cpython 3.15"),
        ("pypy 3.11 yes", "it is pypy 3.11"),
        ("cpythont 3.13 yes", "it is cpythont 3.13"),
        ("cpython 3.11 no", "apt install python3.11-venv"),
    ],
)
def test_no_suitable_python(house, answer, reason):
    house.add_python(house.python, answer)
    result = house.call("list")
    assert result.returncode == 2
    line = error_line(result)
    assert "found no CPython 3.11 to 3.14" in line
    assert f"{house.python}: " in line
    assert reason in line
    assert not (house.root / ".venv").exists()


def test_python_can_be_chosen(ready_house):
    ready_house.python.rename(ready_house.tools / "my python")
    ready_house.run("list", PYTHON="my python")
    ready_house.run("list", PYTHON=f"{ready_house.tools}/my python")
    ready_house.run("list")
    assert ready_house.steps() == ["venv", "pip ."]


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("none", "which is not a command"),
        (".", "which is not a command"),
        ("README", "which is not a command"),
        ("old", "it is cpython 3.9"),
        ("cat", "it does not run as Python 3"),
        ("echo", "it does not run as Python 3"),
        ("silent", "it does not run as Python 3"),
    ],
)
def test_refuses_an_unsuitable_choice_of_python(house, python, reason):
    house.add_python(house.tools / "old", "cpython 3.9 yes")
    house.add_tool("echo", 'printf "%s\\n" "$@"')
    house.add_tool("silent", "exit 0")
    result = house.call("list", PYTHON=python)
    assert result.returncode == 2
    line = error_line(result)
    assert line.startswith(f"launch.sh: PYTHON is '{python}'")
    assert reason in line
    assert "allowed: CPython 3.11 to 3.14" in line
    assert not (house.root / ".venv").exists()
