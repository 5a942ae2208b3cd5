"""Images beside the maps of what their class depends on."""

import numpy as np
import pytest
from PIL import Image

from cnn_jax import main
from cnn_jax.analysis.attribution import picture
from cnn_jax.common.images import SEQUENTIAL
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP
from cnn_jax.train import loop
from tests.networks import Linear
from tests.quick import make_run, unoptimised
from tests.tiny import make_examples

SHAPE = (12, 10, 3)


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def save(path, colour, size=(10, 12)):
    Image.new("RGB", size, colour).save(path)
    return str(path)


def share(path, colour):
    """The share of the pixels of a picture that have nearly this colour."""
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    return (np.abs(pixels - colour).max(-1) < 12).mean()


def test_tiles_have_a_row_for_each_image():
    grey = make_examples(3).image
    drawn = picture.tiles(grey, {"a": np.zeros((3, 28, 28)), "b": np.ones((3, 28, 28))})
    assert drawn.shape[2] == 4
    assert drawn.shape[0] == drawn.shape[1]  # three rows of three


def test_a_file_and_the_only_pixel_that_its_class_depends_on(tmp_path):
    run = make_run(tmp_path, Linear(), SHAPE)
    kernel = run.variables["params"]["Dense_0"]["kernel"]
    kernel[:] = 0
    kernel.reshape(*SHAPE, 10)[7, 4, :, 3] = 1
    red, highest = (200, 30, 20), SEQUENTIAL[-1]
    drawn = picture.of_files(run, [save(tmp_path / "a.png", red, (40, 48))], tmp_path / "out")
    assert drawn == tmp_path / "out" / "attribution.png"
    # The image is as large as each of its two maps. In that of the saliency one pixel of 120 is bright;
    # in that of the occlusion one window of 2 x 2 has it in the middle.
    assert 0.05 < share(drawn, red) < 0.4
    assert 1 / 130 < share(drawn, highest) / share(drawn, red) < 10 / 120
    other = run.variables["params"]["Dense_0"]["bias"]
    other[5] = 1e6  # the class whose score depends on no pixel
    drawn = picture.of_files(run, [save(tmp_path / "a.png", red)], tmp_path / "out")
    assert share(drawn, highest) == 0


@pytest.mark.parametrize("count", [1, picture.MOST + 2])
def test_the_command_draws_the_first_that_can_be_read(tmp_path, splits, caplog, capsys, count):
    config = Config(MLP(), DataConfig("tiny"), epochs=1, eval_batch_size=20)
    loop.train(config, tmp_path / "run", splits=splits)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    for i in range(1, count + 1):
        save(tmp_path / "images" / f"{i:02}.png", (10, 20, 30))
    code = main.main(["predict", str(tmp_path / "run"), str(tmp_path / "images"), "--attribution"])
    assert code == 3  # for the broken file
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"written to {tmp_path}/run/predictions/attribution.png"
    with Image.open(tmp_path / "run" / "predictions" / "attribution.png") as file:
        assert (file.size[1] > 3 * file.size[0]) == (count > 1)
    told = [text for text in caplog.messages if "--attribution" in text]
    most = f"warning: --attribution draws the first {picture.MOST} of {count} images"
    assert told == [most] * (count > 1)
    assert len([text for text in caplog.messages if "/0.png" in text]) == 1
