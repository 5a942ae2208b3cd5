"""TFDS datasets on disk, whole and damaged, against the arrays they were made from."""

import http.server
import io
import json
import logging
import os
import shutil
import socket
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from cnn_jax.common import cpu, decode
from cnn_jax.common.errors import DataError
from cnn_jax.config import DataConfig
from cnn_jax.data import download, sources, tfds_builder
from cnn_jax.data.examples import InMemory, OnDemand
from cnn_jax.data.sources import load_examples
from cnn_jax.data.tfds_records import Records, silent_stderr
from tests.tiny import make_examples, png_file, run_command, run_python

NAMES = ("ant", "bee", "cat")


def encode(array: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, format, **options)
    return file.getvalue()


def noise(count: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_dataset(
    folder: Path, records: list[dict], features: dict, shards: int = 1, keys: tuple | None = None
) -> Path:
    """Prepares a dataset named pictures with one split, train; returns the folder of its files."""

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=keys,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return enumerate(records)

    with tfds_builder.quiet():
        builder = Pictures(data_dir=str(folder), file_format="array_record")
        config = tfds.download.DownloadConfig(num_shards=shards)
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def write_pictures(
    folder: Path,
    images: list[bytes],
    shape: tuple = (8, 6, 1),
    shards: int = 1,
    names: tuple[str, ...] = NAMES,
) -> Path:
    """`pictures` of these images, labelled 0, 1, 2, 0, ... in their order.

    TFDS shuffles what it prepares; the records are put back into order afterwards.
    """
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=names),
    }
    labels = [i % len(names) for i in range(len(images))]
    records = [{"image": io.BytesIO(x), "label": k} for x, k in zip(images, labels, strict=True)]
    files = write_dataset(folder, records, features, shards, ("image", "label"))
    start = 0
    for shard in shard_files(files):
        count = len(read_shard(shard))
        chosen = range(start, start + count)
        write_shard(shard, [example(images[i], labels[i]) for i in chosen])
        start += count
    return files


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.array_record-*"))


def read_shard(path: Path) -> list[bytes]:
    return ArrayRecordReader(str(path)).read_all()


def write_shard(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(image: bytes, label: int) -> bytes:
    record = tf_example_pb2.Example()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def refusal(data: DataConfig | str, folder: Path, split: str = "train", **options) -> str:
    """The one line of the error of `load_examples`."""
    data = DataConfig(data) if isinstance(data, str) else data
    with pytest.raises(DataError) as caught:
        load_examples(data, split, str(folder), **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def decodings(caplog: pytest.LogCaptureFixture) -> int:
    count = sum(message.startswith("decoding ") for message in caplog.messages)
    caplog.clear()
    return count


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    return noise(30, (8, 6, 1))


@pytest.fixture(scope="session")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory, pictures: np.ndarray) -> Path:
    """A data_dir with 30 grayscale images of 8x6 in two shards."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, [encode(image) for image in pictures], shards=2)
    return folder


@pytest.fixture
def damaged_dir(tmp_path: Path, pictures_dir: Path) -> Path:
    """A copy of `pictures_dir` to spoil."""
    return shutil.copytree(pictures_dir, tmp_path / "damaged")


def second_shard(folder: Path) -> Path:
    return shard_files(folder / "pictures" / "1.0.0")[1]


# ------------------------------------------------------------------------------- whole data


def test_examples_are_those_that_were_prepared(tfds_dir: Path):
    data = DataConfig("tiny_squares")
    for split, count, seed in (("train", 160, 0), ("test", 48, 1)):
        examples = load_examples(data, split, str(tfds_dir))
        truth = make_examples(count, seed=seed)
        assert examples.class_names == tuple("abcdefghij")
        assert examples.image_shape == (28, 28, 1)
        assert len(examples) == count
        # TFDS shuffles once, when it prepares.
        loaded = sorted(zip(map(bytes, examples.image), examples.label, strict=True))
        assert loaded == sorted(zip(map(bytes, truth.image), truth.label, strict=True))


def test_order_is_that_of_the_files(pictures_dir: Path, pictures: np.ndarray):
    examples = load_examples(DataConfig("pictures"), "train", str(pictures_dir))
    np.testing.assert_array_equal(examples.image, pictures)
    np.testing.assert_array_equal(examples.label, np.arange(30) % 3)
    assert examples.image.dtype == np.uint8
    assert examples.label.dtype == np.int32


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("train[:4]", range(4)),
        ("train[13:17]", range(13, 17)),  # over the border between the shards
        ("train[50%:]", range(15, 30)),
        ("train[28:]+train[:2]", [28, 29, 0, 1]),
    ],
)
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_slices(
    pictures_dir: Path, pictures: np.ndarray, split: str, places: list, memory_bytes: int | None
):
    data = DataConfig("pictures")
    examples = load_examples(data, split, str(pictures_dir), memory_bytes=memory_bytes)
    found = examples[np.arange(len(examples))]
    np.testing.assert_array_equal(found["image"], pictures[list(places)])
    np.testing.assert_array_equal(found["label"], np.array(places) % 3)


def test_on_demand_gives_what_memory_gives(pictures_dir: Path):
    data = DataConfig("pictures", validation_examples=10)
    for split in ("train", "validation"):
        memory = load_examples(data, split, str(pictures_dir))
        demand = load_examples(data, split, str(pictures_dir), memory_bytes=30 * 48 - 1)
        assert isinstance(memory, InMemory)
        assert isinstance(demand, OnDemand)
        assert len(demand) == len(memory)
        assert demand.image_shape == memory.image_shape == (8, 6, 1)
        assert demand.class_names == memory.class_names == NAMES
        some = np.array([7, 0, 7, 3])
        twice = np.array([3, 1, 1])
        for a, b in (
            (memory[some], demand[some]),
            (memory[np.arange(0)], demand[np.arange(0)]),
            (memory.take(some)[twice], demand.take(some)[twice]),
        ):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
                assert a[name].dtype == b[name].dtype


def test_large_images_are_decoded_by_threads_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = noise(8, (120, 100, 3))
    write_pictures(tmp_path, [encode(image) for image in images], (120, 100, 3))
    together = threading.Barrier(2, timeout=60)
    decode = Records._decode_image

    def decode_together(self, encoded: bytes) -> np.ndarray:
        together.wait()  # for ever, if there is one thread
        return decode(self, encoded)

    monkeypatch.setattr(cpu, "cores", lambda: 2)
    monkeypatch.setattr(Records, "_decode_image", decode_together)
    memory = load_examples(DataConfig("pictures"), "train", str(tmp_path))
    np.testing.assert_array_equal(memory.image, images)
    demand = load_examples(DataConfig("pictures"), "train", str(tmp_path), memory_bytes=0)
    order = np.array([7, 2, 5, 0])
    np.testing.assert_array_equal(demand[order]["image"], images[order])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(tmp_path: Path, channels: int):
    images = noise(4, (8, 6, channels))
    write_pictures(tmp_path, [encode(image) for image in images], (8, 6, channels))
    examples = load_examples(DataConfig("pictures"), "train", str(tmp_path))
    np.testing.assert_array_equal(examples.image, images)


def test_images_of_several_sizes_are_resized(tmp_path: Path):
    colors = [(10, 20, 30), (200, 100, 50), (0, 255, 128)]
    sizes = [(5, 9), (32, 16), (8, 8)]
    images = [np.full((*s, 3), c, np.uint8) for s, c in zip(sizes, colors, strict=True)]
    write_pictures(tmp_path, [encode(image) for image in images], (None, None, 3))
    line = refusal("pictures", tmp_path)
    assert line.startswith("data.name=pictures: its images differ in size")
    assert "data.image_size=64,64" in line
    data = DataConfig("pictures", image_size=(8, 4))
    image = load_examples(data, "train", str(tmp_path)).image
    expected = np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (3, 8, 4, 3))
    np.testing.assert_array_equal(image, expected)
    assert sources.image_shape(data, str(tmp_path)) == (8, 4, 3)


def test_resizing_averages(tmp_path: Path):
    halves = np.zeros((4, 8, 1), np.uint8)
    halves[:, 4:] = 200
    write_pictures(tmp_path, [encode(halves)], (4, 8, 1))
    data = DataConfig("pictures", image_size=(2, 2))
    image = load_examples(data, "train", str(tmp_path)).image
    assert image.shape == (1, 2, 2, 1)
    assert np.all(image[:, :, 0] < 50)
    assert np.all(image[:, :, 1] > 150)


def test_class_without_examples_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_pictures(tmp_path, [encode(image) for image in noise(2, (8, 6, 1))])
    load_examples(DataConfig("pictures"), "train", str(tmp_path))
    assert "warning: pictures/train has no example of: cat" in caplog.messages


def test_stderr_is_silent_only_while_tensorflow_loads(capfd: pytest.CaptureFixture):
    with silent_stderr():
        os.write(2, b"noise of a library")
    os.write(2, b"an error")
    assert capfd.readouterr().err == "an error"


# -------------------------------------------------------------------------------- validation


def test_validation_is_fixed_disjoint_and_complete(pictures_dir: Path, pictures: np.ndarray):
    data = DataConfig("pictures", validation_examples=7)
    train = load_examples(data, "train", str(pictures_dir))
    validation = load_examples(data, "validation", str(pictures_dir))
    assert (len(train), len(validation)) == (23, 7)
    together = sorted(map(bytes, [*train.image, *validation.image]))
    assert together == sorted(map(bytes, pictures))
    again = load_examples(data, "validation", str(pictures_dir))
    np.testing.assert_array_equal(again.image, validation.image)
    # Chosen at random, not the last or the first ones.
    places = [int(np.flatnonzero((pictures == x).all((1, 2, 3)))[0]) for x in validation.image]
    assert places not in (list(range(7)), list(range(23, 30)))
    assert len(load_examples(data, "train[0%:]", str(pictures_dir))) == 30


def test_validation_does_not_depend_on_the_runs_seed():
    # The seed is no part of DataConfig; these figures would change with the way it is drawn.
    kept, held_out = sources._hold_out(DataConfig("any", validation_examples=3), 10)
    assert held_out.tolist() == [2, 4, 6]
    assert kept.tolist() == [0, 1, 3, 5, 7, 8, 9]


@pytest.mark.parametrize("count", [30, 31])
def test_validation_must_leave_something_to_train_on(pictures_dir: Path, count: int):
    data = DataConfig("pictures", validation_examples=count)
    for split in ("train", "validation"):
        line = refusal(data, pictures_dir, split)
        assert f"data.validation_examples={count}: must be less than the 30" in line


def test_no_validation_split(pictures_dir: Path):
    assert "data.validation_examples=0" in refusal("pictures", pictures_dir, "validation")


# ---------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("spoil", ["flip", "truncate", "empty", "garbage"])
def test_damaged_shard_is_named(damaged_dir: Path, spoil: str, memory_bytes: int | None):
    shard = second_shard(damaged_dir)
    if spoil == "flip":
        # In a record's own bytes: they are compressed, so any value there matters.
        flip(shard, shard.read_bytes().index(b"PNG"))
    elif spoil == "truncate":
        shard.write_bytes(shard.read_bytes()[:70_000])
    else:
        shard.write_bytes(b"" if spoil == "empty" else bytes(range(256)) * 600)

    def read_all():
        data = DataConfig("pictures")
        examples = load_examples(data, "train", str(damaged_dir), memory_bytes=memory_bytes)
        examples[np.arange(len(examples))]

    with pytest.raises(DataError) as caught:
        read_all()
    line = str(caught.value)
    assert line.startswith(f"{shard}: ")
    assert "damaged (" in line
    assert f"remove {shard.parent} and prepare the dataset again" in line
    assert "\n" not in line
    if spoil == "flip":
        assert f"{shard}: record 0: " in line


def test_absent_shard_is_named(damaged_dir: Path):
    shard = second_shard(damaged_dir)
    shard.unlink()
    line = refusal("pictures", damaged_dir)
    assert line == f"{shard}: no such file; remove {shard.parent} and prepare the dataset again"
    assert len(load_examples(DataConfig("pictures"), "train[:5]", str(damaged_dir))) == 5


@pytest.mark.parametrize("count", [3, 16])
def test_wrong_record_count(damaged_dir: Path, count: int):
    shard = second_shard(damaged_dir)
    records = read_shard(shard)
    write_shard(shard, (records * 2)[:count])
    line = refusal("pictures", damaged_dir)
    assert line.startswith(f"{shard}: {count} records, {len(records)} by its dataset_info.json")


BAD_RECORDS = {
    "label -1: must be from 0 to 2": lambda image: example(encode(image), -1),
    "label 3: must be from 0 to 2": lambda image: example(encode(image), 3),
    "an image of 6x8: must be 8x6 by the dataset's features": lambda image: example(
        encode(image.swapaxes(0, 1)), 0
    ),
    "more than 50,000,000 pixels": lambda image: example(png_file(5_001, 10_000, b""), 0),
    "not an image of a format that Pillow decodes": lambda image: example(b"GIF or text", 0),
    "pixels of mode F, whose black and white are not known": lambda image: example(
        encode(image.astype(np.float32), "TIFF"), 0
    ),
    "damaged (not one image and one label)": lambda image: (
        tf_example_pb2.Example().SerializeToString()
    ),
    "damaged (Error parsing message": lambda image: b"\x0a\xff",
    "damaged (image file is truncated": lambda image: example(encode(image)[:50], 0),
    "damaged (broken PNG file": lambda image: example(encode(image).replace(b"IHDR", b"IHDS"), 0),
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_bad_record_is_named(damaged_dir: Path, pictures: np.ndarray, reason: str):
    shard = second_shard(damaged_dir)
    records = read_shard(shard)
    records[4] = BAD_RECORDS[reason](pictures[0])
    write_shard(shard, records)
    line = refusal("pictures", damaged_dir)
    assert line.startswith(f"{shard}: record 4: {reason}")
    # In a slice the place is still that in the file.
    assert refusal("pictures", damaged_dir, f"train[{len(pictures) - len(records) + 2}:]") == line


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_description_is_named(damaged_dir: Path, file: str):
    path = second_shard(damaged_dir).with_name(file)
    path.write_text(path.read_text()[:-20])
    assert refusal("pictures", damaged_dir).startswith(f"{path}: damaged")


@pytest.mark.parametrize("name", ["[2024] data", "a\\b", "a*?", "up/../x", os.fsdecode(b"\xff")])
def test_a_data_dir_of_any_name_is_read(tfds_dir, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "up").mkdir()
    shutil.copytree(tfds_dir, Path(name))
    expected = load_examples(DataConfig("tiny_squares"), "test", str(tfds_dir))
    for _ in ("decoded", "kept"):
        examples = load_examples(DataConfig("tiny_squares"), "test", name)
        np.testing.assert_array_equal(examples.image, expected.image)


def test_a_dataset_is_prepared_in_a_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "[1] a\\b*"))
    assert len(load_examples(DataConfig("garments"), "test[:20]")) == 20


def test_data_error_ends_a_command_with_3_and_one_line(tfds_dir: Path, tmp_path: Path):
    folder = shutil.copytree(tfds_dir, tmp_path / "damaged")
    (shard,) = folder.glob("*/*/*-train*")
    flip(shard, 40_000)
    done = run_command(
        *("train", "--experiment=fashion_mnist/lenet", "--dry_run", f"--data_dir={folder}"),
        *("--set", "data.name=tiny_squares"),
    )
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {shard}: record ")
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------- what is no image dataset


def test_dataset_without_images(tmp_path: Path):
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=NAMES)}
    write_dataset(tmp_path, [{"text": "one", "label": 0}], features)
    line = refusal("pictures", tmp_path)
    assert line.startswith("data.name=pictures: not a dataset of labelled images")
    assert "label: ClassLabel" in line
    assert "text: Text" in line


def test_dataset_without_labels(tmp_path: Path):
    features = {"image": tfds.features.Image(shape=(8, 6, 1))}
    image = encode(noise(1, (8, 6, 1))[0])
    write_dataset(tmp_path, [{"image": io.BytesIO(image)}], features)
    assert "not a dataset of labelled images; it has image: Image" in refusal("pictures", tmp_path)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (
            {"dtype": np.uint16},
            "images of uint16 with 1 channels; must be uint8 with 1, 3 or 4 (of a",
        ),
        ({"dtype": np.float32}, "images of float32 with 1 channels; must be uint8"),
        ({"shape": (8, 6, 2)}, "images of uint8 with 2 channels; must be uint8 with 1, 3 or 4"),
        (
            {"shape": (None, 8, 6, 3)},
            "images of shape (None, 8, 6, 3); must be (height, width, cha",
        ),
    ],
)
def test_features_that_are_not_read(image: dict, said: str):
    feature = tfds.features.Image(**{"shape": (8, 6, 1)} | image)
    label = tfds.features.ClassLabel(names=NAMES)
    features = tfds.features.FeaturesDict({"image": feature, "label": label})
    info = types.SimpleNamespace(features=features, supervised_keys=("image", "label"))
    with pytest.raises(DataError) as caught:
        tfds_builder.layout(types.SimpleNamespace(info=info), DataConfig("pictures"))
    assert str(caught.value).startswith(f"data.name=pictures: {said}")


def test_other_keys_than_image_and_label(tmp_path: Path):
    image = noise(1, (8, 6, 1))
    features = {
        "photo": tfds.features.Image(shape=(8, 6, 1)),
        "kind": tfds.features.ClassLabel(num_classes=2),
        "file": tfds.features.Text(),
    }
    record = {"photo": io.BytesIO(encode(image[0])), "kind": 1, "file": "a.png"}
    write_dataset(tmp_path, [record], features, keys=("photo", "kind"))
    examples = load_examples(DataConfig("pictures"), "train", str(tmp_path))
    np.testing.assert_array_equal(examples.image, image)
    assert examples.label.tolist() == [1]
    assert examples.class_names == ("0", "1")


# ------------------------------------------------------------------------ names that are wrong


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fashion_mnits", ["there is no such dataset in TFDS", "nearest: fashion_mnist"]),
        ("garment", ["nearest: garments"]),
        ("nothing_like_it_at_all", ["there is no such dataset in TFDS"]),
        ("mnist:9.9.9", ["cannot be loaded at version 9.9.9, only: 3.0.1"]),
        ("cifar10_corrupted/nope", ["BuilderConfig nope not found with version 1.0.0."]),
        ("huggingface:mnist", ["must be dataset, dataset/config, dataset:1.0.0"]),
        ("mnist/split=train", ["must be dataset"]),
        ("../mnist", ["must be dataset"]),
        ("mnist/../cifar10", ["must be dataset"]),
        ("", ["must be dataset"]),
    ],
)
def test_wrong_name(tmp_path: Path, name: str, parts: list[str]):
    line = refusal(name, tmp_path)
    assert line.startswith(f"data.name={name}: ")
    for part in parts:
        assert part in line


def test_wrong_split(pictures_dir: Path):
    line = refusal("pictures", pictures_dir, "trian")
    assert (
        line
        == "split=trian: must be a split of pictures (train) or a slice of one, such as train[:10%]"
    )
    data = DataConfig("pictures", train_split="trian", test_split="train[40:50]")
    assert refusal(data, pictures_dir, "train").startswith("data.train_split=trian: ")
    line = refusal(data, pictures_dir, "test")
    assert line.startswith("data.test_split=train[40:50]: ")
    assert refusal("pictures", pictures_dir, "train[oops]").startswith("split=train[oops]: ")
    assert "has no examples" in refusal("pictures", pictures_dir, "train[:0]")


# ---------------------------------------------------------------------------- not prepared


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No name is known and no connection made; the list holds what was tried."""
    tried: list[str] = []

    def unknown(host: str, *arguments, **options):
        tried.append(host)
        raise socket.gaierror("Name or service not known")

    def refuse(self, address: tuple):
        tried.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return without_proxy(monkeypatch) or tried


def without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("requests.utils.getproxies", dict)
    monkeypatch.setenv("NO_PROXY", "*")


def test_not_prepared(tmp_path: Path, no_network: list[str]):
    for folder in (tmp_path, tmp_path / "absent"):
        line = refusal("cifar10", folder)
        assert line.startswith(f"data.name=cifar10: not prepared in data_dir={folder}")
        assert ("(no such folder)" in line) == (folder != tmp_path)
        for part in ("--download", "--data_dir", "--experiment=quickstart"):
            assert part in line
    assert not no_network
    assert list(tmp_path.iterdir()) == []


def test_download_without_network(tmp_path: Path, no_network: list[str]):
    line = refusal("cifar10", tmp_path / "new", download=True)
    assert line.startswith("data.name=cifar10: not prepared")
    assert "--experiment=quickstart" in line
    hosts = [
        "mindspore-website.obs.cn-north-4.myhuaweicloud.com",
        "storage.googleapis.com",
        "www.cs.toronto.edu",
    ]
    assert line.endswith(f"(--download: {', '.join(hosts)} cannot be reached)")
    assert sorted(no_network) == hosts
    assert not (tmp_path / "new").exists()


def test_host_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A listener whose queue is full lets connections wait; so does a resolver that is cut off.
    without_proxy(monkeypatch)
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        builder = types.SimpleNamespace(name="any", url_infos={f"http://127.0.0.1:{port}/x": None})
        assert tfds_builder._silent_hosts(builder, str(tmp_path)) == ["127.0.0.1"]
        for client in waiting:
            client.close()


def test_host_that_is_slow_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def head(url: str, timeout: tuple):
        raise requests.exceptions.ReadTimeout  # it took the connection, and says nothing yet

    monkeypatch.setattr(requests, "head", head)
    builder = types.SimpleNamespace(name="any", url_infos={"http://127.0.0.1/x": None})
    assert tfds_builder._silent_hosts(builder, str(tmp_path)) == []


def test_one_host_that_answers_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_proxy(monkeypatch)
    monkeypatch.setattr(download, "CONNECT_SECONDS", 60)  # not waited for, on a busy machine
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        good = f"http://127.0.0.1:{server.server_port}/x"  # answers "501, unsupported method"
        bad = f"http://localhost:{unused.getsockname()[1]}/x"
        builder = types.SimpleNamespace(name="any", url_infos={bad: None, good: None})
        assert tfds_builder._silent_hosts(builder, str(tmp_path)) == []
        builder.url_infos = {bad: None}
        assert tfds_builder._silent_hosts(builder, str(tmp_path)) == ["localhost"]
    server.shutdown()
    thread.join()
    server.server_close()
    # What was fetched before needs no host; nor does what is fetched from nowhere.
    builder.url_infos = None
    assert tfds_builder._silent_hosts(builder, str(tmp_path)) == []
    builder.url_infos = {bad: None}
    fetched = tmp_path / "downloads/any/a/b.INFO"
    fetched.parent.mkdir(parents=True)
    fetched.write_text("{}")
    assert tfds_builder._silent_hosts(builder, str(tmp_path)) == []


class LocalPictures(tfds.core.GeneratorBasedBuilder):
    """Registered with TFDS, so --download finds it; needs no network."""

    VERSION = tfds.core.Version("1.0.0")
    fails: Exception | None = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 6, 1)),
            "label": tfds.features.ClassLabel(names=NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        if self.fails:
            raise self.fails
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, image in enumerate(noise(12, (8, 6, 1))):
            yield i, {"image": io.BytesIO(encode(image)), "label": i % 3}


def test_download_prepares_array_record_in_a_new_folder(tmp_path: Path):
    folder = tmp_path / "new" / "deeper"
    assert "not prepared" in refusal("local_pictures", folder)
    examples = load_examples(DataConfig("local_pictures"), "train", str(folder), download=True)
    assert sorted(map(bytes, examples.image)) == sorted(map(bytes, noise(12, (8, 6, 1))))
    info = json.loads((folder / "local_pictures/1.0.0/dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert len(list(folder.glob("*/*/*array_record*"))) == 1


def test_failed_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LocalPictures, "fails", OSError("no such\nluck"))
    line = refusal("local_pictures", tmp_path, download=True)
    assert line.startswith("data.name=local_pictures: cannot be prepared in data_dir=")
    assert "no such luck" in line
    (tmp_path / "file").touch()
    line = refusal("local_pictures", tmp_path / "file", download=True)
    assert "cannot be prepared" in line


ADD_TENSORFLOW = "needs TensorFlow, which is missing; ./launch.sh setup --with=prepare adds it"


def test_without_tensorflow_other_datasets_are_refused_at_once(
    tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tfds_builder, "tensorflow_is_installed", lambda: False)
    line = refusal("svhn_cropped", tmp_path / "new", download=True)
    assert line == f"data.name=svhn_cropped: preparing it {ADD_TENSORFLOW}"
    assert not no_network
    assert not (tmp_path / "new").exists()
    # Without --download the first advice is to allow it.
    assert "train --download" in refusal("svhn_cropped", tmp_path)
    # A dataset of one's own may do without.
    load_examples(DataConfig("local_pictures"), "train", str(tmp_path), download=True)


def test_dataset_of_ones_own_that_needs_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    absent = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    monkeypatch.setattr(LocalPictures, "fails", absent)
    line = refusal("local_pictures", tmp_path, download=True)
    assert line.startswith("data.name=local_pictures: cannot be prepared in data_dir=")
    assert line.endswith(f": {ADD_TENSORFLOW}")


def test_tfrecord_files_without_tensorflow(damaged_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tfds_builder, "tensorflow_is_installed", lambda: False)
    folder = second_shard(damaged_dir).parent
    for shard in shard_files(folder):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    line = refusal("pictures", damaged_dir)
    assert line == f"{folder}: its files have the format tfrecord; reading them {ADD_TENSORFLOW}"


def test_incomplete_folder(tmp_path: Path):
    load_examples(DataConfig("local_pictures"), "train", str(tmp_path), download=True)
    files = tmp_path / "local_pictures/1.0.0"
    (files / "dataset_info.json").unlink()
    line = refusal("local_pictures", tmp_path, download=True)
    assert line.startswith(f"{files}: incomplete; remove this folder")


@pytest.fixture
def quick_garments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dataset in the embedded one's place, which takes longer to draw."""

    class Garments(LocalPictures, skip_registration=True):
        pass

    module = types.ModuleType("cnn_jax.data.garments")
    module.Garments = Garments
    monkeypatch.setitem(sys.modules, "cnn_jax.data.garments", module)


@pytest.mark.usefixtures("quick_garments")
def test_embedded_dataset_is_prepared_unasked_and_quietly(
    own_cache: Path,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    examples = load_examples(DataConfig("garments"), "train", "/nowhere")
    assert len(examples) == 12
    printed = capfd.readouterr()
    lines = f"{printed.out}\n{printed.err}".splitlines()
    assert [line for line in lines if line and "cnn_jax" not in line] == []
    assert [m for m in caplog.messages if "garments" in m] == [
        f"preparing garments in {own_cache / 'tfds'}",
        "decoding 12 examples of garments/train",
    ]
    assert (own_cache / "tfds/garments/1.0.0").is_dir()


@pytest.mark.usefixtures("quick_garments")
def test_embedded_dataset_drawn_by_other_code_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    caplog.set_level(logging.INFO)
    code = tmp_path / "garments.py"
    for text, expected in (("1", 1), ("1", 0), ("22", 1)):
        if not code.exists() or code.read_text() != text:
            code.write_text(text)
        load_examples(DataConfig("garments"), "train")
        assert decodings(caplog) == expected


# --------------------------------------------------------------------------------- image_shape


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (DataConfig("mnist"), (28, 28, 1)),
        (DataConfig("cifar100"), (32, 32, 3)),
        (DataConfig("cifar10", image_size=(40, 48)), (40, 48, 3)),
        (DataConfig("cats_vs_dogs", image_size=(64, 64)), (64, 64, 3)),
    ],
)
def test_image_shape_needs_no_data(
    tmp_path: Path, no_network: list[str], data: DataConfig, shape: tuple
):
    assert sources.image_shape(data, str(tmp_path / "absent")) == shape
    assert not no_network
    assert not (tmp_path / "absent").exists()


def test_image_shape_of_a_dataset_on_disk(pictures_dir: Path):
    assert sources.image_shape(DataConfig("pictures"), str(pictures_dir)) == (8, 6, 1)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cats_vs_dogs", "its images differ in size"),
        ("imdb_reviews", "not a dataset of labelled images"),
        ("fashion_mnits", "nearest: fashion_mnist"),
    ],
)
def test_image_shape_refusals(tmp_path: Path, name: str, part: str):
    with pytest.raises(DataError, match=part):
        sources.image_shape(DataConfig(name), str(tmp_path))


IMPORTED = """
import os
import sys
from cnn_jax.config import DataConfig
from cnn_jax.data import sources
def imported():
    return [name for name in ("tensorflow_datasets", "tensorflow") if name in sys.modules]
print(len(sources.load_examples(DataConfig("pictures"), "train", sys.argv[1])), imported())
print(*sources.image_shape(DataConfig("cifar10"), sys.argv[1]), imported())
os.rename(sys.argv[2], sys.argv[2] + "_gone")
print(len(sources.load_examples(DataConfig("pictures"), "train", sys.argv[1])), imported())
"""


def test_what_is_imported(pictures_dir: Path, own_cache: Path):
    load_examples(DataConfig("pictures"), "train", str(pictures_dir))
    folder = {"CNN_JAX_CACHE_DIR": str(own_cache)}
    assert run_python(IMPORTED, pictures_dir, own_cache, **folder).splitlines() == [
        "30 []",  # from the decoded images that were kept
        "32 32 3 ['tensorflow_datasets']",
        "30 ['tensorflow_datasets']",
    ]


# ------------------------------------------------------------------------------- decoded cache


def test_decoded_once_for_each_split_size_and_state_of_the_files(
    damaged_dir: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    variants = [
        (DataConfig("pictures"), "train"),
        (DataConfig("pictures"), "train[:5]"),
        (DataConfig("pictures", image_size=(4, 4)), "train"),
    ]
    first = [load_examples(data, split, str(damaged_dir)) for data, split in variants]
    assert decodings(caplog) == 3
    again = [load_examples(data, split, str(damaged_dir)) for data, split in variants]
    assert decodings(caplog) == 0
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_array_equal(one.label, two.label)
        assert one.class_names == two.class_names
    shard = second_shard(damaged_dir)
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_examples(DataConfig("pictures"), "train", str(damaged_dir))
    assert decodings(caplog) == 1
    # New content: never the old images.
    records = read_shard(shard)
    records[0] = example(encode(np.full((8, 6, 1), 77, np.uint8)), 2)
    write_shard(shard, records)
    changed = load_examples(DataConfig("pictures"), "train", str(damaged_dir))
    assert np.all(changed.image[30 - len(records)] == 77)


def test_decoded_again_once_images_are_decoded_otherwise(
    pictures_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    for rule, expected in ((decode.fingerprint(), 1), (decode.fingerprint(), 0), ("another", 1)):
        monkeypatch.setattr(decode, "fingerprint", lambda rule=rule: rule)
        load_examples(DataConfig("pictures"), "train", str(pictures_dir))
        assert decodings(caplog) == expected


def test_entry_larger_than_memory_is_left_alone(pictures_dir: Path):
    data = DataConfig("pictures")
    assert isinstance(load_examples(data, "train", str(pictures_dir)), InMemory)
    assert isinstance(load_examples(data, "train", str(pictures_dir), memory_bytes=99), OnDemand)
    assert isinstance(load_examples(data, "train", str(pictures_dir)), InMemory)
