"""Examples that worker processes decode, against the same examples in memory."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax.common import memory
from cnn_jax.common.errors import DataError
from cnn_jax.config import DataConfig
from cnn_jax.data import loader, workers
from cnn_jax.data.examples import InMemory, OnDemand, chunks, in_order, with_classes
from cnn_jax.data.records import changed
from cnn_jax.data.sources import load_examples
from tests.tiny import REPOSITORY, make_examples


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays():
    yield
    for count in (1, 2):
        workers._pool(count).close()
    workers._pool.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """48 images in the folders of ten classes."""
    root = tmp_path_factory.mktemp("squares")
    examples = make_examples(48)
    for i, (image, label) in enumerate(zip(examples.image, examples.label, strict=True)):
        file = root / "train" / "abcdefghij"[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    return root


def streamed(name: str, data_dir: object = None, workers: int = 1, **fields) -> OnDemand:
    data = DataConfig(name, streaming=True, workers=workers, **fields)
    return load_examples(data, "train", str(data_dir))


def assert_same(found, wanted):
    for one, two in itertools.zip_longest(found, wanted):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("part_bytes", [1, 784 * 5, 10**9])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("kind", ["records", "files"])
def test_they_give_what_memory_gives(kind, count, part_bytes, tfds_dir, folder, monkeypatch):
    monkeypatch.setattr(workers, "PART_BYTES", part_bytes)
    name = "tiny_squares" if kind == "records" else str(folder)
    fields = {"train_split": "train[3:37]"}
    memory = load_examples(DataConfig(name, **fields), "train", str(tfds_dir))
    demand = streamed(name, tfds_dir, count, **fields)
    assert (type(memory), type(demand)) == (InMemory, OnDemand)
    order = loader.epoch_order(3, 1, len(memory))
    reordered = tuple(reversed("abcdefghij"))
    for change in (
        lambda x: x,
        lambda x: x.take(np.array([5, 0, 5, 33, 2])),
        lambda x: with_classes(x, reordered),
    ):
        one, two = change(memory), change(demand)
        own = order[: len(one)] % len(one)
        for start in (0, 2):
            wanted = loader.training_batches(one, own, 8 if len(one) > 8 else 2, start, 7)
            found = loader.training_batches(two, own, 8 if len(one) > 8 else 2, start, 7)
            assert_same(found, wanted)
        assert_same(loader.evaluation_batches(two, 16), loader.evaluation_batches(one, 16))
        assert_same(chunks(two), chunks(one))


def test_they_read_a_data_dir_of_any_name(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / "[2024] data")
    wanted = load_examples(DataConfig("tiny_squares"), "train", str(tfds_dir))
    found = streamed("tiny_squares", tmp_path / "[2024] data")
    assert_same(chunks(found), chunks(wanted))


def test_few_parts_wait_in_memory(tfds_dir, monkeypatch):
    monkeypatch.setattr(workers, "PART_IMAGES", 1)
    taken = []

    def batches():
        for i in range(160):
            taken.append(i)
            yield np.array([i])

    coming = in_order(streamed("tiny_squares", tfds_dir), batches())
    for _ in range(10):
        next(coming)
    assert 10 <= len(taken) <= 10 + workers.PARTS_AHEAD
    coming.close()


# ------------------------------------------------------------------------------- what goes wrong


def test_one_that_dies_is_one_line_and_is_replaced(tfds_dir, monkeypatch):
    monkeypatch.setattr(workers, "PART_IMAGES", 4)
    examples = streamed("tiny_squares", tfds_dir)
    order = np.arange(len(examples))
    batches = loader.training_batches(examples, order, 4)
    next(batches)
    (process,) = workers._pool(1)._processes
    process.kill()
    with pytest.raises(DataError) as caught:
        list(batches)
    text = f"data.workers=1: the worker process {process.pid} was ended by SIGKILL; run the same"
    assert str(caught.value).startswith(text)
    assert len(list(loader.training_batches(examples, order, 4))) == 40


def rewrite(file: Path) -> None:
    stamp = file.stat().st_mtime_ns
    os.utime(file, ns=(stamp, stamp + 1))


CHANGES = {
    "its file was written again since the run began": rewrite,
    "its file is gone since the run began": Path.unlink,
    "bytes since the run began": lambda file: file.write_bytes(file.read_bytes() + b"0"),
}


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_changes_during_a_run_is_named(what, count, tfds_dir, folder, tmp_path):
    files = shutil.copytree(folder, tmp_path / "files")
    shutil.copytree(tfds_dir, tmp_path / "records")
    (shard,) = (tmp_path / "records").rglob("*train.array_record*")
    examples = streamed(str(files), workers=count)
    file = files / examples.files[7]
    records = streamed("tiny_squares", tmp_path / "records", count)
    for place, path, split in (
        (f"{file}: ", file, examples),
        (f"{shard}: record 4", shard, records),
    ):
        CHANGES[what](path)
        with pytest.raises(DataError) as caught:
            list(in_order(split, [np.arange(4, 8)]))
        assert str(caught.value).startswith(place)
        assert what in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_was_missing_for_a_moment_was_written_again():
    error = changed("a.png", now=(5, 1), before=None)
    assert str(error).startswith("a.png: its file was written again since the run began")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["records", "files"])
def test_so_many_corrupt_images_may_be_left_out(
    kind, streaming, tfds_dir, folder, tmp_path, caplog
):
    shutil.copytree(tfds_dir, tmp_path / "records")
    shutil.copytree(folder, tmp_path / "files")
    name = "tiny_squares" if kind == "records" else str(tmp_path / "files")
    whole = load_examples(DataConfig(name), "train", str(tmp_path / "records"))
    if kind == "records":
        (broken,) = (tmp_path / "records").rglob("*train.array_record*")
        content = bytearray(broken.read_bytes())
        content[content.index(b"PNG")] ^= 1  # the first record's, as each has a checksum
        broken.write_bytes(content)
        place = f"{broken}: record 0: damaged ("
    else:
        broken = tmp_path / "files" / whole.files[0]
        broken.write_bytes(b"no image")
        place = f"{broken}: cannot be read ("
    fields, data_dir = {"streaming": streaming, "workers": 1}, str(tmp_path / "records")
    for skip in ("all", 1, 2):
        caplog.clear()
        data = DataConfig(name, skip_corrupt=skip, **fields)
        examples = load_examples(data, "train", data_dir)
        assert (len(examples), examples.skipped) == (len(whole) - 1, 1)
        assert f"1 broken images are left out; the first: {place}" in caplog.text
        assert_same(chunks(examples), chunks(whole.take(np.arange(1, len(whole)))))
    with pytest.raises(DataError) as caught:
        next(chunks(load_examples(DataConfig(name, **fields), "train", data_dir)))
    assert str(caught.value).startswith(place)


KILLED = """
import os, signal, sys
import numpy as np
from cnn_jax.config import DataConfig
from cnn_jax.data import sources, workers
from cnn_jax.data.examples import in_order
data = DataConfig("tiny_squares", streaming=True, workers=2)
examples = sources.load_examples(data, "train", sys.argv[1])
for _ in in_order(examples, [np.arange(80)] * 9):
    pass
print(*(process.pid for process in workers._pool(2)._processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_none_outlives_a_program_that_is_killed(tfds_dir):
    command = [sys.executable, "-c", KILLED, str(tfds_dir)]  # and no `if __name__ == "__main__"`
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2
    for pid in map(int, done.stdout.split()):
        give_up = time.monotonic() + 60
        while is_running(pid) and time.monotonic() < give_up:
            pass
        assert not is_running(pid)


# --------------------------------------------------------------------------------------- memory


def peak_growth(work) -> int:
    """The bytes by which `work` raises the memory of this process at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory._fields(Path("/proc/self/status"))["VmRSS"]
    work()
    return (memory._fields(Path("/proc/self/status"))["VmHWM"] - before) * 1024


def test_memory_does_not_grow_with_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PART_BYTES", 1_000_000)  # five of them at the most
    side, count, limit = 256, 1100, 20_000_000
    first = tmp_path / "train/a/0.png"
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
    Image.new("RGB", (side, side), "red").save(first)
    for i in range(1, count):
        os.link(first, tmp_path / f"train/{'ab'[i % 2]}/{i}.png")
    assert count * side * side * 3 > 10 * limit
    examples = streamed(str(tmp_path), train_split="all")

    def read():
        for _ in loader.training_batches(examples, np.arange(count), 4):
            pass

    batches = loader.training_batches(examples, np.arange(8), 4)
    next(batches)  # starts the worker
    assert peak_growth(read) < limit


@pytest.mark.parametrize(("streaming", "kind"), [("auto", OnDemand), (False, InMemory)])
def test_what_does_not_fit_in_half_of_the_memory_is_streamed(
    streaming, kind, tfds_dir, monkeypatch
):
    data = DataConfig("tiny_squares", streaming=streaming)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 160 * 784 - 1)
    assert type(load_examples(data, "train", str(tfds_dir))) is kind
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    assert type(load_examples(data, "train", str(tfds_dir))) is InMemory


def test_available_memory(tmp_path, monkeypatch):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.01 * total < memory._machine() < total
    for file, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 600\ninactive_file 50\n",
    }.items():
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 350
    (tmp_path / "memory.max").write_text("max")
    assert memory.available_bytes() > 1000
