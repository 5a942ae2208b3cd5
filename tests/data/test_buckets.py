"""A data_dir in a bucket: fsspec's own one in memory, and an emulator of Google's storage."""

import socket

import fsspec
import numpy as np
import pytest

from cnn_jax.common import remote
from cnn_jax.common.errors import DataError
from cnn_jax.config import DataConfig
from cnn_jax.data import buckets, sources
from cnn_jax.data.sources import load_examples

PLACE = "tfds/tiny_squares/1.0.0/"


def another_process():
    buckets.opened.cache_clear()
    buckets._opened.clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "[my] cache"))
    another_process()
    yield tmp_path / "[my] cache"
    another_process()


@pytest.fixture
def bucket(tfds_dir):
    """A bucket with the dataset, `memory://bucket/tfds`."""
    system = fsspec.filesystem("memory")
    system.put(f"{tfds_dir}/", "/bucket/tfds/", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def load(split: str = "test", data_dir: str = "memory://bucket/tfds", **fields):
    return load_examples(DataConfig("tiny_squares", **fields), split, data_dir)


def refused(data_dir: str = "memory://bucket/tfds") -> str:
    with pytest.raises(DataError) as caught:
        load(data_dir=data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(caplog) -> list[str]:
    found = [text for text in caplog.messages if text.startswith("copying")]
    caplog.clear()
    return found


def test_what_is_needed_is_copied_once(bucket, cache, tfds_dir, caplog):
    caplog.set_level("INFO")
    for process in range(2):
        for fields in ({}, {"streaming": True, "workers": 0}):
            found, wanted = load(**fields), load(data_dir=str(tfds_dir))
            everything = np.arange(len(wanted))
            for name, array in found[everything].items():
                np.testing.assert_array_equal(array, wanted[everything][name])
        assert len(copied(caplog)) == (2 if process == 0 else 0)  # its description, a shard
        another_process()
    (folder,) = cache.glob("buckets/*")
    assert [path.name for path in folder.rglob("*array_record*")] == [
        "tiny_squares-test.array_record-00000-of-00001"
    ]
    assert sources.image_shape(DataConfig("tiny_squares"), "memory://bucket/tfds/") == (28, 28, 1)


def test_what_has_changed_in_the_bucket_is_copied_again(bucket, cache, tmp_path, caplog):
    caplog.set_level("INFO")
    (shard,) = bucket.glob(f"/bucket/{PLACE}*test.array_record*")
    before = load()
    bucket.pipe(shard, bucket.cat(shard)[:70_000])
    another_process()
    copied(caplog)
    assert "tiny_squares-test.array_record-00000-of-00001: " in refused()
    assert "damaged (" in refused()
    assert copied(caplog)
    assert len(before) == 48


def test_what_is_not_there_is_one_line(bucket, cache, monkeypatch):
    (shard,) = bucket.glob(f"/bucket/{PLACE}*test.array_record*")
    start = (
        "data_dir=memory://bucket/none: holds no dataset tiny_squares, or is no folder of a bucket"
    )
    assert refused("memory://bucket/none").startswith(start)
    bucket.rm(shard)
    assert "tiny_squares-test.array_record-00000-of-00001: no such file" in refused()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ImportError("x"),
            "data_dir=gs://a/b: needs gcsfs, which is missing; ./launch.sh setup --with=gcs adds it",
        ),
        (PermissionError("403:\n no"), "data_dir=gs://a/b: cannot be read (403: no)"),
        (FileNotFoundError("a"), "data_dir=gs://a/b: there is no such bucket or file"),
    ],
)
def test_what_a_bucket_answers_is_one_line(cache, monkeypatch, error, line):
    def refuses(address):
        raise error

    monkeypatch.setattr(remote, "opened", refuses)
    assert refused("gs://a/b/").startswith(line)


def test_a_copy_that_breaks_off_leaves_nothing(bucket, cache, monkeypatch):
    def get_file(place, path):
        with open(path, "wb") as file:
            file.write(b"{")

    monkeypatch.setattr(bucket, "get_file", get_file, raising=False)
    assert ": 1 of " in refused()
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.buckets
def test_googles_storage(cache, tfds_dir, monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as in buckets.py
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.create_server(("127.0.0.1", 0)) as free:  # the emulator must know its port
        port = free.getsockname()[1]
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        fsspec.filesystem("gs").put(f"{tfds_dir}/", "bucket/tfds/", recursive=True)
        found, wanted = load(data_dir="gs://bucket/tfds"), load(data_dir=str(tfds_dir))
        np.testing.assert_array_equal(found.image, wanted.image)
        assert refused("gs://bucket/none").startswith("data_dir=gs://bucket/none: holds no dataset")
        assert (
            refused("gs://none/tfds") == "data_dir=gs://none/tfds: there is no such bucket or file"
        )
    finally:
        running.stop()
