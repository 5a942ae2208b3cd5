"""The command data: what it says of a dataset, and its contact sheet."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from cnn_jax import main
from cnn_jax.analysis import dataset
from cnn_jax.config import Config, DataConfig
from cnn_jax.data.examples import InMemory
from cnn_jax.models import MLP


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of colour images in two sizes, with a broken file and a twin."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2), ("test", 3)):
        for name in ("rose", "daisy"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (20 + i, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos/train/rose/0.png").write_bytes(b"broken")
    shutil.copy("photos/train/rose/1.png", "photos/test/daisy/twin.png")
    return tmp_path


def test_what_is_said_of_a_folder(photos, capsys):
    assert main.main(["data", "photos", "--set", "data.flip=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["class", "train", "validation", "test"],
        ["0", "daisy", "9", "2", "4"],
        ["1", "rose", "8", "2", "3"],
        ["all", "17", "4", "7"],
    ]
    said = "\n".join(lines[4:])
    assert "images: 22x22x3; files: 20x24 the smallest, 22x24 the median, 28x24 the largest" in said
    assert f"broken: 1\n  {photos}/photos/train/rose/0.png: cannot be read (" in said
    twin = "train/rose/1.png (train, rose) = test/daisy/twin.png (test, daisy)"
    assert f"twins, equal in all pixels: 1\n  {twin}\n" in said
    assert "1 are in two splits, 1 in two classes" in said
    assert "--set data.image_size=22,22 --set model.num_classes=2 --set data.mean=0." in said
    assert "--set data.skip_corrupt=all" in said
    assert lines[-1] == "written to runs/data/photos/contact_sheet.png"
    sheet = np.asarray(Image.open("runs/data/photos/contact_sheet.png"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100


def test_what_is_said_of_a_tfds_dataset(tfds_dir, tmp_path, capsys):
    line = ["data", "tiny_squares", f"--data_dir={tfds_dir}", f"--output={tmp_path}/new"]
    assert main.main(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nall +160 +48\n", said)
    assert "images: 28x28x1\n" in said
    assert "twins, equal in all pixels: 0" in said
    assert "num_classes" not in said
    assert (tmp_path / "new" / "contact_sheet.png").is_file()


@pytest.mark.parametrize("fields", [{}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.1)}])
def test_the_sheet_has_what_the_step_sees(fields):
    image = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 3), np.uint8)
    train = InMemory(image, np.zeros(40, np.int32), ("a",))
    index = np.arange(40)[::2]

    def seen(**more):
        config = Config(MLP(), DataConfig("x", **fields, **more))
        return dataset._as_the_step_sees(config, train, index)

    assert np.array_equal(seen(), image[index])
    flipped = seen(flip=True)
    as_it_is = (flipped == image[index]).all((1, 2, 3))
    assert np.array_equal(flipped[~as_it_is], image[index][~as_it_is, :, ::-1])
    assert 0 < as_it_is.sum() < len(index)
