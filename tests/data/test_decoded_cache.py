"""The decoded images kept between runs: whole, damaged, outdated, contested."""

import concurrent.futures
import io
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.data import decoded_cache

KEY = {"dataset": "pictures/small:1.0.0", "split": "train", "files": [["a", 3, 4]]}
NAMES = ("ant", "bee")
LIMIT = 10**9


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (50, 6, 4, 3), dtype=np.uint8)
    return image, random.integers(0, 2, 50).astype(np.int32)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CNN_JAX_CACHE", raising=False)
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def entry(cache_dir: Path) -> Path:
    """A whole file."""
    decoded_cache.write(KEY, *arrays(), NAMES)
    (file,) = cache_dir.iterdir()
    return file


def assert_is(found: dict | None, seed: int = 0) -> None:
    image, label = arrays(seed)
    assert found is not None
    assert found.keys() == {"image", "label", "class_names"}
    np.testing.assert_array_equal(found["image"], image)
    np.testing.assert_array_equal(found["label"], label)
    assert found["image"].dtype == np.uint8
    assert found["label"].dtype == np.int32
    assert found["class_names"] == NAMES


def test_what_was_written_is_read(entry: Path, caplog: pytest.LogCaptureFixture):
    assert_is(decoded_cache.read(KEY, LIMIT))
    assert decoded_cache.read(KEY | {"split": "test"}, LIMIT) is None
    assert_is(decoded_cache.read(KEY, LIMIT))
    assert caplog.messages == []


def test_changed_source_files_outdate_an_entry(entry: Path, caplog: pytest.LogCaptureFixture):
    changed = KEY | {"files": [["a", 3, 5]]}
    assert decoded_cache.read(changed, LIMIT) is None
    decoded_cache.write(changed, *arrays(1), NAMES)
    assert_is(decoded_cache.read(changed, LIMIT), 1)
    assert decoded_cache.read(KEY, LIMIT) is None
    assert caplog.messages == []
    assert list(entry.parent.iterdir()) == [entry]  # old versions do not pile up


def test_entry_beyond_the_memory_is_not_read(entry: Path):
    size = entry.stat().st_size
    assert decoded_cache.read(KEY, size - 1) is None
    assert_is(decoded_cache.read(KEY, size))


def replace_bytes(old: bytes, new: bytes):
    def spoil(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return spoil


def flip(place: int):
    def spoil(data: bytes) -> bytes:
        at = place % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return spoil


DAMAGE = {
    "a pixel": flip(-1000),
    "a label": flip(-4),
    "byte order of the labels": replace_bytes(b"<i4", b">i4"),
    "type of the labels": replace_bytes(b"<i4", b"<u4"),
    "shape": replace_bytes(b"50, 6, 4, 3", b"50, 4, 6, 3"),
    "huge shape": replace_bytes(b"(50, 6, 4, 3), }          ", b"(5000000000, 6, 4, 3), }  "),
    "broken header": replace_bytes(b"50, 6, 4, 3", b"50, (6\n4, 3"),
    "magic": flip(0),
    "class name": replace_bytes(b'["ant", "bee"]', b'["ant", "bed"]'),
    "checksum": replace_bytes(b'"sha256"', b'"sha257"'),
    "key": replace_bytes(b'"key"', b'"kez"'),
    "description": replace_bytes(b'{"key"', b'["key"'),
    "not text": replace_bytes(b'{"key"', b"\xff\xfe\xfd\xfc\xfb\xfa"),
    "half a file": lambda data: data[:2000],
    "no labels": lambda data: data[:-328],
    "empty file": lambda data: b"",
    "garbage": lambda data: bytes(range(256)) * 20,
    "deep description": lambda data: npy(np.frombuffer(b"[" * 100_000, np.uint8)),
}


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_repaired(entry: Path, kind: str, caplog: pytest.LogCaptureFixture):
    entry.write_bytes(DAMAGE[kind](entry.read_bytes()))
    assert decoded_cache.read(KEY, LIMIT) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith(f"warning: decoded images in {entry} are damaged (")
    assert message.endswith("): made again")
    assert "\n" not in message
    decoded_cache.write(KEY, *arrays(), NAMES)
    assert_is(decoded_cache.read(KEY, LIMIT))


def test_no_single_flipped_byte_goes_unnoticed(entry: Path):
    """In the headers, where each byte means something, and here and there in the rest."""
    whole, harmless = entry.read_bytes(), 0
    places = {*range(900), *range(len(whole) - 340, len(whole)), *range(0, len(whole), 50)}
    for place in places:
        entry.write_bytes(flip(place)(whole))
        found = decoded_cache.read(KEY, LIMIT)
        if found is not None:  # a space that pads a header, "=i4" for "<i4"
            assert_is(found)
            harmless += 1
    assert harmless < 150


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["object array", "bare pickle", "npz"])
def test_no_pickle_is_loaded(entry: Path, tmp_path: Path, form: str):
    target = tmp_path / "exploded"
    bomb = np.array([Bomb(target)], object)
    with open(entry, "wb") as file:
        if form == "object array":
            file.write(npy(bomb, allow_pickle=True))
        elif form == "bare pickle":
            pickle.dump(Bomb(target), file)
        else:
            np.savez(file, image=bomb, allow_pickle=True)
    assert decoded_cache.read(KEY, LIMIT) is None
    assert not target.exists()
    if form == "object array":
        np.load(entry, allow_pickle=True)
    assert target.exists() == (form == "object array")  # it would have gone off


def test_many_writers_and_readers(caplog: pytest.LogCaptureFixture, entry: Path):
    """Whoever reads while others write finds the whole of what one of them wrote."""
    first_pixels = [int(arrays(seed)[0][0, 0, 0, 0]) for seed in range(4)]
    assert len(set(first_pixels)) == 4

    def work(seed: int) -> None:
        for _ in range(20):
            decoded_cache.write(KEY, *arrays(seed), NAMES)
            found = decoded_cache.read(KEY, LIMIT)
            assert found is not None
            assert_is(found, first_pixels.index(found["image"][0, 0, 0, 0]))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert caplog.messages == []
    assert list(entry.parent.iterdir()) == [entry]  # nothing half-written is left


def test_cache_that_cannot_be_written_warns_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    # A file where a folder must be made: refused to every user, root included.
    (tmp_path / "file").touch()
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "file"))
    decoded_cache.write(KEY, *arrays(), NAMES)
    (message,) = caplog.messages
    assert message.startswith("warning: decoded images could not be kept in ")
    assert str(tmp_path / "file") in message
    assert decoded_cache.read(KEY, LIMIT) is None


def test_full_disk_leaves_nothing_behind(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def write_array(file, array: np.ndarray, allow_pickle: bool) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", write_array)
        decoded_cache.write(KEY, *arrays(), NAMES)
    assert "No space left on device" in caplog.text
    assert list(cache_dir.iterdir()) == []
    assert decoded_cache.read(KEY, LIMIT) is None


def test_cache_can_be_turned_off(cache_dir: Path, entry: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CNN_JAX_CACHE", "off")
    assert decoded_cache.read(KEY, LIMIT) is None
    entry.unlink()
    decoded_cache.write(KEY, *arrays(), NAMES)
    assert list(cache_dir.iterdir()) == []


def test_fingerprint(tmp_path: Path):
    (tmp_path / "b").mkdir()
    for name in ("b/two", "one"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(1, 2))
    assert decoded_cache.fingerprint(tmp_path) == [["b/two", 5, 2], ["one", 3, 2]]
    assert decoded_cache.fingerprint(tmp_path / "one") == [[".", 3, 2]]
    assert decoded_cache.fingerprint(tmp_path / "absent") == []
