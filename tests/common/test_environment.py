"""What is set in the environment, tried by processes of their own where JAX or Python reads it."""

import re
import subprocess
import sys

import jax
import pytest

from cnn_jax import main
from tests.tiny import REPOSITORY, run_command

SUMMARY = ("summary", "--experiment=quickstart", "--input_size=28x28x1")

REFUSED = [  # variable, value, the one line
    (
        "JAX_PLATFORMS",
        "cuda",
        r"JAX_PLATFORMS=cuda: JAX cannot start on this platform \(.+\); set JAX_PL",
    ),
    ("JAX_PLATFORMS", "nonsense", r"JAX_PLATFORMS=nonsense: .*'nonsense' is not in the list .*cpu"),
    ("JAX_PLATFORMS", "CPU", r"JAX_PLATFORMS=CPU: JAX cannot start on this platform "),
    ("JAX_PLATFORMS", "cpu,", r"JAX_PLATFORMS=cpu,: JAX cannot start on this platform "),
    ("JAX_PLATFORMS", "tpu", r"JAX_PLATFORMS=tpu: JAX cannot start on this platform "),
    (
        "JAX_DISABLE_JIT",
        "maybe",
        r"JAX refuses an environment variable: .*'maybe'.*JAX_DISABLE_JIT",
    ),
    (
        "JAX_DEFAULT_MATMUL_PRECISION",
        "x",
        r"JAX refuses an environment variable: .*matmul_precision",
    ),
    ("JAX_NUM_CPU_DEVICES", "two", r"JAX refuses an environment variable: .*jax_num_cpu_devices"),
    (
        "XLA_FLAGS",
        "--xla_cpu_mulit_thread_eigen=false",
        r"XLA_FLAGS: this version of XLA does not know --xla_cpu_mulit_thread_eigen=false; nearest: "
        r"--xla_cpu_multi_thread_eigen$",
    ),
    ("CNN_JAX_CACHE_DIR", "~nosuchuser/x", r"~nosuchuser/x: the home folder ~nosuchuser is not "),
]
REFUSED_FLAGS = [  # of XLA_FLAGS; a process of the program's own tries them
    (
        "--xyzzy --abc=1",
        r"XLA_FLAGS: this version of XLA does not know --xyzzy --abc=1$",
    ),
    ("-xla_cpu_foo", r"XLA_FLAGS: this version of XLA does not know -xla_cpu_foo"),
    (
        "--xla_force_host_platform_device_count=x",
        r"XLA_FLAGS: --xla_force_host_platform_device_count=x: XLA does not accept this value$",
    ),
    ("flags.txt", r"XLA_FLAGS=flags.txt: must be flags, which start with --$"),
    ("--help", r"XLA_FLAGS=--help: must be flags that this version of XLA knows$"),
]


@pytest.mark.parametrize(
    ("name", "value", "said"), REFUSED, ids=[f"{n}={v}" for n, v, _ in REFUSED]
)
def test_what_cannot_be_is_refused_in_one_line(name, value, said):
    command = SUMMARY if name == "JAX_PLATFORMS" else ["list"]
    done = run_command(*command, **{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(f"error: {said}", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "said"), REFUSED_FLAGS, ids=[value for value, _ in REFUSED_FLAGS]
)
def test_flags_that_xla_does_not_take_are_refused_in_one_line(
    value, said, monkeypatch, caplog, capsys
):
    monkeypatch.setenv("XLA_FLAGS", value)
    assert main.main(["list"]) == 2
    assert capsys.readouterr().out == ""
    (line,) = caplog.messages
    assert re.match(f"error: {said}", line)
    assert "\n" not in line


def test_what_can_be_is_taken():
    environment = {
        "XLA_FLAGS": " --xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen",
        "JAX_PLATFORMS": "",
        "JAX_DISABLE_JIT": "1",
        "JAX_ENABLE_X64": "1",
    }
    done = run_command(*SUMMARY, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("LeNet on 28x28x1\n")


def test_training_without_jit_learns_the_same(tmp_path, tfds_dir, capsys):
    """As people set JAX_DISABLE_JIT to look into a model."""
    own = tmp_path / "own.py"
    own.write_text(
        "from cnn_jax.config import Config, DataConfig\n"
        "from cnn_jax.models import MLP\n"
        "def config(): return Config(MLP(), DataConfig('tiny_squares'), epochs=1, batch_size=80)\n"
    )
    lines = []
    for disabled in (False, True):
        flags = (
            f"--experiment={own}",
            f"--data_dir={tfds_dir}",
            f"--workdir={tmp_path / f'{disabled}'}",
        )
        with jax.disable_jit(disabled):
            assert main.main(["train", *flags, "--set=devices=1"]) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("epoch 1/1")]
        lines.append([float(number) for number in re.findall(r"\d\.\d{4}", line)])
    assert len(lines[0]) == 4
    assert lines[1] == pytest.approx(lines[0], abs=2e-4)


STREAMS = [  # the environment, how the streams show a Japanese letter, how one of the command line
    ({"PYTHONIOENCODING": "ascii"}, r"\u65e5", r"\u65e5"),
    ({"PYTHONIOENCODING": "latin-1:strict"}, r"\u65e5", r"\u65e5"),
    (
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        r"\u65e5",
        r"\udce6\udc97\udca5",  # its three bytes, as Python reads them there
    ),
    ({"PYTHONIOENCODING": "utf-8"}, "日", "日"),
]


@pytest.mark.parametrize(
    ("environment", "shown", "given"), STREAMS, ids=[str(e) for e, *_ in STREAMS]
)
def test_names_in_another_script_are_shown_by_every_stream(environment, shown, given, tmp_path):
    """On standard output and on standard error."""
    own = tmp_path / "日.py"
    own.write_text(
        "import flax.linen as nn\n"
        "from cnn_jax.config import Config, DataConfig\n"
        "from cnn_jax.models.layers import Dense, Flatten\n"
        "class Net(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, image, train=False):\n"
        "        return Dense(10, name='日')(Flatten()(image))\n"
        "def config(): return Config(Net(), DataConfig('tiny_squares'))\n",
        encoding="utf-8",
    )
    done = run_command("summary", f"--experiment={own}", "--input_size=8x8x1", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n{shown} " in done.stdout
    done = run_command("日", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {given}: no such command")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stream(closed):
    command = f'"{sys.executable}" -m cnn_jax.main list {closed}'
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
