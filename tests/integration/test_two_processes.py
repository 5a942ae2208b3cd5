"""One run of two processes with one CPU device each."""

import re
import shutil
import signal
import socket

import numpy as np
import pytest
from PIL import Image

from cnn_jax.config import experiment
from cnn_jax.train import loop
from cnn_jax.train import workdir as workdirs
from cnn_jax.train.checkpoint import Checkpoints
from tests.faults import runs
from tests.faults.runs import finish, lines_of, start
from tests.tiny import prepare_tiny_squares

GONE = (
    "error: .*process {} (|of the 2 processes of this run )has ended; .* Start all processes again"
)

# The command where memory is too small for the data; at the end, how many images it has decoded.
DECODING = """
import atexit, functools, sys
from cnn_jax import main
from cnn_jax.data import sources, statistics, tfds_records
fetch, counts = tfds_records.Records.fetch, []
def counted(records, indices):
    if len(indices) != statistics.SAMPLE:
        counts.append(len(indices))
    return fetch(records, indices)
tfds_records.Records.fetch = counted
sources.load_examples = functools.partial(sources.load_examples, memory_bytes=0)
atexit.register(lambda: print("decoded", sum(counts), file=sys.stderr))
main.run()
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tfds_dir):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(runs.EXPERIMENT)
    return (
        "train",
        f"--experiment={path}",
        f"--data_dir={tfds_dir}",
        "--set=epochs=2",
        "--set=log_every_steps=4",
        "--set=heartbeat_seconds=5",
    )


def start_two(flags, *more, second=None, **options):
    return runs.start_several((*flags, *more), (*(second or flags), *more), **options)


def test_two_processes_train_as_one_does_and_one_goes_on_when_the_other_is_killed(flags, tmp_path):
    whole, two, cut = tmp_path / "whole", tmp_path / "two", tmp_path / "cut"
    code, _, errors = finish(start(*flags, f"--workdir={whole}"))
    assert code == 0, errors

    # Its images do not fit in memory: each process decodes its half of every batch, in threads here.
    more = f"--workdir={two}", "--set=data.workers=0"
    pair = start_two(flags, *more, program=("-c", DECODING), CNN_JAX_CACHE_DIR=str(tmp_path))
    results = [finish(process) for process in pair]
    assert [code for code, _, _ in results] == [0, 0], [errors for _, _, errors in results]
    # Two epochs and evaluations, where 32 are padded to two batches of 24, and a batch to compile for.
    half = (2 * (128 + 48 + 48) + 8) // 2
    for _, _, errors in results:
        assert half <= int(re.search(r"decoded (\d+)", errors)[1]) <= half + 8 // 2  # one ahead
    assert "test accuracy" in results[0][1]
    assert "test accuracy" not in results[1][1]
    assert len(lines_of(two)) == 2
    for one, other in zip(lines_of(whole), lines_of(two), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], abs=1e-5), name
    arrays = Checkpoints(two).newest().arrays
    for name, array in Checkpoints(whole).newest().arrays.items():
        np.testing.assert_allclose(arrays[name], array, rtol=1e-3, atol=1e-4, err_msg=name)

    pair = start_two(flags, f"--workdir={cut}")
    runs.wait_until(runs.has_saved(cut, 6), pair[0])
    pair[1].send_signal(signal.SIGKILL)
    code, _, errors = finish(pair[0], 120)
    finish(pair[1])
    assert code == 1
    assert re.match(GONE.format(1), errors.splitlines()[-1])
    assert Checkpoints(cut).newest().step >= 6
    code, output, errors = finish(start(*flags, f"--workdir={cut}"))
    assert (code, "resumed from step" in output) == (0, True), errors
    for one, other in zip(lines_of(whole), lines_of(cut), strict=True):
        for name in one:
            assert other[name] == pytest.approx(one[name], abs=1e-5), name


def test_two_processes_stream_a_folder_of_images(tmp_path):
    """Each decodes its part of every batch; the twin in the test split is found without decoding."""
    for seed in range(40):
        path = tmp_path / "photos" / ("train", "train", "train", "test")[seed % 4] / f"c{seed % 2}"
        path.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(path / f"{seed}.png")
    shutil.copy(path / f"{seed}.png", tmp_path / "photos/train/c1/twin.png")
    changes = f"data.name={tmp_path / 'photos'}", "model.num_classes=2", "epochs=2", "batch_size=10"
    streamed = "data.streaming=true", "data.workers=1", "heartbeat_seconds=600"
    flags = "train", "fashion_mnist/mlp", *(f"--set={change}" for change in (*changes, *streamed))
    results = [finish(process) for process in start_two(flags, f"--workdir={tmp_path / 'two'}")]
    assert [code for code, _, _ in results] == [0, 0], [errors for _, _, errors in results]
    for _, _, errors in results:
        assert "1 images are in two splits (equal files; first: train/c1/twin.png" in errors
    config = experiment.load("fashion_mnist/mlp", [*changes, "devices=1"])
    loop.train(config, tmp_path / "one")
    for one, other in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, abs=1e-5)
    saved = [workdirs.read_config(tmp_path / name) for name in ("one", "two")]
    assert saved[0]["data_files"] == saved[1]["data_files"]
    for split in ("train", "test"):
        assert saved[1]["fingerprints"][split].items() < saved[0]["fingerprints"][split].items()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--set=learning_rate=0.5", "config.learning_rate: 0.001 -> 0.5"),
        ("--set=data.test_split=test[:40]", "config.data.test_split: test -> test[:40]"),
        ("--set=log_every_steps=8", "config.log_every_steps: 4 -> 8"),
        ("--experiment", "code.model: "),
        ("--data_dir", "data.train.labels: "),
    ],
)
def test_processes_that_differ_are_refused_before_the_first_step(flags, tmp_path, more, says):
    other = list(flags)
    if more == "--experiment":
        (tmp_path / "small.py").write_text(runs.EXPERIMENT + "\n# another file\n")
        other[1] = f"--experiment={tmp_path / 'small.py'}"
    elif more == "--data_dir":
        prepare_tiny_squares(tmp_path / "data", shift=1)
        other[2] = f"--data_dir={tmp_path / 'data'}"
    else:
        other.append(more)
    pair = start_two(flags, f"--workdir={tmp_path / 'run'}", second=other)
    for code, _, errors in [finish(process) for process in pair]:
        assert code == 2, errors
        assert f"process 1 differs from process 0 in {says}" in errors
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("number", "lost"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]
)
def test_the_last_line_names_the_process_that_is_gone(flags, tmp_path, number, lost):
    """Also where it is silent, or was the coordinator, and JAX aborts the one that is left."""
    pair = start_two(flags, f"--workdir={tmp_path}", "--set=epochs=1000")
    runs.wait_until(runs.has_saved(tmp_path, 6), pair[0])
    pair[lost].send_signal(number)
    code, _, errors = finish(pair[1 - lost], 120)
    pair[lost].kill()
    finish(pair[lost])
    assert code == 1
    assert re.match(GONE.format(lost), errors.splitlines()[-1])


def test_a_signal_to_one_process_saves_once_and_ends_both(flags, tmp_path):
    """At one step, without waiting for the next one that is logged; a call does two steps."""
    settings = "epochs=1000", "log_every_steps=1000", "resident_data=true", "steps_per_call=2"
    more = f"--workdir={tmp_path}", *(f"--set={setting}" for setting in settings)
    pair = start_two(flags, *more)
    runs.wait_until(runs.has_saved(tmp_path, 6), pair[0])
    pair[1].send_signal(signal.SIGTERM)
    lines = []
    for code, _, errors in [finish(process) for process in pair]:
        assert code == 143, errors
        lines.append(errors.splitlines()[-1])
    step = Checkpoints(tmp_path).newest().step
    assert (
        lines
        == [
            f"error: stopped by a signal after step {step} of 16000, and saved; run the same command "
            "again to go on"
        ]
        * 2
    )


def test_what_cannot_join_says_so_in_one_line(flags, tmp_path):
    """The coordinator of one is not that of the other; the port of a third is taken."""
    more = f"--workdir={tmp_path}", "--set=heartbeat_seconds=1"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"--coordinator=127.0.0.1:{taken.getsockname()[1]}"
        alone = [start(*flags, *more, address, "--processes=2", f"--process={i}") for i in range(2)]
        found = [finish(process) for process in alone]
    assert [code for code, _, _ in found] == [2, 2]
    first, second = (errors.splitlines()[-1] for _, _, errors in found)
    assert first.startswith(f"error: {address}: another process 0 or another program uses")
    assert second.startswith(f"error: {address}: the 2 processes of this run did not all come")


def test_two_processes_with_one_number_are_told(flags, tmp_path):
    """Process 0 says so; the other one, which JAX ends too, names process 0."""
    more = f"--workdir={tmp_path}", "--set=epochs=1000"
    pair = start_two(flags, *more)
    runs.wait_until(runs.has_saved(tmp_path, 2), pair[0])
    where = [word for word in pair[1].args if word.startswith("--co") or "--process" in word]
    odd = start(*flags, *more, *where, "--set=heartbeat_seconds=1")
    found = [finish(process, 120) for process in (*pair, odd)]
    assert [code for code, _, _ in found] == [1, 1, 2], found
    last = [errors.splitlines()[-1] for _, _, errors in found]
    assert last[0].startswith(
        "error: two processes of this run have the same --process, or one was"
    )
    assert re.match(GONE.format(0), last[1])
    assert "(here 1; if all were started, another one has this number)" in last[2]


def test_a_process_that_fails_alone_is_not_waited_for(flags, tmp_path):
    """The workdir is in use, which the first process notices while the second waits for it."""
    with workdirs.locked(tmp_path):
        pair = start_two(flags, f"--workdir={tmp_path}")
        (code, _, errors), (other, _, _) = [finish(process) for process in pair]
    assert code == 4
    assert "in use by process" in errors
    assert other != 0
    assert not (tmp_path / "config.json").exists()
