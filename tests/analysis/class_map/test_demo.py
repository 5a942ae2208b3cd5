"""A class map against the dense network, cut by cut; and the command that shows it."""

import json
import re

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from cnn_jax import main, models
from cnn_jax.analysis.class_map import demo, sliding_windows
from cnn_jax.analysis.convert import as_convolutions
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import summary
from cnn_jax.models.layers import Conv, Dense, Flatten
from cnn_jax.models.receptive_field import Field
from cnn_jax.train import loop
from tests.quick import make_run, unoptimised
from tests.tiny import make_examples

GRAY, COLOUR = (28, 28, 1), (32, 32, 3)


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def noise(height, width, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def closeness(found, expected):
    """The largest difference, as a share of the largest logit."""
    return np.abs(found - expected).max() / np.abs(expected).max()


# ------------------------------------------- what sliding_windows.py says a score is equal to


@pytest.mark.parametrize(
    ("model", "own", "canvas"),
    [
        (models.LeNet(), GRAY, (70, 61)),
        (models.StridedCNN(), GRAY, (61, 70)),
        (models.SamePaddingCNN(), GRAY, (90, 101)),  # maps of odd size are padded otherwise
        (models.CifarCNN(), COLOUR, (109, 120)),
        (models.SpeedrunCNN(), COLOUR, (121, 101)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "apply") else None,
)
def test_a_score_is_the_dense_networks_on_its_window_without_padding(model, own, canvas, tmp_path):
    run = make_run(tmp_path, model, own, data=DataConfig("x", mean=(0.4,), std=(0.3,)))
    made = as_convolutions(run)
    image = noise(*canvas, own[2])
    scores = sliding_windows.on_whole_images(made)(image[None])[0]
    field = summary.summarise(made.model, image.shape).field
    assert scores.shape[:2] == field.places
    places = sliding_windows.spread(field.inside(canvas))
    assert len(places) > 3
    windows = sliding_windows.on_windows(run, padding=False)
    expected = windows(image, places * field.stride + field.start, field.size)
    assert closeness(scores[tuple(places.T)], expected) < 1e-5
    # Not because all windows look the same to such a network.
    assert closeness(scores[tuple(places[::-1].T)], expected) > 1e-3


def test_same_padding_gives_another_number_for_a_window_of_the_trainings_size(tmp_path):
    run = make_run(tmp_path, models.SamePaddingCNN(), GRAY)
    made = as_convolutions(run)
    image = noise(60, 60)
    scores = sliding_windows.on_whole_images(made)(image[None])[0]
    cut = sliding_windows.on_windows(run)(image, np.array([[16, 16]]), (28, 28))[0]
    assert closeness(scores[4, 4], cut) > 0.01


class Strided(nn.Module):
    """Padding in the first layer alone, where black pixels do as well."""

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(Flatten()(nn.relu(Conv(4, (5, 5), strides=4, padding="SAME")(image))))


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize("side", [84, 85, 86, 87])
def test_the_window_that_a_score_stands_for(side, shift, tmp_path):
    """An image on black has the score that it has alone, if it lies in the window of one."""
    run = make_run(tmp_path, Strided())
    made = as_convolutions(run)
    image, at = noise(*GRAY), 24 + shift
    canvas = np.zeros((side, side, 1), np.uint8)
    canvas[at : at + 28, at : at + 28] = image
    alone = sliding_windows.on_whole_images(run)(image[None])[0]
    scores = sliding_windows.on_whole_images(made)(canvas[None])[0]
    fields = [summary.summarise(made.model, shape).field for shape in (canvas.shape, GRAY)]
    frames = sliding_windows.frames(*fields, GRAY[:2])
    places = [*np.ndindex(*frames.places)]
    equal = [place for place in places if closeness(scores[place], alone) < 1e-5]
    assert equal == [place for place in places if frames.origin(*place) == (at, at)]
    # 'same' padding of 0, 2, 1 and 1 pixels before images of these sizes.
    assert len(equal) == ((at + [0, 2, 1, 1][side - 84]) % 4 == 0)


def test_places_are_spread_over_all_when_there_are_too_many(monkeypatch):
    ranges = range(2, 5), range(7, 11)
    every = sliding_windows.spread(ranges)
    assert [*map(tuple, every)] == [(r, c) for r in ranges[0] for c in ranges[1]]
    monkeypatch.setattr(sliding_windows, "MOST_WINDOWS", 5)
    few = [*map(tuple, sliding_windows.spread(ranges))]
    assert len(set(few)) == 5
    assert (few[0], few[-1]) == ((2, 7), (4, 10))
    assert set(few) < {*map(tuple, every)}


def test_windows_of_more_than_a_batch(tmp_path):
    run = make_run(tmp_path, models.MLP())
    image, origins = noise(40, 40), np.argwhere(np.ones((11, 11)))
    found = sliding_windows.on_windows(run)(image, origins, (28, 28))
    cut = np.stack([image[r : r + 28, c : c + 28] for r, c in origins])
    assert closeness(found, sliding_windows.on_whole_images(run)(cut)) < 1e-5


# ------------------------------------------------------------------------------- the canvas


@pytest.mark.parametrize("background", [(7,), (7, 8, 9)])
def test_the_canvas_holds_every_image_once(background):
    examples = make_examples(60, (10, 12, 3))
    canvas = demo.compose(examples, 125, background)
    assert len(canvas.places) == len(canvas.labels) == (125 // 20) * (125 // 24)
    rest = canvas.image.copy()
    for i, (row, column) in enumerate(canvas.places):
        part = np.s_[row : row + 10, column : column + 12]
        np.testing.assert_array_equal(rest[part], examples.image[i])
        assert examples.label[i] == canvas.labels[i]
        rest[part] = background
    assert (rest == np.array(background)).all()
    assert len({*map(tuple, canvas.places % [20, 24])}) > 10  # not all in the same corner
    assert len(demo.compose(examples, 400).places) == 60


# ------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, splits):
    folder = tmp_path_factory.mktemp("run")
    config = Config(models.LeNet(), DataConfig("tiny_squares"), epochs=6, batch_size=16, devices=1)
    loop.train(config, folder, "fashion_mnist/lenet", splits=splits)
    return folder


def command(*arguments):
    return main.main(["class_map", *map(str, arguments)])


def error(caplog):
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "\n" not in line
    return line.removeprefix("error: ")


def test_the_command(workdir, tfds_dir, capsys):
    flags = (f"--workdir={workdir}", f"--data_dir={tfds_dir}", "--canvas=250", "--rounds=1")
    assert command(*flags) == 0
    report = json.loads((workdir / "class_map" / "class_map.json").read_text())
    assert (report["images"], report["canvas"]) == (16, 250)  # 4 x 4 cells of 56 pixels
    assert report["scores"] == [(250 - 28) // 4 + 1] * 2
    assert (report["window"], report["stride"], report["start"]) == ([32, 32], [4, 4], [-2, -2])
    assert report["largest_difference"] <= 1e-5 * report["largest_logit"]
    assert report["cut_out"] == report["cut_out_compared"] == 56**2
    assert report["windows"] == 55**2  # those that lie inside; two pixels are padding
    assert 0.8 < report["cut_out_same_class"] <= 1
    assert report["found"] <= report["images"]
    assert report["recognised_alone"] >= 12
    assert report["found"] >= 8
    assert report["speed_ratio"] == report["sliding_seconds"] / report["map_seconds"] > 1
    # A window costs 834,720 FLOPs; the map's layers are counted by hand, place by place.
    conv_0, conv_1 = 2 * 25 * 6 * 250**2, 2 * 25 * 6 * 16 * 121**2
    dense = 2 * (400 * 120 + 120 * 84 + 84 * 10) * 56**2
    assert report["flops_ratio"] == pytest.approx(56**2 * 833_040 / (conv_0 + conv_1 + dense), 1e-2)
    output = capsys.readouterr().out
    assert f"found where they are: {report['found']} of 16; " in output
    assert re.search(r"those windows [\d.]+: [\d.]+ times as long \(median of 1, in turn\)", output)
    with Image.open(workdir / "class_map" / "class_map.png") as picture:
        assert picture.size[0] > 1000


def test_what_is_found_is_what_the_map_says(workdir, tfds_dir, tmp_path):
    """Counted again from the network, with the map's scores at the nearest places."""
    from cnn_jax.analysis.restore import load_run
    from cnn_jax.data import sources

    run = load_run(workdir)
    report = demo.demonstrate(run, tmp_path, 230, 1, str(tfds_dir))
    canvas = demo.compose(sources.load_examples(run.data, "test", str(tfds_dir)), 230)
    scores = sliding_windows.on_whole_images(as_convolutions(run))(canvas.image[None])[0]
    found = 0
    for (row, column), label in zip(canvas.places, canvas.labels, strict=True):
        i, j = (min(round(place / 4), 50) for place in (row, column))
        found += scores[i, j].argmax() == label
    assert (report["found"], report["images"]) == (found, 16)


def test_fully_conv_needs_no_conversion(tmp_path, tfds_dir):
    run = make_run(tmp_path, models.FullyConvCNN())
    report = demo.demonstrate(run, tmp_path / "new", 60, 1, str(tfds_dir))
    assert report["model"] == "FullyConvCNN"
    assert report["largest_difference"] <= 1e-5 * report["largest_logit"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "class_map.json",
        "class_map.png",
    ]


@pytest.mark.parametrize(
    ("flag", "code", "said"),
    [
        ("--canvas=55", 2, "--canvas=55: must be from 56 to 2048 pixels"),
        ("--canvas=2049", 2, "--canvas=2049: must be from 56 to 2048 pixels"),
        ("--canvas=big", 2, "--canvas=big: must be a whole number"),
        ("--rounds=0", 2, "--rounds=0: must be at least 1"),
        ("--output={}/file", 2, "--output={}/file: {}/file is a file; name a folder"),
        ("--checkpoint=77", 4, "--checkpoint=77: "),
        ("--data_dir={}", 3, "data.name=tiny_squares: "),
    ],
)
def test_what_the_command_refuses(workdir, tmp_path, tfds_dir, caplog, flag, code, said):
    (tmp_path / "file").write_text("x")
    flags = [f"--workdir={workdir}", flag.format(tmp_path)]
    flags += [] if "data_dir" in flag else [f"--data_dir={tfds_dir}"]
    assert command(*flags) == code
    assert error(caplog).startswith(said.replace("{}", str(tmp_path)))


def test_a_network_that_is_no_chain(tmp_path):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            return nn.Conv(10, (28, 28), padding="VALID")(
                nn.GroupNorm(1)(nn.Conv(2, (1, 1))(image))
            )

    run = make_run(tmp_path, Own())
    with pytest.raises(ConfigError, match="class_map needs a network whose layers form a chain"):
        demo.demonstrate(run, tmp_path / "new", 60)


def test_frames():
    whole = Field((9, 9), (37, 37), (4, 4), (-7, -3))
    alone = Field((1, 1), (37, 37), (4, 4), (-3, -3))
    frames = sliding_windows.frames(whole, alone, (28, 28))
    assert frames == Field((9, 9), (28, 28), (4, 4), (-4, 0))
