"""A user's own images: found in folders and tables, split, decoded, checked."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax.analysis import predict
from cnn_jax.common import decode
from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.paths import resolved
from cnn_jax.data import folders, image_files, sources, statistics
from cnn_jax.data.examples import InMemory
from cnn_jax.data.splits import load_splits
from cnn_jax.data.tfds_builder import SizesDiffer
from cnn_jax.models import MLP
from cnn_jax.train.loop import train
from cnn_jax.train.workdir import read_config


def noise(seed: int, *shape: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, shape or (6, 5), np.uint8)
    return Image.fromarray(pixels)


def write(root: Path, *names: str, **options) -> Path:
    """Writes an image of noise of its own under each name; {a..c} stands for several."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed + 100).save(path, **options)
    return root


def many(folder: str, count: int) -> list[str]:
    return [f"{folder}/{i}.png" for i in range(count)]


def table(root: Path, text: str | bytes, name: str = "table.csv") -> DataConfig:
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return DataConfig(str(root / name))


def opened(root: Path, **fields) -> folders.Dataset:
    return folders.open_dataset(DataConfig(str(root), **fields))


def files_of(dataset: folders.Dataset) -> dict[str, list[str]]:
    return {split: sorted(i.file for i in images) for split, images in dataset.splits.items()}


# ------------------------------------------------------------------------------- what a name is


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("fashion_mnist", None),
        ("emnist/letters", None),
        ("mnist:3.*.*", None),
        ("photos", "photos"),
        ("deep/photos", "deep/photos"),
        ("photos/", "photos"),
        ("texts", None),  # holds no image
        ("./texts", "texts"),
        ("missing", None),
        ("missing/", None),
        ("../x", "../x"),
        ("..", ".."),
        ("~/x", "home/x"),
        ("list.csv", "list.csv"),
        ("a/LIST.JSONL", "a/LIST.JSONL"),
        ("/x/../y", "/x/../y"),  # as config.json keeps it
    ],
)
def test_which_names_are_paths(name, path, tmp_path, monkeypatch):
    write(tmp_path, "photos/a/1.png", "deep/photos/1.JPG")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    (tmp_path / "texts" / "._a.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = resolved(DataConfig(name)).name
    wanted = name if path is None or name[0] == "/" else os.path.normpath(tmp_path / path)
    assert found == str(wanted)


# ----------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("names", "classes", "splits"),
    [
        (
            ["train/b/1.png", "train/a/deep/er/2.png", "test/a/1.png", "test/b/3.png"],
            ("a", "b"),
            {
                "train": ["train/a/deep/er/2.png", "train/b/1.png"],
                "test": ["test/a/1.png", "test/b/3.png"],
            },
        ),
        (
            ["Train/10/1.png", "Train/9/1.png", "TEST/9/1.png", "valid/10/1.png", "Train/9/1.bmp"],
            ("9", "10"),  # by value
            {
                "train": ["Train/10/1.png", "Train/9/1.bmp", "Train/9/1.png"],
                "validation": ["valid/10/1.png"],
                "test": ["TEST/9/1.png"],
            },
        ),
        # a class called train; the only image of a class stays in training
        (
            ["bus/1.png", "train/1.png", "car/1.png"],
            ("bus", "car", "train"),
            {"train": ["bus/1.png", "car/1.png", "train/1.png"], "test": []},
        ),
        (
            [
                "a/.hidden.png",
                "a/Thumbs.db",
                ".git/b/1.png",
                "__MACOSX/a/1.png",
                "a/1.png",
                "top.png",
            ],
            ("a",),
            {"train": ["a/1.png"], "test": []},
        ),
        # images of a test split without labels are left out
        (
            ["train/a/1.png", "train/b/1.png", "test/1.png"],
            ("a", "b"),
            {"train": ["train/a/1.png", "train/b/1.png"], "test": []},
        ),
    ],
)
def test_layouts(names, classes, splits, tmp_path):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    dataset = opened(tmp_path)
    assert dataset.class_names == classes
    assert files_of(dataset) == splits


def test_links_are_followed_and_loops_are_not(tmp_path):
    write(tmp_path, "real/1.png", "photos/a/1.png", "photos/b/1.png")
    root = tmp_path / "photos"
    os.symlink(tmp_path / "real", root / "a" / "linked")
    os.symlink(tmp_path / "real", root / "b" / "linked")  # twice the same, but no loop
    os.symlink("..", root / "a" / "up")
    os.symlink(root, root / "b" / "root")
    dataset = opened(root)
    wanted = ["a/1.png", "a/linked/1.png", "b/1.png", "b/linked/1.png"]
    assert sorted(image.file for image in dataset.images) == wanted
    assert any("links to a folder above them: a/up" in line for line in dataset.remarks)


def test_names_in_any_script(tmp_path):
    decomposed, latin1 = "mo\u0308we", os.fsdecode(b"caf\xe9")
    write(tmp_path, f"train/{decomposed}/1.png", "test/m\u00f6we/2.png", "train/東京/1.png")
    write(tmp_path, f"train/{latin1}/\udcff.png", f"test/{latin1}/1.png")
    dataset = opened(tmp_path)
    assert dataset.class_names == ("caf\\xe9", "m\u00f6we", "東京")
    examples = sources.load_examples(DataConfig(str(tmp_path)), "train")
    assert len(examples) == 3
    json.dumps(examples.class_names).encode("ascii")


def test_the_test_split_is_drawn_from_each_class(tmp_path):
    write(tmp_path, *many("a", 20), *many("b", 10), *many("c", 2), "d/1.png")
    before = opened(tmp_path)
    counts = {
        split: [sum(i.class_name == name for i in images) for name in "abcd"]
        for split, images in before.splits.items()
    }
    assert counts == {"train": [16, 8, 1, 1], "test": [4, 2, 1, 0]}
    assert len({i.file for i in before.images}) == 33
    assert opened(tmp_path) == before
    assert before.carved
    half = opened(tmp_path, test_fraction=0.5)
    assert set(files_of(before)["test"]) <= set(files_of(half)["test"])
    assert len(half.splits["test"]) == 16
    labels = [i.class_name for i in before.splits["train"]]
    assert labels != sorted(labels)  # no class comes first
    write(tmp_path, "a/new.png")
    after = opened(tmp_path)
    assert len(set(files_of(after)["test"]) ^ set(files_of(before)["test"])) <= 2


def test_splits_in_the_notation_of_tfds(tmp_path):
    names = [*many("train/a", 6), *many("train/b", 4), "test/a/1.png", "val/a/2.png", "val/b/3.png"]
    dataset = opened(write(tmp_path, *names))
    train = dataset.splits["train"]
    assert dataset.select("train[:30%]", "split") == train[:3]
    assert dataset.select("train[-2:]", "split") == train[8:]
    assert len(dataset.select("train[2:4]+validation", "split")) == 4
    assert len(dataset.select("all", "split")) == 13
    for wrong in ("tset", "train[", "train[:99]", "train[3:3]", "val"):
        with pytest.raises(DataError, match=r"^--split="):
            dataset.select(wrong, "--split")
    data = DataConfig(str(tmp_path))
    assert sources.load_examples(data, "validation").files == tuple(
        image.file for image in dataset.splits["validation"]
    )
    other = DataConfig(str(tmp_path), train_split="train+validation", validation_examples=3)
    assert len(sources.load_examples(other, "train")) == 9
    assert len(sources.load_examples(other, "validation")) == 3
    with pytest.raises(ConfigError, match=r"data\.validation_examples=3: must be 0"):
        load_splits(Config(MLP(), DataConfig(str(tmp_path), validation_examples=3)))
    assert load_splits(Config(MLP(), data)).validation.files


BOTH = [*many("train/a", 2), *many("train/b", 2), "test/a/9.png", "test/b/9.png"]
REFUSED = [  # files, fields, error, what is said
    ([], {}, DataError, "no image in a folder of its class; write "),
    (["1.png"], {}, DataError, "no image in a folder of its class; write "),
    (
        ["train/1.png", "test/2.png"],
        {},
        DataError,
        "test, train holds images, but no folder for each",
    ),
    ([*BOTH, "rose/1.png"], {}, DataError, "holds the splits test, train beside rose"),
    ([*BOTH, "val/a/1.png", "valid/a/2.png"], {}, DataError, "val, valid are both the validation"),
    (BOTH, {"test_fraction": 0.5}, ConfigError, "data.test_fraction=0.5: must be none, as "),
    (BOTH, {"train_split": "learn"}, DataError, "data.train_split=learn: "),
    (BOTH, {"test_split": "validation"}, DataError, "data.test_split=validation: "),
    ([*BOTH, "test/c/1.png"], {}, DataError, "no image of c in train, but in another split"),
    (many("a", 3), {}, DataError, "has one class, a; training needs two"),
    (["a/1.png"], {}, DataError, "has one class, a; training needs two"),
    (["a/1.png", "b/2.png"], {}, DataError, "data.test_split=test: "),
    (["test/a/1.png", "test/b/2.png"], {}, DataError, "data.train_split=train: "),
]


@pytest.mark.parametrize(("names", "fields", "kind", "said"), REFUSED)
def test_what_training_refuses(names, fields, kind, said, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(kind) as refused:
        load_splits(Config(MLP(), DataConfig(str(tmp_path), **fields)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder or file"):
        opened(tmp_path / "missing")


# ------------------------------------------------------------------------------------ tables

ROWS = [("a.png", "cat", "train"), ("d/b.png", "dog", "test"), ("c.png", "cat", "train")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,label,split\na.png,cat,train\nd/b.png,dog,test\nc.png,cat,train\n"),
        (
            "t.csv",
            "\ufefffile,label,split\r\na.png,cat,train\r\n\r\nd/b.png,dog,test\r\nc.png,cat,train",
        ),
        ("t.csv", "Split;Class;Image\ntrain;cat;a.png\nTEST;dog;d\\b.png\ntraining;cat;c.png\n"),
        (
            "t.TSV",
            "note\tpath\tlabel\tsplit\n1\ta.png\tcat\ttrain\n,\td/b.png\tdog\ttest\n\tc.png\tcat\ttrain",
        ),
        (
            "t.csv",
            'file_name, label ,split\n"a.png",cat, train\n"d/b.png",dog,test\n./c.png,cat,train\n',
        ),
        (
            "t.csv",
            "file,label,split\na.png,cat,train\nd/b.png,dog,test\nc.png,cat,train\n".encode(
                "utf-16"
            ),
        ),
        (
            "t.jsonl",
            '{"file": "a.png", "label": "cat", "split": "train", "more": [1]}\n\n'
            '{"split": "test", "file": "d/b.png", "label": "dog"}\r\n'
            '{"file": "c.png", "label": "cat", "split": "train"}',
        ),
    ],
)
def test_tables(name, text, tmp_path):
    write(tmp_path, "a.png", "d/b.png", "c.png")
    dataset = folders.open_dataset(table(tmp_path, text, name))
    found = [
        (os.path.normpath(i.file), i.class_name, split)
        for split, images in dataset.splits.items()
        for i in images
    ]
    assert sorted(found) == sorted(ROWS)
    assert [row[0] for row in found if row[2] == "train"] == ["a.png", "c.png"]  # as written
    assert not dataset.remarks


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a.png,cat\nc.png,dog\n",
            "has the columns a.png, cat; none of them is the file, which is",
        ),
        (
            "file,name\na.png,cat\n",
            "has the columns file, name; none of them is the label, which is",
        ),
        ("file,path,label\na,b,c\n", "file, path may all be the file"),
        (
            "file,label\na.png,cat\nx.png,dog\ny.png,dog\n",
            "line 3: x.png: No such file or directory (and 1",
        ),
        (
            "file,label\na.png,cat\nc.png,dog\n./a.png,dog\n",
            "line 4: ./a.png stands in line 2 already",
        ),
        ("file,label\na.png,\n", "line 2: has no label"),
        ("file,label\n,cat\n", "line 2: has no file"),
        ("file,label\na.png,cat,dog\n", "line 2: 3 columns, the first line has 2"),
        ("file,label,split\na.png,cat,learn\n", "line 2: split 'learn': must be one of train, "),
        ("file,label\n", "names no image"),
        ("", "names no image"),
        ("file,label\na\0.png,cat\n", "line 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(text, said, tmp_path):
    write(tmp_path, "a.png", "c.png")
    with pytest.raises(DataError) as refused:
        folders.open_dataset(table(tmp_path, text))
    assert said in str(refused.value)
    assert "table.csv" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"), [('{"file": 1', "line 1: is not JSON"), ("\n[1]", "line 2: must be as {")]
)
def test_what_is_wrong_with_json_lines_is_said(text, said, tmp_path):
    with pytest.raises(DataError, match="t.jsonl: " + said):
        folders.open_dataset(table(tmp_path, text, "t.jsonl"))


def test_a_table_gives_the_examples_that_tfds_gives(tfds_dir, tmp_path):
    """The same images in the same order are the same arrays, so a run has the same bits."""
    wanted = sources.load_examples(DataConfig("tiny_squares"), "train", str(tfds_dir))
    lines = ["file,label"]
    for i, (image, label) in enumerate(zip(wanted.image, wanted.label, strict=True)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{wanted.class_names[label]}")
    found = sources.load_examples(table(tmp_path, "\n".join(lines)), "all")
    order = [int(name.removesuffix(".png")) for name in found.files]
    assert found.class_names == wanted.class_names
    assert np.array_equal(found.image, wanted.image[order])
    assert np.array_equal(found.label, wanted.label[order])


# ---------------------------------------------------------------------------------- decoding


def odd_files(root: Path) -> Path:
    """Images of kinds that are easily decoded in two ways."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(1, 9, 16, 3).save(root / "a/exif.jpg", exif=turned)
    noise(2, 9, 16, 4).save(root / "a/alpha.png")
    noise(3, 9, 16, 3).convert("CMYK").save(root / "a/cmyk.jpg")
    noise(4, 9, 16, 3).quantize(8).save(root / "b/palette.gif")
    deep = np.random.default_rng(5).integers(0, 65536, (9, 16)).astype(np.uint16)
    Image.fromarray(deep).save(root / "b/deep.png")
    noise(6, 9, 16, 3).save(root / "b/photo.webp")
    return root


def test_images_are_decoded_as_predict_decodes_them(tmp_path):
    data = DataConfig(str(odd_files(tmp_path)), image_size=(8, 8))
    examples = sources.load_examples(data, "all")
    assert examples.image_shape == (8, 8, 3)
    for file, image in zip(examples.files, examples.image, strict=True):
        assert np.array_equal(image, predict.read_image(str(tmp_path / file), (8, 8, 3)))


def test_sizes_are_those_of_the_upright_images(tmp_path):
    dataset = opened(odd_files(tmp_path))
    for image, size in zip(dataset.images, dataset.headers.size, strict=True):
        with open(tmp_path / image.file, "rb") as file:
            upright = decode.decode(file, 3)
        assert tuple(size) == (upright.height, upright.width), image.file
    with pytest.raises(SizesDiffer) as refused:
        dataset.image_shape(DataConfig(str(tmp_path)))
    said = str(refused.value)
    assert "9x16 the smallest, 9x16 the median, 16x9 the largest (height x width)" in said
    assert "--set data.image_size=9,9" in said


@pytest.mark.parametrize(
    ("modes", "channels"), [(["L", "1", "LA"], 1), (["L", "RGB"], 3), (["L", "P"], 3)]
)
def test_grey_only_if_every_file_is_grey(modes, channels, tmp_path):
    for i, mode in enumerate(modes):
        folder = tmp_path / str(i)
        folder.mkdir()
        noise(i, 4, 4, 3).convert(mode).save(folder / "x.png")
    assert opened(tmp_path).image_shape(DataConfig("x")) == (4, 4, channels)


def spoiled(root: Path) -> Path:
    write(root, *many("train/a", 5), *many("train/b", 5), "test/a/x.png", "test/b/y.png")
    (root / "train/a/1.png").write_bytes((root / "train/a/1.png").read_bytes()[:60])
    (root / "train/b/2.png").write_bytes(b"")
    os.symlink("nowhere", root / "train/b/7.png")
    return root


@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_broken_images(memory_bytes, tmp_path, caplog):
    root = spoiled(tmp_path / "photos")
    data = DataConfig(str(root))
    with pytest.raises(
        DataError, match=r"\.png: cannot be read \(.*data.skip_corrupt=all|cannot be read"
    ):
        sources.load_examples(data, "train", memory_bytes=memory_bytes)[np.arange(11)]
    caplog.set_level("INFO")
    for _ in range(2):  # decoded, and from the cache
        caplog.clear()
        skipping = DataConfig(str(root), skip_corrupt="all")
        examples = sources.load_examples(skipping, "train", memory_bytes=memory_bytes)
        assert "3 broken images are left out; the first: " in caplog.text
        assert len(examples) == 8
        assert not {"train/a/1.png", "train/b/2.png", "train/b/7.png"} & set(examples.files)
        batch = examples[np.arange(8)]
        for file, image, label in zip(examples.files, batch["image"], batch["label"], strict=True):
            assert np.array_equal(image[..., 0], np.asarray(Image.open(root / file)))
            assert examples.class_names[label] == Path(file).parts[1]
    with pytest.raises(DataError, match="cannot be read"):  # the cache does not hide it
        sources.load_examples(data, "train", memory_bytes=memory_bytes)[np.arange(11)]


def test_all_images_broken(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match="none of its 2 images can be read"):
        sources.load_examples(DataConfig(str(tmp_path), skip_corrupt="all"), "all")


def test_a_changed_file_is_decoded_again(tmp_path):
    data = DataConfig(str(write(tmp_path, *many("a", 3), *many("b", 3))))
    before = sources.load_examples(data, "train")
    file = tmp_path / before.files[0]
    pixels = 255 - before.image[0, ..., 0]
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(1, 1))
    after = sources.load_examples(data, "train")
    assert np.array_equal(after.image[0, ..., 0], pixels)
    assert np.array_equal(after.image[1:], before.image[1:])


# -------------------------------------------------------------------------- twins, mean, deviation


def test_a_run_looks_for_the_images_once(tmp_path, monkeypatch):
    opened, find = [], image_files.find
    monkeypatch.setattr(image_files, "find", lambda name: opened.append(name) or find(name))
    root = str(write(tmp_path, *many("train/a", 3), *many("val/a", 1), "train/b/x.png"))
    splits = load_splits(Config(MLP(), DataConfig(root)))
    assert list(splits.by_name()) == ["train", "validation", "test"]
    assert len(splits.data_files) == 16
    assert opened == [root]


def test_twins_in_two_splits_are_counted(tmp_path, caplog):
    write(tmp_path, *many("train/a", 3), *many("train/b", 3), "test/a/x.png", "test/b/y.png")
    Image.open(tmp_path / "train/a/1.png").save(tmp_path / "test/b/copy.bmp")  # other bytes
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "train/b/copy.png")  # in one split
    load_splits(Config(MLP(), DataConfig(str(tmp_path))))
    (line,) = [text for text in caplog.messages if "two splits" in text]
    assert "1 images are in two splits" in line
    assert "first: train/a/1.png in train, test/b/copy.bmp in test" in line


def test_equal_files_are_found_where_images_are_streamed(tmp_path, caplog):
    """Those that only another format stores are not; a file of a size of its own is not read."""
    write(tmp_path, *many("train/a", 3), *many("train/b", 3), "test/a/x.png", "test/b/y.png")
    Image.open(tmp_path / "train/a/1.png").save(tmp_path / "test/b/copy.bmp")
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "train/b/copy.png")
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "test/b/copy.png")
    (tmp_path / "train/a/0.png").write_bytes(bytes(10000))  # not an image, nor as long as another
    data = DataConfig(str(tmp_path), streaming=True, workers=0)
    dataset = folders.open_dataset(data)
    splits = {name: sources.load_examples(data, name) for name in ("train", "test")}
    read = []
    real = hashlib.file_digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hashlib, "file_digest", lambda file, kind: read.append(file.name) or real(file, kind)
        )
        ((first, second),) = statistics.equal_files(dataset, splits)
    shown = {splits[split].files[place] for split, place in (first, second)}
    assert shown <= {"train/a/2.png", "train/b/copy.png", "test/b/copy.png"}
    assert (first[0], second[0]) == ("train", "test")
    assert str(tmp_path / "train/a/0.png") not in read
    (tmp_path / "train/a/0.png").unlink()
    load_splits(Config(MLP(), data))
    (line,) = [text for text in caplog.messages if "two splits" in text]
    assert "1 images are in two splits (equal files; first: train/" in line


def test_a_fingerprint_is_that_of_the_examples_however_they_are_read(tmp_path):
    data = DataConfig(str(write(tmp_path, *many("a", 9), *many("b", 9))))
    found = {}
    for streaming in (True, False):
        read = dataclasses.replace(data, streaming=streaming, workers=0)
        found[streaming] = statistics.fingerprint(sources.load_examples(read, "train"))
    assert found[False].items() > found[True].items()
    examples = sources.load_examples(data, "train")
    examples.image[-1, 0, 0] ^= 1
    assert statistics.fingerprint(examples)["pixels"] != found[True]["pixels"]
    large = InMemory(np.zeros((4000, 1, 1, 1), np.uint8), np.zeros(4000, np.int32), ("a",))
    before = statistics.fingerprint(large)
    large.label[1] = 1  # between the examples of the sample
    after = statistics.fingerprint(large)
    assert before["labels"] == after["labels"]
    assert before["all"] != after["all"]


def test_mean_and_deviation():
    random = np.random.default_rng(0)
    image = random.integers(0, 200, (1203, 3, 4, 3), np.uint8)
    image[..., 2] //= 3
    examples = InMemory(image, np.zeros(1203, np.int32), ("a",))
    pixels = image.astype(np.float64) / 255
    mean, std = statistics.mean_and_deviation(examples)
    assert mean == tuple(pixels.mean((0, 1, 2)).round(4))
    assert std == tuple(pixels.std((0, 1, 2)).round(4))
    config = Config(MLP(), DataConfig("x", mean="auto", std="auto"))
    data = statistics.in_numbers(config, examples).data
    assert (data.mean, data.std) == (mean, std)
    data = statistics.in_numbers(Config(MLP(), DataConfig("x", std="auto")), examples).data
    assert (data.mean, data.std) == ((0.0,), std)
    image[..., 1] = 7
    with pytest.raises(ConfigError, match=r"data.std=auto: is .*, 0.0, "):
        statistics.in_numbers(config, examples)


def test_a_run_keeps_path_and_numbers_and_notices_other_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *many("photos/a", 10), *many("photos/b", 10))
    data = DataConfig("photos", mean="auto", std="auto")
    config = Config(MLP(num_classes=2), data, epochs=1, batch_size=8, devices=1)
    train(config, tmp_path / "run")
    saved = read_config(tmp_path / "run")
    pixels = sources.load_examples(resolved(data), "train").image.astype(np.float64) / 255
    kept = saved["config"]["data"]
    assert kept["name"] == str(tmp_path / "photos")
    assert (kept["mean"], kept["std"]) == ([round(pixels.mean(), 4)], [round(pixels.std(), 4)])
    monkeypatch.chdir("/")
    again = dataclasses.replace(config, epochs=2, data=dataclasses.replace(data, name=kept["name"]))
    lines = train(again, tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2]
    write(tmp_path, "photos/b/new.png")
    with pytest.raises(ConfigError, match="images of the dataset were added, removed or changed"):
        train(again, tmp_path / "run")


def test_a_run_goes_on_with_images_that_were_moved(tmp_path, caplog):
    write(tmp_path, *many("photos/a", 10), *many("photos/b", 10))
    data = DataConfig(str(tmp_path / "photos"))
    config = Config(MLP(num_classes=2), data, epochs=1, batch_size=8, devices=1)
    train(config, tmp_path / "run")
    moved = str(shutil.move(tmp_path / "photos", tmp_path / "elsewhere"))
    again = dataclasses.replace(config, epochs=2, data=dataclasses.replace(data, name=moved))
    with caplog.at_level("INFO"):
        assert len(train(again, tmp_path / "run")) == 2
    assert f"its images have moved from {tmp_path / 'photos'} to {moved}" in caplog.text
    assert "other images or labels" not in caplog.text
    assert read_config(tmp_path / "run")["config"]["data"]["name"] == moved
    shutil.copytree(moved, tmp_path / "third")
    write(tmp_path, "third/b/new.png")
    third = dataclasses.replace(data, name=str(tmp_path / "third"))
    with pytest.raises(ConfigError, match=r"data.name: .*/elsewhere -> .*/third; data_files: "):
        train(dataclasses.replace(again, epochs=3, data=third), tmp_path / "run")


def test_other_pixels_in_files_of_the_same_size_are_noticed(tmp_path, caplog):
    """As a shard of TFDS's that was written again, they have the names and numbers of before."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / f"photos/{split}/{name}").mkdir(parents=True)
            for i in range(8):
                noise(i).save(tmp_path / f"photos/{split}/{name}/{i}.bmp")
    data = DataConfig(str(tmp_path / "photos"))
    config = Config(MLP(num_classes=2), data, epochs=1, batch_size=8, devices=1)
    train(config, tmp_path / "run")
    noise(99).save(tmp_path / "photos/test/b/3.bmp")
    caplog.clear()
    train(dataclasses.replace(config, epochs=2), tmp_path / "run")
    (line,) = [text for text in caplog.messages if "other images or labels" in text]
    assert f"than before in test of {tmp_path / 'photos'} (fingerprints in config.json)" in line
