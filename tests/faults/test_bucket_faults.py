"""A workdir in a bucket that an emulator on loopback plays, and what can befall it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cnn_jax.train import bucket_run
from cnn_jax.train.bucket_run import BucketRun
from cnn_jax.train.checkpoint import Checkpoints
from tests import emulators
from tests.faults import bucket_writer, runs
from tests.faults.runs import differences, finish, signal_when, start, wait_until
from tests.tiny import REPOSITORY

pytestmark = pytest.mark.buckets
KILLS = 5  # in each of four chains

ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"
DENIED = emulators.refusal("403 Forbidden", "xml", ERROR.format("AccessDenied", "no access"))
EXPIRED = {
    "gs": emulators.refusal(
        "401 Unauthorized", "json", '{"error": {"code": 401, "message": "Invalid Credentials"}}'
    ),
    "s3": emulators.refusal("400 Bad Request", "xml", ERROR.format("ExpiredToken", "expired")),
}
# A command in a hurry: the times that the README states would make the tests long.
HURRIED = "import sys; from cnn_jax.common import remote; from cnn_jax.train import mirror; "
HURRIED += "remote.SILENCE = 0.5; mirror.PAUSES = (0.0, 0.0); from cnn_jax import main; main.run()"


@pytest.fixture(params=emulators.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def bucket(kind, monkeypatch, tmp_path):
    """The network before an emulator; this process and those it starts find the emulator there."""
    with emulators.KINDS[kind]() as (network, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)
        fsspec.filesystem(kind).clear_instance_cache()
        monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "cache"))
        yield network
        network.answer, network.pause = None, 0.0


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(runs.EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def flags(experiment, tfds_dir):
    return "train", f"--experiment={experiment}", f"--data_dir={tfds_dir}", "--set", "epochs=3"


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, _, errors = finish(start(*flags, f"--workdir={workdir}"), 900)
    assert code == 0, errors
    return workdir


def one_line(process, code, *parts):
    """Standard error of a command that ends with `code`: its last line is the only error."""
    found, output, errors = finish(process, 900)
    assert found == code, output + errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: "), errors
    assert "Traceback" not in errors
    assert all(part in last for part in parts), last
    print(last)
    return errors


def newest(address) -> list[int]:
    """The complete checkpoints, each restored on a machine that has nothing, and checked."""
    folder = bucket_run.place(address, "inspected")
    shutil.rmtree(folder, ignore_errors=True)
    bucket_run.Copy(BucketRun(address), folder).refresh()
    checkpoints = Checkpoints(folder)
    for step in checkpoints.steps():
        bucket_writer.check(checkpoints.read(step))
    if steps := checkpoints.steps():
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines][: steps[-1] - 1] == [
            *range(1, steps[-1])
        ]
    return steps


class Child:
    """What `signal_when` needs of a process that another one started."""

    def __init__(self, pid: int):
        self._pid = pid

    def poll(self) -> int | None:
        try:
            state = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return 0
        return 0 if state == "Z" else None

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)


def end_lease(address) -> None:
    """As if the lease's time were over."""
    bucket = BucketRun(address)
    for name in bucket.names("lock"):
        bucket.write(name, json.dumps(json.loads(bucket.read(name)) | {"until": 0.0}).encode())


@pytest.mark.faults
@pytest.mark.parametrize("chain", range(4))
def test_kill_9_during_an_upload(bucket, kind, chain, tmp_path, tally):
    """After each kill a checkpoint is complete in the bucket, and it is no older than the one before.

    The next process goes on in turn in the same folder and on a machine that has nothing.
    """
    address, random, tried, reached = f"{kind}://bucket/run", np.random.default_rng(chain), 0, 0
    writer = ["-m", "tests.faults.bucket_writer"]
    forking = subprocess.Popen(
        [sys.executable, *writer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )
    bucket.pause = 0.01
    with forking:
        while tried < KILLS:
            cache = tmp_path / f"cache{tried // 2}"
            if tried % 2 == 0:
                end_lease(address)
            enough = bucket.uploads + random.integers(1, 60)
            print(address, cache, file=forking.stdin, flush=True)
            child = int(forking.stdout.readline())
            signal_when(lambda n=enough: bucket.uploads >= n, Child(child), signal.SIGKILL)
            code = int(forking.stdout.readline())
            found = newest(address)
            assert max(found, default=0) >= reached
            reached = max(found, default=0)
            if code == 0:  # it ended before
                assert reached == bucket_writer.STEPS
                lines = BucketRun(address).read("metrics.jsonl").splitlines()
                assert [json.loads(line)["step"] for line in lines] == [*range(1, reached + 1)]
                address, reached = f"{address}x", 0
                continue
            assert code == -signal.SIGKILL
            tried += 1
        forking.stdin.close()
    tally.add(f"kill -9 during an upload to {kind}://", tried, tried)


def test_a_machine_is_lost_and_another_goes_on(bucket, kind, flags, undisturbed, tmp_path):
    address = f"{kind}://bucket/run"
    process = start(*flags, f"--workdir={address}")
    signal_when(lambda: BucketRun(address).markers(), process, signal.SIGSTOP)
    second = start(*flags, f"--workdir={address}", CNN_JAX_CACHE_DIR=str(tmp_path / "other"))
    refused = f"workdir={address}: in use by process {process.pid} on ", " UTC unless it is renewed"
    one_line(second, 4, *refused)
    process.kill()
    finish(process)
    second = start(*flags, f"--workdir={address}", CNN_JAX_CACHE_DIR=str(tmp_path / "other"))
    one_line(second, 4, *refused)
    end_lease(address)
    second = start(*flags, f"--workdir={address}", CNN_JAX_CACHE_DIR=str(tmp_path / "other"))
    code, output, errors = finish(second)
    assert code == 0, errors
    assert f"of {address}" in output + errors
    assert differences(bucket_run.local_copy(address, fresh=True), undisturbed) == []
    code, output, errors = finish(start("verify", address))
    assert code == 0, errors
    assert "3 of 3 checkpoints are valid" in output or "2 of 2 checkpoints are valid" in output
    experiment = next(flag for flag in flags if "--experiment" in flag)
    data = next(flag for flag in flags if "--data_dir" in flag)
    code, output, errors = finish(start("evaluate", address, experiment, data))
    assert code == 0, errors
    assert f"copied to {address}: evaluation.json" in errors
    assert json.loads(BucketRun(address).read("evaluation.json"))["split"] == "test"


def test_a_bucket_that_is_not_there_or_refuses(bucket, kind, flags):
    workdir = f"workdir={kind}://none/run"
    one_line(
        start(*flags, f"--{workdir}"), 4, f"{kind}://none/run", "there is no such bucket or file"
    )
    bucket.answer = DENIED
    process = start(*flags, f"--workdir={kind}://bucket/run")
    one_line(process, 4, f"{kind}://bucket/run", "cannot be read (")


def test_a_token_that_expires_while_the_run_trains(bucket, kind, flags, undisturbed):
    """One warning, then a line that names the local folder; with another token it goes on there."""
    address = f"{kind}://bucket/run"
    process = start(*flags, f"--workdir={address}", program=("-c", HURRIED))
    wait_until(lambda: BucketRun(address).markers(), process)
    bucket.answer = EXPIRED[kind]
    errors = one_line(process, 4, "cannot be ", "gave up after 3 tries; the run is in ")
    assert errors.count("it is tried again") == 1
    bucket.answer = None
    code, _, errors = finish(start(*flags, f"--workdir={address}"))
    assert code == 0, errors
    assert differences(bucket_run.local_copy(address, fresh=True), undisturbed) == []


def test_a_network_that_stalls(bucket, kind, flags):
    bucket.answer = b""
    process = start(*flags, f"--workdir={kind}://bucket/run", program=("-c", HURRIED))
    one_line(process, 4, f"workdir={kind}://bucket/run: cannot be read (")


def test_a_dataset_in_a_bucket(bucket, kind, tfds_dir, flags, tmp_path):
    fsspec.filesystem(kind).put(f"{tfds_dir}/", "bucket/tfds/", recursive=True)
    train = flags[0], flags[1], f"--data_dir={kind}://bucket/tfds", f"--workdir={tmp_path / 'run'}"
    code, _, errors = finish(start(*train, "--set", "epochs=1"))
    assert code == 0, errors
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(tmp_path / "run")
    bucket.answer = DENIED
    one_line(
        start(*train, CNN_JAX_CACHE_DIR=str(tmp_path / "new")), 3, f"data_dir={kind}://bucket/tfds"
    )
