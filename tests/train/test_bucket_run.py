"""A workdir in a bucket: fsspec's own bucket in memory, where each request is one operation."""

import contextlib
import json
import re
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest

from cnn_jax.analysis.restore import load_run
from cnn_jax.common.errors import CheckpointError, ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import bucket_run, lease, loop, mirror, pretrained
from cnn_jax.train.bucket_run import MARKER, BucketRun
from cnn_jax.train.checkpoint import Checkpoints, DamagedCheckpoint, verify
from cnn_jax.train.lease import Lease
from cnn_jax.train.mirror import Mirror
from cnn_jax.train.signals import StopSignals
from cnn_jax.train.workdir import metrics
from tests.networks import Linear

ADDRESS = "memory://bucket/run"
FILES = ("manifest/metadata", "variables/d/1", "variables/manifest.ocdbt")


class Killed(BaseException):
    """As kill -9: no code of ours may catch it."""


class Dying(BucketRun):
    """Ends at its operation number `left`; a write or deletion of several objects is several."""

    left = 10**6
    log: list

    def _count(self, what, name):
        if not self.left:
            raise Killed
        self.left -= 1
        self.log.append((what, name))

    def write(self, name, data, new=False):
        self._count("write", name)
        return super().write(name, data, new)

    def send(self, files):
        for name, path in files.items():
            self._count("write", name)
            super().send({name: path})

    def remove(self, names):
        for name in list(names):
            self._count("delete", name)
            super().remove([name])


class NoLease:
    lost = None

    def check(self):
        pass


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(folder, step, lines):
    for name in FILES:
        path = folder / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of step {step}, {time.monotonic()}")
    text = "".join(json.dumps({"step": s}) + "\n" for s in range(1, lines + 1))
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')  # the next line is being written
    (folder / "lock").write_text("process 1")
    (folder / ".metrics.jsonl.12").write_text("scratch")


def complete(bucket):
    """The steps with a marker; checks that all files of each are there and whole."""
    found = bucket.markers()
    for step, marker in found.items():
        assert {*marker.files} == {*FILES}
        for name in FILES:
            text = bucket.read(f"checkpoints/{step}/{name}").decode()
            assert text.startswith(f"{name} of step {step}, ")
    return sorted(found)


# ------------------------------------------------------------------------------------- mirror


def test_wherever_an_upload_dies_a_complete_checkpoint_and_its_lines_are_there(memory, tmp_path):
    """Step 2 replaces step 1, and a copy of step 3 that an earlier process left is removed."""
    operations = None
    for death in range(100):
        memory.store.clear()
        folder = tmp_path / f"run{death}"
        bucket = Dying(ADDRESS)
        bucket.log = []
        one = Mirror(bucket, folder, NoLease())
        save(folder, 1, lines=1)
        one.changed([1])
        one.copy()
        assert complete(bucket) == [1]
        memory.pipe("/bucket/run/checkpoints/3/variables/d/1", b"half")
        save(folder, 2, lines=2)
        shutil.rmtree(folder / "checkpoints" / "1")
        one.changed([2])
        bucket.log, bucket.left = [], death
        try:
            one.copy()
        except Killed:
            bucket.left = 10**6
            found = complete(bucket)
            assert found in ([1], [1, 2], [2])
            lines = bucket.read("metrics.jsonl").splitlines()
            assert len(lines) == len([json.loads(line) for line in lines]) >= found[-1]
            # The process that goes on, in the same folder.
            again = Mirror(bucket, folder, NoLease())
            again.changed([2])
            again._committed = {step: m.manifest for step, m in bucket.markers().items()}
            again.copy()
        else:
            operations = bucket.log
        assert complete(bucket) == [2]
        names = {f"checkpoints/2/{name}" for name in (*FILES, MARKER)} | {"metrics.jsonl"}
        assert {*bucket.names()} == names
        if operations:
            break
    assert death == len(operations) > 8
    written = [name for what, name in operations if what == "write"]
    assert written[-1] == f"checkpoints/2/{MARKER}"
    deleted = [name for what, name in operations if what == "delete"]
    assert deleted[0] == f"checkpoints/1/{MARKER}"
    assert operations.index(("write", written[-1])) < operations.index(("delete", deleted[0]))


def test_a_checkpoint_that_is_deleted_during_its_upload_still_arrives(memory, tmp_path):
    """A slow bucket: the run has deleted each checkpoint before its copy is there."""

    class Slow(BucketRun):
        def send(self, files):
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            super().send(files)

    bucket = Slow(ADDRESS)
    save(tmp_path, 1, lines=1)
    one = Mirror(bucket, tmp_path, NoLease())
    one.changed([1])
    one.copy()
    assert complete(bucket) == [1]
    one.changed([5])  # deleted before its copy began
    one.copy()
    assert complete(bucket) == [1]
    assert not [*tmp_path.glob(".sending*")]


def test_a_checkpoint_that_is_saved_anew_replaces_that_of_its_step(memory, tmp_path):
    bucket = BucketRun(ADDRESS)
    one = Mirror(bucket, tmp_path, NoLease())
    one.changed([1])
    for _ in range(2):
        save(tmp_path, 1, lines=1)
        one.copy()
        manifest = (tmp_path / "checkpoints" / "1" / FILES[0]).read_bytes()
        assert bucket.read(f"checkpoints/1/{FILES[0]}") == manifest


# -------------------------------------------------------------------------------------- lease


def test_a_lease_refuses_others_until_it_runs_out_or_is_given_back(memory, monkeypatch):
    bucket = BucketRun(ADDRESS)
    first = Lease(bucket, "one")
    first.write(120.0)
    line = r"workdir=memory://bucket/run: in use by process \d+ on .*, whose lease ends at 20.* UTC"
    with pytest.raises(CheckpointError, match=line):
        Lease(bucket, "two")
    assert lease.is_held(bucket)
    Lease(bucket, "one").write(120.0)  # a new process in the same folder: the first is dead
    with pytest.raises(CheckpointError, match="has taken the run over, as this process did not"):
        first.write(120.0)
    with pytest.raises(CheckpointError, match="has taken the run over"):
        first.check()
    late = time.time() + 121
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: late)
        third = Lease(bucket, "three")
        third.write(120.0)
        assert third.run == first.run
        third.write(0.0)
    assert len(bucket.names("lock")) == 1  # no others are left
    monkeypatch.setattr(time, "time", lambda: late + 1)
    assert not lease.is_held(bucket)
    Lease(bucket, "four").write(120.0)


def test_of_many_that_find_a_lease_run_out_one_gets_it(memory):
    bucket = BucketRun(ADDRESS)
    Lease(bucket, "dead").write(0.0)
    many = [Lease(bucket, str(i)) for i in range(8)]
    got, start = [], threading.Barrier(8)

    def take(one):
        start.wait()
        try:
            one.write(120.0)
        except CheckpointError:
            return
        got.append(one)

    threads = [threading.Thread(target=take, args=[one]) for one in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_a_process_that_stood_still_does_not_get_its_lease_back(memory, monkeypatch):
    """Its number was used by others and deleted since."""
    bucket = BucketRun(ADDRESS)
    slept = Lease(bucket, "slept")
    slept.write(0.0)
    other = Lease(bucket, "other")
    other.write(120.0)
    other.write(120.0)
    assert bucket.names("lock") == ["lock/00000003"]
    with pytest.raises(CheckpointError, match="has taken the run over"):
        slept.write(120.0)
    other.write(120.0)


def test_an_answer_that_was_lost_does_not_lose_the_lease(memory, monkeypatch):
    """The package sends the write again, and the bucket refuses it, as it came through before."""

    class Twice(BucketRun):
        def write(self, name, data, new=False):
            super().write(name, data, new)
            return super().write(name, data, new)

    one = Lease(Twice(ADDRESS), "one")
    one.write(120.0)
    one.write(120.0)
    one.check()


# --------------------------------------------------------------------------------- whole runs


def make_config(**fields):
    data = DataConfig("tiny", validation_examples=0)
    some = {"epochs": 2, "batch_size": 32, "eval_batch_size": 48, "checkpoint_every_steps": 3}
    return Config(Linear(), data, keep_checkpoints=3, devices=1, **some | fields)


@pytest.fixture(scope="module")
def finished(splits, tmp_path_factory):
    """The objects of a run of two epochs of five steps, at memory://bucket/run."""
    system = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path_factory.mktemp("finished")))
        loop.train(make_config(), ADDRESS, splits=splits)
    objects = {path: system.cat_file(path) for path in system.store}
    system.store.clear()
    return objects


def assert_same(folder, other):
    one, two = Checkpoints(folder).newest(), Checkpoints(other).newest()
    assert one.step == two.step == 10
    assert {k: v.tobytes() for k, v in one.arrays.items()} == {
        k: v.tobytes() for k, v in two.arrays.items()
    }
    times = "epoch_seconds", "images_per_second"
    lines = [
        [{k: v for k, v in x.items() if k not in times} for x in metrics(f)]
        for f in (folder, other)
    ]
    assert lines[0] == lines[1]


def another_machine(monkeypatch, tmp_path, name="elsewhere"):
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / name))
    bucket_run._copies.clear()


def test_a_run_goes_on_on_another_machine(memory, splits, finished, tmp_path, monkeypatch, caplog):
    loop.train(make_config(schedule="constant", epochs=1), ADDRESS, splits=splits)
    bucket = BucketRun(ADDRESS)
    assert sorted(bucket.markers()) == [3, 5]
    another_machine(monkeypatch, tmp_path)
    # Its newest checkpoint is damaged: the run goes on from the one before.
    name = bucket.names("checkpoints/5/variables/d")[0]
    bucket.write(name, bytes(b ^ 255 for b in bucket.read(name)))
    lines = loop.train(make_config(schedule="constant"), ADDRESS, splits=splits)
    assert f"skipped {ADDRESS}/checkpoints/5: damaged (" in caplog.text
    assert [line["epoch"] for line in lines] == [1, 2]
    assert sorted(bucket.markers()) == [6, 9, 10]
    assert verify(bucket_run.local_copy(ADDRESS, fresh=True)) == 0
    memory.pipe({path.replace("/run/", "/whole/"): data for path, data in finished.items()})
    assert_same(*map(bucket_run.local_copy, (ADDRESS, "memory://bucket/whole")))


def test_a_reader_copies_what_it_needs(memory, finished, capsys, caplog):
    memory.pipe(finished)
    with bucket_run.copied([ADDRESS]) as (folder,):
        run = load_run(folder, "6", model=Linear())
        assert run.step == 6
        assert {p.parts[-2] for p in folder.glob("checkpoints/*/variables")} == {"6"}
        assert not [*folder.glob("checkpoints/*/training")]
        (folder / "evaluation.json").write_text("{}")
    bucket = BucketRun(ADDRESS)
    assert bucket.read("evaluation.json") == b"{}"
    found = pretrained.find(f"{ADDRESS}:6")
    assert (found.path, found.step, pretrained.find(ADDRESS).step) == (ADDRESS, 6, 10)
    assert {"params/Dense_0/bias", "params/Dense_0/kernel"} == {*found.arrays()}
    # What is deleted and damaged in the bucket.
    bucket.remove(bucket.names("checkpoints/6"))
    bucket.remove(bucket.names("checkpoints/10/training/d")[:1])
    evil = bucket_run.Marker("", ["../../../evil"]).text()
    bucket.write("checkpoints/11/committed.json", evil)
    assert verify(bucket_run.local_copy(ADDRESS, fresh=True)) == 4
    printed = capsys.readouterr().out
    assert "step        9  valid" in printed
    assert "step       10  damaged (" in printed
    assert f"skipped {ADDRESS}/checkpoints/11/committed.json: damaged" in caplog.text
    with pytest.raises(DamagedCheckpoint, match=f"{ADDRESS}/checkpoints/10: damaged"):
        Checkpoints(folder).read(10)
    bucket.remove(bucket.names("checkpoints/10"))
    shutil.rmtree(folder / "checkpoints" / "10" / "variables")
    with pytest.raises(CheckpointError, match="was deleted while it was read; run the command"):
        Checkpoints(folder).read(10)
    for address in ("ftp://host/run", "gs://", "s3:///run"):
        with pytest.raises(ConfigError, match=f"workdir={address}: must be a folder, gs://BUCKET/"):
            bucket_run.local_copy(address)
    with pytest.raises(
        CheckpointError, match=r"workdir=memory://bucket/none: holds no config\.json"
    ):
        bucket_run.local_copy("memory://bucket/none")


@contextlib.contextmanager
def attached():
    """A run without training: its local folder, the check of its lock, and what it tells the mirror."""
    folder = mirror.folder_of(ADDRESS)
    folder.mkdir(parents=True, exist_ok=True)
    with mirror.attached(ADDRESS, folder, lambda: None, StopSignals()) as (check, changed):
        yield folder, check, changed


def test_another_run_at_the_address_is_not_mixed_with_an_old_copy(memory, caplog):
    with attached() as (folder, _, changed):
        save(folder, 1, lines=1)
        (folder / "config.json").write_text("{}")
        changed([1])
    with attached() as (folder, _, _):
        assert Checkpoints(folder).steps() == [1]
    memory.rm("/bucket/run", recursive=True)
    with attached() as (folder, _, _):
        assert {path.name for path in folder.iterdir()} == {"lock", ".lease.json", "checkpoints"}
        assert Checkpoints(folder).steps() == []
    line = "the local copy of an earlier run at this address is now (.*)"
    (aside,) = re.findall(line, caplog.text)
    assert (Path(aside) / "checkpoints" / "1").is_dir()
    BucketRun(ADDRESS).write("config.json", b"{}")
    memory.rm("/bucket/run/lock", recursive=True)
    line = r"holds config\.json, but no run that began there; choose another one"
    with pytest.raises(CheckpointError, match=line), attached():
        pass


def test_a_bucket_that_fails_leaves_the_run_in_its_folder(memory, monkeypatch, caplog):
    intact = BucketRun.write

    def write(bucket, name, data, new=False):
        if name.startswith("checkpoints/"):
            raise CheckpointError(f"{bucket.address}/{name}: cannot be written (no)")
        return intact(bucket, name, data, new)

    monkeypatch.setattr(mirror, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(BucketRun, "write", write)
    line = (
        r"cannot be written \(no\); gave up after 3 tries; the run is in (.*), and the same command"
    )

    def run(fails: bool) -> None:
        with attached() as (folder, _, changed):
            save(folder, 1, lines=1)
            changed([1])
            if fails:
                raise ZeroDivisionError

    with pytest.raises(CheckpointError, match=line) as caught:
        run(fails=False)
    assert re.search(line, str(caught.value))[1] == str(mirror.folder_of(ADDRESS))
    with pytest.raises(ZeroDivisionError):  # not hidden by the other error
        run(fails=True)
    assert "gave up after 3 tries" in caplog.text
    assert not BucketRun(ADDRESS).markers()
    monkeypatch.setattr(BucketRun, "write", intact)
    with attached() as (_, _, changed):
        changed([1])
    assert complete(BucketRun(ADDRESS)) == [1]


def test_a_run_that_loses_its_lease_ends_and_copies_nothing_more(memory, monkeypatch):
    held, taken = lease.held, []
    monkeypatch.setattr(lease, "held", lambda one: taken.append(one) or held(one))
    bucket = BucketRun(ADDRESS)
    line = "process 7 on other has taken the run over"

    def run() -> None:
        with attached() as (folder, check, changed):
            check()
            number, now = lease.last(bucket)
            stolen = now | {"holder": "x", "owner": "process 7 on other"}
            bucket.write(f"lock/{number + 1:08d}", json.dumps(stolen).encode())
            with pytest.raises(CheckpointError, match=line):
                taken[0].write(120.0)  # as it renews it
            save(folder, 1, lines=1)
            changed([1])
            check()

    with pytest.raises(CheckpointError, match=line):
        run()
    assert not bucket.markers()
