"""The embedded dataset: the same pictures everywhere, placed anywhere, prepared without TensorFlow."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.data import garments, tfds_builder
from cnn_jax.data.garments import CLASS_NAMES, DRAWINGS, Garments, draw_example, fill
from tests.tiny import REPOSITORY

# Of train/0 to train/299, test/0 to test/99 and the first twenty labels. Who changes a drawing
# changes the dataset, and its VERSION with it.
SHA256 = "7c7094389d6db24484aa3922c1b90366470e68fb3e15206ef5186e338fe721b4"


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    """uint8 [300, 28, 28], thirty of each class in turns."""
    return np.stack([draw_example("train", i)[0] for i in range(300)])


@pytest.fixture(scope="module")
def test() -> np.ndarray:
    """uint8 [100, 28, 28], ten of each class in turns."""
    return np.stack([draw_example("test", i)[0] for i in range(100)])


# ----------------------------------------------------------------------------------- examples


def test_pictures_are_pinned(train: np.ndarray, test: np.ndarray):
    labels = np.array([draw_example("train", i)[1] for i in range(20)], np.uint8)
    content = train.tobytes() + test.tobytes() + labels.tobytes()
    assert hashlib.sha256(content).hexdigest() == SHA256


def test_example_depends_on_split_and_index_alone(train: np.ndarray):
    random.seed(1)
    for i in (299, 7, 7, 150):
        np.testing.assert_array_equal(draw_example("train", i)[0], train[i])
    np.testing.assert_array_equal(draw_example("train", np.int64(7))[0], train[7])


@pytest.mark.parametrize("split", ["train", "test"])
def test_shape_type_and_labels(split: str):
    for i in range(20):
        image, label = draw_example(split, i)
        assert image.shape == (28, 28)
        assert image.dtype == np.uint8
        assert label == i % 10


def test_no_image_occurs_twice(train: np.ndarray, test: np.ndarray):
    assert len({image.tobytes() for image in (*train, *test)}) == 400


@pytest.mark.parametrize(
    ("split", "index"), [("train", 12_000), ("test", 2_000), ("train", -1), ("validation", 0)]
)
def test_no_such_example(split: str, index: int):
    with pytest.raises(ValueError, match=f"^{split}/{index}: there are train/0 to train/11999"):
        draw_example(split, index)


def test_class_names_are_those_of_fashion_mnist():
    import tensorflow_datasets as tfds

    with tfds_builder.quiet():
        names = tfds.builder("fashion_mnist").info.features["label"].names
    assert list(CLASS_NAMES) == names


# ------------------------------------------------------------------------------------ pictures


def test_contrast(train: np.ndarray):
    assert train.min() == 0
    assert train.max() == 255
    low, high = np.percentile(train, [2, 98], axis=(1, 2))
    assert (high - low > 40).all()
    brightness = train.mean(axis=(1, 2))
    assert brightness.std() > 10
    assert 30 < brightness.mean() < 90


def test_position_varies_in_every_class(train: np.ndarray):
    image = train.astype(float)
    background = np.median(image, axis=(1, 2), keepdims=True)
    garment = np.where(image > (background + image.max((1, 2), keepdims=True)) / 2, 1.0, 0.0)
    mass = garment.sum((1, 2))
    x = (garment.sum(1) @ np.arange(28) / mass).reshape(-1, 10)
    y = (garment.sum(2) @ np.arange(28) / mass).reshape(-1, 10)
    for centre in (x, y):
        assert (np.ptp(centre, axis=0) > 6).all()
        assert (np.abs(centre.mean(axis=0) - 13.5) < 3).all()


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_garment_lies_inside_the_image(name: str):
    for seed in range(50):
        rng = random.Random(seed)
        outlines = [outline for outline, _ in garments.place(rng, DRAWINGS[name](rng))]
        points = np.array([point for outline in outlines for point in outline])
        assert points.min() >= 0.5 - 1e-9
        assert points.max() <= 27.5 + 1e-9
        assert 9 < np.ptp(points, axis=0).max() < 27
        assert fill(outlines).max() == 1  # more: an outline crosses itself


def test_classes_differ_in_shape():
    """The garments of two classes, drawn without turn and noise, are never nearly equal."""
    pictures = []
    for name in CLASS_NAMES:
        layers = DRAWINGS[name](random.Random(0))
        scaled = [([(14 + 9 * x, 14 + 9 * y) for x, y in line], tone) for line, tone in layers]
        pictures.append(garments.paint(scaled))
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert np.abs(first - second).mean() > 0.03


# ---------------------------------------------------------------------------------------- fill


def area(outline: list) -> float:
    x, y = np.array(outline).T
    return abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2


def test_fill_measures_parts_of_pixels():
    expected = np.zeros((28, 28))
    expected[3:6, 2:5] = [[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]
    np.testing.assert_array_equal(fill([garments.box(2.5, 3.5, 4.5, 5.5)]), [expected])


@pytest.mark.parametrize("seed", range(5))
def test_fill_covers_the_area_of_an_outline(seed: int):
    rng = random.Random(seed)
    for name in CLASS_NAMES:
        outlines = [outline for outline, _ in garments.place(rng, DRAWINGS[name](rng))]
        for outline, covered in zip(outlines, fill(outlines).sum((1, 2)), strict=True):
            # Measured along lines a quarter of a pixel apart.
            width = np.ptp([x for x, _ in outline])
            assert abs(covered - area(outline)) < 0.25 * width + 0.05


def test_fill_is_independent_of_the_direction_and_the_start():
    outline = garments.curve((2.0, 3.0), (25.0, 4.0), (20.0, 24.0))
    other = [*outline[3:], *outline[:3]][::-1]
    first, second = fill([outline, other])
    np.testing.assert_array_equal(first, second)


def test_outlines_that_share_an_edge_leave_no_gap():
    corners, middle = [(1.0, 2.0), (26.3, 1.1), (25.2, 26.7), (2.9, 24.4)], (13.7, 12.4)
    parts = [[corners[i], corners[(i + 1) % 4], middle] for i in range(4)]
    np.testing.assert_allclose(fill(parts).sum(0), fill([corners])[0], atol=1e-12)


def test_hole_between_two_edges_of_one_outline():
    ring = [(4, 4), (20, 4), (20, 20), (4, 20), (4, 4), (8, 8), (8, 16), (16, 16), (16, 8), (8, 8)]
    (covered,) = fill([[(float(x), float(y)) for x, y in ring]])
    expected = np.zeros((28, 28))
    expected[4:20, 4:20] = 1
    expected[8:16, 8:16] = 0
    np.testing.assert_array_equal(covered, expected)


# ---------------------------------------------------------------------------------------- TFDS

PREPARE = """
import json, sys, numpy as np
from cnn_jax.data.garments import Garments

builder = Garments(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
report = {"names": builder.info.features["label"].names, "keys": builder.info.supervised_keys}
for split in ("train", "test"):
    examples = [(e["image"], int(e["label"])) for e in builder.as_data_source(split)]
    np.save(f"{sys.argv[1]}/{split}.npy", np.stack([image for image, _ in examples]))
    report[split] = [label for _, label in examples]
report["tensorflow"] = "tensorflow" in sys.modules
with open(f"{sys.argv[1]}/report.json", "w") as file:
    json.dump(report, file)
"""


def test_whole_dataset_without_tensorflow(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["tensorflow"]
    assert tuple(report["names"]) == CLASS_NAMES
    assert report["keys"] == ["image", "label"]
    images = {split: np.load(tmp_path / f"{split}.npy") for split in ("train", "test")}
    for split, count in (("train", 12_000), ("test", 2_000)):
        assert images[split].shape == (count, 28, 28, 1)
        assert images[split].dtype == np.uint8
        assert np.bincount(report[split]).tolist() == [count // 10] * 10
        # In order of class it would be a tenth or all of them, shuffled about a tenth.
        labels = np.array(report[split])
        assert 0.08 < (labels[1:] == labels[:-1]).mean() < 0.12
        assert 0.08 < ((labels[1:] - labels[:-1]) % 10 == 1).mean() < 0.12
    hashes = {split: {image.tobytes() for image in images[split]} for split in images}
    assert len(hashes["train"] | hashes["test"]) == 14_000
    # The label stays with its image.
    stored = {image.tobytes(): k for image, k in zip(images["test"], report["test"], strict=True)}
    for i in range(100):
        image, label = draw_example("test", i)
        assert stored[image.tobytes()] == label


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(garments, "EXAMPLES", {"train": 40, "test": 20})


def prepare(data_dir: Path) -> Garments:
    with tfds_builder.quiet():
        builder = Garments(data_dir=str(data_dir), file_format="array_record")
        builder.download_and_prepare()
    return builder


def stored_labels(builder: Garments) -> dict[str, list[int]]:
    with tfds_builder.quiet():
        sources = {split: builder.as_data_source(split) for split in ("train", "test")}
        return {s: [int(example["label"]) for example in sources[s]] for s in sources}


def test_prepared_twice_in_the_same_order(small: None, tmp_path: Path):
    first, second = prepare(tmp_path / "a"), prepare(tmp_path / "b")
    assert stored_labels(first) == stored_labels(second)


def test_interrupted_preparation(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(split: str, index: int):
        if (split, index) == ("test", 5):
            raise KeyboardInterrupt
        return draw_example(split, index)

    with monkeypatch.context() as patch:
        patch.setattr(garments, "draw_example", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path)
    # What a killed process leaves, which has no time to remove anything.
    leftover = tmp_path / "garments" / "incomplete.ABCDEF_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "garments-train.array_record-00000-of-00001").write_bytes(b"half of")
    labels = stored_labels(prepare(tmp_path))
    assert {split: len(found) for split, found in labels.items()} == {"train": 40, "test": 20}


def test_two_preparations_at_once(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The second begins and ends while the first one draws."""
    finished = []

    def slow(split: str, index: int):
        if (split, index) == ("train", 20) and not finished:
            finished.append(True)
            finished.append(prepare(tmp_path))
        return draw_example(split, index)

    monkeypatch.setattr(garments, "draw_example", slow)
    with pytest.raises(FileExistsError, match="already exists"):
        prepare(tmp_path)
    assert len(finished) == 2
    monkeypatch.undo()
    labels = stored_labels(Garments(data_dir=str(tmp_path)))
    assert {split: len(found) for split, found in labels.items()} == {"train": 40, "test": 20}
    assert [p.name for p in (tmp_path / "garments").iterdir()] == ["1.0.0"]
