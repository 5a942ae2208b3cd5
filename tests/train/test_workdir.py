import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import optax
import pytest

from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.config import CHANGEABLE_ON_RESUME, Config, DataConfig
from cnn_jax.models import LeNet
from cnn_jax.train import workdir as workdirs
from tests.tiny import REPOSITORY

ABOUT = {"class_names": ["a", "b"], "image_shape": (28, 28, 1), "train_examples": 160}


def make_config(**fields):
    momentum = functools.partial(optax.sgd, momentum=0.9)
    return Config(LeNet(), DataConfig("tiny"), optimizer=momentum, **fields)


# -------------------------------------------------------------------------------------- folder


def test_prepare_makes_the_folder_and_leaves_it_empty(tmp_path):
    workdirs.prepare(tmp_path / "a" / "b")
    workdirs.prepare(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_workdir_that_is_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="this path or a part of it is a file; name a folder"):
        workdirs.prepare(tmp_path / below)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_workdir_that_cannot_be_made_or_written_is_refused():
    """/proc takes no folders, not even root's."""
    with pytest.raises(CheckpointError, match="workdir=/proc/run: cannot be made: "):
        workdirs.prepare(workdirs.Path("/proc/run"))
    with pytest.raises(CheckpointError, match="workdir=/proc: cannot be written: "):
        workdirs.prepare(workdirs.Path("/proc"))


# ---------------------------------------------------------------------------------------- lock


HOLD = """
import sys
from pathlib import Path
from cnn_jax.train import workdir
with workdir.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=120)


def test_a_second_run_is_refused_and_told_the_holder(tmp_path, holder):
    expected = f"workdir={tmp_path}: in use by process {holder.pid} on .+; wait for it, or choose"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=expected), workdirs.locked(tmp_path):
            pass


def test_the_lock_of_a_killed_process_does_not_block(tmp_path, holder):
    holder.kill()
    holder.wait(120)
    with workdirs.locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
        refused = pytest.raises(CheckpointError, match=f"process {os.getpid()} ")
        with refused, workdirs.locked(tmp_path):
            pass
    with workdirs.locked(tmp_path):
        pass


def test_a_lock_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "lock").mkdir()
    refused = pytest.raises(CheckpointError, match=r"lock: cannot be written: Is a directory$")
    with refused, workdirs.locked(tmp_path):
        pass


@pytest.mark.parametrize("what", ["deleted", "moved", "replaced"])
def test_the_lock_notices_that_the_workdir_is_another(tmp_path, what):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with workdirs.locked(workdir) as check:
        check()
        if what == "deleted":
            shutil.rmtree(workdir)
        else:
            workdir.rename(tmp_path / "elsewhere")
        if what == "replaced":
            workdir.mkdir()
            (workdir / "lock").write_text("process 1 on elsewhere")
        with pytest.raises(CheckpointError, match=f"workdir={workdir}: was deleted or moved"):
            check()


# --------------------------------------------------------------------------------- config.json


def test_config_json_says_what_was_asked_for(tmp_path):
    workdirs.write_config(tmp_path, make_config(batch_size=48), "my/experiment", ABOUT)
    saved = workdirs.read_config(tmp_path)
    assert saved["experiment"] == "my/experiment"
    assert saved["config"]["batch_size"] == 48
    assert saved["config"]["model"] == {"class": "LeNet", "num_classes": 10}
    assert saved["config"]["optimizer"]["momentum"] == 0.9
    assert (saved["class_names"], saved["image_shape"]) == (["a", "b"], [28, 28, 1])
    assert saved["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax"}
    assert saved["device"]["count"] >= 1
    assert saved["device"]["cores"] == len(os.sched_getaffinity(0))
    assert saved["device"]["processor"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("part", "field", "before"),
    [
        ("device", "cores", 999),
        ("device", "processor", "Abacus"),
        ("device", "count", 77),
        ("versions", "jax", "0.1"),
        ("versions", "jaxlib", "0.1"),
        (None, None, None),
    ],
)
def test_a_run_that_goes_on_elsewhere_says_so(part, field, before, tmp_path, caplog):
    workdirs.write_config(tmp_path, make_config(), "my/experiment", ABOUT)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["device"]["kind"]  # an older file has fewer fields
    if part:
        now, saved[part][field] = saved[part][field], before
    path.write_text(json.dumps(saved))
    workdirs.warn_of_other_bits(tmp_path)
    if part is None:
        assert caplog.messages == []
        return
    (line,) = caplog.messages
    assert line.startswith(
        f"warning: workdir={tmp_path}: the run continues with {field} {before} -> {now}, "
    )


def test_files_are_strict_json(tmp_path):
    for write in (
        lambda: workdirs.write_json(tmp_path / "x.json", {"loss": float("nan")}),
        lambda: workdirs.append_metrics(tmp_path, {"step": 1, "loss": float("inf")}),
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "test_loss": NaN}\n{"step": 2}\n')
    assert workdirs.metrics(tmp_path) == [{"step": 2}]
    workdirs.keep_metrics_until(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"config": 3}',
        '{"config": {}, "experiment": "x", "class_names": [], "image_shape": []}',
        '{"config": {"model": {}, "data": {}, "eval_batch_size": 1, "compute_dtype": "float32"},'
        ' "experiment": "x", "class_names": [], "image_shape": [28, 28, "1"]}',
        '{"config": {"model": "LeNet", "data": {}, "eval_batch_size": 1, "compute_dtype": "float32"},'
        ' "experiment": "x", "class_names": [], "image_shape": []}',
        "\udcff",
    ],
)
def test_a_damaged_config_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: damaged \("):
        workdirs.read_config(tmp_path)


def test_a_folder_without_a_run_is_told_from_one_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        workdirs.read_config(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        workdirs.read_config(tmp_path / "none")


def test_the_same_run_may_go_on(tmp_path):
    workdirs.check_same_run(tmp_path, make_config(), ABOUT)  # nothing there yet
    workdirs.write_config(tmp_path, make_config(), "x", ABOUT)
    workdirs.check_same_run(tmp_path, make_config(), ABOUT)
    workdirs.check_same_run(tmp_path, make_config(epochs=99, heartbeat_seconds=5), ABOUT)


OTHERS = {
    "learning_rate: 0.001 -> 0.5": make_config(learning_rate=0.5),
    "model.num_classes: 10 -> 11": dataclasses.replace(make_config(), model=LeNet(11)),
    "data.flip: False -> True": dataclasses.replace(
        make_config(), data=DataConfig("tiny", flip=True)
    ),
    "optimizer.momentum: 0.9 -> 0.5": dataclasses.replace(
        make_config(), optimizer=functools.partial(optax.sgd, momentum=0.5)
    ),
    "schedule: constant -> cosine": make_config(schedule="cosine"),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_run_is_refused_with_the_difference(tmp_path, difference):
    workdirs.write_config(tmp_path, make_config(), "x", ABOUT)
    with pytest.raises(ConfigError) as caught:
        workdirs.check_same_run(tmp_path, OTHERS[difference], ABOUT)
    assert str(caught.value) == (
        f"workdir={tmp_path}: holds another run; {difference} (choose another --workdir)"
    )


def test_every_other_field_must_stay(tmp_path):
    """A field that is added to Config is refused until someone says that it may change."""
    workdirs.write_config(tmp_path, make_config(), "x", ABOUT)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    for name, value in saved["config"].items():
        path.write_text(json.dumps(saved | {"config": saved["config"] | {name: [value]}}))
        if name in CHANGEABLE_ON_RESUME or name == "epochs":
            workdirs.check_same_run(tmp_path, make_config(), ABOUT)
        elif name not in ("model", "data"):  # as lists they are damaged, above
            with pytest.raises(ConfigError, match=rf"; {name}: |; {name}\."):
                workdirs.check_same_run(tmp_path, make_config(), ABOUT)


@pytest.mark.parametrize(
    ("field", "value"),
    [("class_names", ["a", "c"]), ("image_shape", (32, 32, 1)), ("train_examples", 161)],
)
def test_other_data_is_another_run(tmp_path, field, value):
    workdirs.write_config(tmp_path, make_config(), "x", ABOUT)
    with pytest.raises(ConfigError, match=rf"holds another run; {field}: .+ -> "):
        workdirs.check_same_run(tmp_path, make_config(), ABOUT | {field: value})


# ------------------------------------------------------------------------------- metrics.jsonl


def test_lines_come_back_in_order(tmp_path):
    assert workdirs.metrics(tmp_path) == []
    lines = [{"step": step, "test_loss": step / 3} for step in (5, 10, 15)]
    for line in lines:
        workdirs.append_metrics(tmp_path, line)
    assert workdirs.metrics(tmp_path) == lines
    workdirs.keep_metrics_until(tmp_path, 10)
    assert workdirs.metrics(tmp_path) == lines[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_a_line_is_left_out(tmp_path):
    good = '{"step": 5}\n'
    rest = '3\n[]\n{}\n{"step": "5"}\n{"step": 10, "loss": 0.\n\n'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + b"\xff\x00\n" + rest.encode())
    assert workdirs.metrics(tmp_path) == [{"step": 5}]


def test_a_line_torn_at_any_byte_loses_itself_alone(tmp_path):
    whole = b'{"step": 5, "name": "\xc3\xa9"}\n'
    for end in range(1, len(whole) - 1):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + whole[:end])
        assert workdirs.metrics(tmp_path) == [{"step": 1}], end
        workdirs.keep_metrics_until(tmp_path, 99)
        workdirs.append_metrics(tmp_path, {"step": 5})
        assert workdirs.metrics(tmp_path) == [{"step": 1}, {"step": 5}], end


# ------------------------------------------------------------------------------------- writing


def test_writing_replaces_a_file_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    workdirs.write_json(path, {"old": 1})

    def full(self, text, encoding):
        with open(self, "w", encoding=encoding) as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdirs.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        workdirs.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "write",
    [
        lambda workdir: workdirs.append_metrics(workdir, {"step": 1}),
        lambda workdir: workdirs.keep_metrics_until(workdir, 1),
        lambda workdir: workdirs.write_config(workdir, make_config(), "x", ABOUT),
    ],
)
def test_a_run_that_cannot_write_is_told_which_file(tmp_path, write):
    with pytest.raises(CheckpointError, match=r"none/.+: cannot be written: No such file"):
        write(tmp_path / "none")
