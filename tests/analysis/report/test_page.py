"""The page of one run: its numbers, its pictures, its escaping, and what it refuses."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.analysis import evaluate, restore
from cnn_jax.analysis.report import page, run_data
from cnn_jax.cli import commands
from cnn_jax.common.errors import CnnJaxError
from cnn_jax.config import DataConfig, experiment
from cnn_jax.config.serialize import to_json
from cnn_jax.data import sources
from cnn_jax.data.splits import Splits
from cnn_jax.models import LeNet
from cnn_jax.train import loop
from tests.analysis.report.conftest import HOSTILE
from tests.analysis.report.pages import Page, picture_of, pixels
from tests.tiny import CLASS_NAMES, make_examples, run_command


def by(*sizes: int) -> str:
    """ "28 x 28 x 1", as the page writes it."""
    return " \u00d7 ".join(map(str, sizes))


def test_its_result_is_that_of_evaluate(lenet: Path, lenet_page: Path, tfds_dir: Path):
    expected = evaluate.evaluate(restore.load_run(lenet), data_dir=str(tfds_dir))
    found = run_data.gather(lenet, data_dir=str(tfds_dir))
    assert found.result.confusion.tolist() == expected["confusion_matrix"]
    assert found.result.loss == pytest.approx(expected["loss"], rel=1e-6)
    assert found.result.accuracy == expected["accuracy"]
    text = Page(lenet_page).text()
    right = round(48 * expected["accuracy"])
    assert f"{right} of 48 test examples" in text
    assert f"test accuracy {100 * expected['accuracy']:.1f} %" in text
    assert "parameters 61,706" in text


def test_its_mistakes_are_the_most_confident_ones(lenet: Path, lenet_page: Path, tfds_dir: Path):
    test = sources.load_examples(DataConfig("tiny_squares"), "test", str(tfds_dir))
    run = restore.load_run(lenet)
    logits = np.asarray(LeNet().apply(run.variables, test.image / np.float32(255)), np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    chances = odds / odds.sum(1, keepdims=True)
    wrong = [i for i in range(48) if chances[i].argmax() != test.label[i]]
    wrong.sort(key=lambda i: -chances[i].max())
    shown = Page(lenet_page).root.findall(".//ul[@class='examples']/li")
    assert len(shown) == min(len(wrong), 12) > 0
    for place, item in zip(wrong, shown, strict=False):
        text = " ".join("".join(item.itertext()).split())
        true, taken = CLASS_NAMES[test.label[place]], CLASS_NAMES[chances[place].argmax()]
        assert text.startswith(f"{true} taken for {taken} {100 * chances[place].max():.1f}")
        assert text.endswith(f"test image {place}")


def test_a_mistake_is_shown_as_the_image_it_is(lenet_page: Path, tfds_dir: Path):
    test = sources.load_examples(DataConfig("tiny_squares"), "test", str(tfds_dir))
    item = Page(lenet_page).root.find(".//ul[@class='examples']/li")
    place = int("".join(item.itertext()).split()[-1])
    picture = pixels(picture_of(item)[1])
    assert picture.shape[:2] == (112, 112)
    np.testing.assert_array_equal(picture[::4, ::4, 0], test.image[place, :, :, 0])


def test_everything_is_inside_the_file(lenet_page: Path):
    page = Page(lenet_page)
    assert lenet_page.stat().st_size < 3e6
    assert "http" not in page.source.partition("<body>")[2]
    for tag in ("script", "iframe", "object"):
        assert page.root.find(f".//{tag}") is None
    assert [link.get("href") for link in page.root.iter("link")] == ["data:,"]
    pictures = page.pictures()
    assert all(len(alt) > 10 for alt, _ in pictures)
    files = {path.read_bytes() for path in (lenet_page.parent / "pictures").iterdir()}
    assert files == {png for _, png in pictures}


def test_charts_have_a_dark_form_on_a_dark_ground(lenet_page: Path):
    page = Page(lenet_page)
    charts = page.root.findall(".//figure[@class='chart']")
    assert len(page.dark_pictures()) == len(charts) == 5
    assert all(pixels(png)[0, 0, :3].max() < 40 for png in page.dark_pictures())
    assert all(pixels(picture_of(chart)[1])[0, 0, :3].min() == 255 for chart in charts)


def test_every_figure_says_what_to_look_for(lenet_page: Path, comparison_page: Path):
    for file in (lenet_page, comparison_page):
        captions = [
            " ".join("".join(caption.itertext()).split())
            for caption in Page(file).root.findall(".//figure[@class='chart']/figcaption")
        ]
        assert captions
        assert all(caption.count(".") == 1 and caption.endswith(".") for caption in captions)


def test_the_way_of_the_sizes_is_told(lenet_page: Path, strided_page: Path):
    assert "28 → 14 → 10 → 5: " in Page(lenet_page).text()
    text = Page(strided_page).text()
    assert "28 → 26 → 12 → 10 → 4 → 2: " in text
    assert "a stride of 2" in text
    assert "pooling" not in text
    for size in ((26, 26, 32), (12, 12, 64), (2, 2, 512)):
        assert by(*size) in text


def test_the_layers_add_up(lenet_page: Path):
    rows = Page(lenet_page).rows("Every layer")
    assert [row[0] for row in rows][-3:] == ["Dense_0 Dense", "Dense_1 Dense", "Dense_2 Dense"]
    assert sum(int(row[2].replace(",", "") or 0) for row in rows) == 61_706
    # 5x5, a pooling, 5x5 at every other pixel, a pooling: 5, 5 + 1, 6 + 4 * 2, 14 + 1 * 2.
    assert [row[1] for row in rows[:4]] == [
        f"{by(28, 28, 6)} sees {by(5, 5)}",
        f"{by(14, 14, 6)} sees {by(6, 6)}",
        f"{by(10, 10, 16)} sees {by(14, 14)}",
        f"{by(5, 5, 16)} sees {by(16, 16)}",
    ]


def test_its_command_gives_the_same_run(lenet: Path, lenet_page: Path, tfds_dir: Path):
    command = Page(lenet_page).root.find(".//code").text
    words = shlex.split(command)
    assert words[:2] == ["./launch.sh", "train"]
    values = commands.find("train").parse([word for word in words[2:] if word != "\n"])
    again = experiment.load(values.experiment, values.set)
    saved = json.loads((lenet / "config.json").read_text())["config"]
    assert json.loads(json.dumps(to_json(again))) == saved
    assert values.workdir == str(lenet)


def test_the_command_names_what_it_cannot_say(lenet: Path):
    saved = json.loads((lenet / "config.json").read_text())
    saved["config"]["optimizer"] = "optax.sgd"
    command, note = run_data.command_of(lenet, saved)
    assert "optax" not in command
    assert "optimizer" in note
    command, note = run_data.command_of(lenet, saved | {"experiment": "gone"})
    assert "--experiment=gone" in command
    assert "not found" in note


def test_a_workdir_names_no_file_to_run(lenet: Path, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    saved = json.loads((lenet / "config.json").read_text()) | {"experiment": str(file)}
    _, note = run_data.command_of(lenet, saved)
    assert "not found" in note
    assert not (tmp_path / "ran").exists()


def test_an_earlier_checkpoint(lenet: Path, tfds_dir: Path):
    expected = evaluate.evaluate(restore.load_run(lenet, "10"), data_dir=str(tfds_dir))
    found = run_data.gather(lenet, "10", data_dir=str(tfds_dir))
    assert found.result.confusion.tolist() == expected["confusion_matrix"]
    first, _ = (json.loads(line) for line in (lenet / "metrics.jsonl").read_text().splitlines())
    assert found.seconds == first["epoch_seconds"]


def test_a_run_stopped_in_its_first_epoch(strided: Path, tfds_dir: Path, tmp_path: Path):
    workdir = tmp_path / "stopped"
    shutil.copytree(strided, workdir)
    (workdir / "metrics.jsonl").unlink()
    found = Page(page.report([workdir], data_dir=str(tfds_dir)))
    assert found.file == workdir / "report" / "index.html"
    assert "Finished so far: 0 of 1 epoch." in found.text()
    assert "no curves" in found.text()
    assert "What it gets right" in found.sections()


def test_hostile_names_are_only_text(hostile_pages: tuple[Path, Path]):
    one, both = map(Page, hostile_pages)
    for found in (one, both):
        assert found.root.find(".//script") is None
        assert not [element for element in found.root.iter() if "onerror" in element.attrib]
    assert one.root.find(".//h1").text == HOSTILE[0]
    assert one.root.find(".//title").text == HOSTILE[0]
    confused = {cell for row in one.rows("frequent mistakes") for cell in row[:2]}
    assert confused <= {" ".join(name.split()) for name in HOSTILE}
    # Both have the same experiment, so their folders name them.
    assert {row[0].split()[0] for row in both.rows("most accurate")} == {"lenet", "strided"}


class Own(nn.Module):
    """A model that is not one of the project's: GELU, a branch, a head without Flatten."""

    num_classes: int = 12

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        x = nn.gelu(nn.Conv(12, (3, 3), strides=2, name="eyes")(image), approximate=False)
        x = x + nn.Conv(12, (1, 1), name="branch")(x)
        x = nn.remat(nn.Dense)(16)(x.mean((1, 2)))
        return nn.Dense(self.num_classes)(jnp.tanh(x))


EXPERIMENT = """
from cnn_jax.config import Config, DataConfig
from tests.analysis.report.test_page import Own


def config() -> Config:
    return Config(model=Own(), data=DataConfig("colours"), epochs=1, batch_size=16, devices=1)
"""


def test_a_model_of_ones_own_on_colour_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.py"
    file.write_text(EXPERIMENT)
    colours = make_examples(32, (24, 20, 3))
    workdir = tmp_path / "mine"
    loop.train(experiment.load(str(file)), workdir, "mine", splits=Splits(colours, None, colours))
    monkeypatch.setattr(run_data.sources, "load_examples", lambda *_: colours)
    with pytest.raises(CnnJaxError, match="--experiment") as refused:
        page.report([workdir])
    assert refused.value.exit_code == 2
    found = Page(page.report([workdir], own=str(file)))
    text = found.text()
    assert f"--experiment={file}" in text
    assert f"12 kernels of eyes, {by(3, 3, 3)} weights each" in text
    assert by(12, 10, 12) in text
    # Twelve logits for ten classes: the two without examples are no classes of the matrix.
    assert "Accuracy of 10 classes" in " ".join(alt for alt, _ in found.pictures())


class Wrapped(nn.Module):
    """Its layers run inside a transformation, where nobody can look on."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        return nn.remat(LeNet)()(image)


def test_layers_that_cannot_be_followed(lenet: Path, tfds_dir: Path):
    run = run_data.gather(lenet, data_dir=str(tfds_dir))
    variables = {"params": {"CheckpointLeNet_0": run.run.variables["params"]}}
    model = Wrapped()
    hidden = dataclasses.replace(run.run, model=model, variables=variables)
    whole = dataclasses.replace(
        run, run=hidden, summary=run_data.summary.summarise(model, (28, 28, 1))
    )
    values, _ = page.one_run.content(whole)
    assert values["stages"] == []
    assert "What each layer" not in page._render("run.html.j2", values)


# ---------------------------------------------------------------------------------- refusals


def refusal(*arguments: str) -> CnnJaxError:
    """What `report` ends with."""
    command = commands.find("report")
    with pytest.raises(CnnJaxError) as caught:
        command.run(command.parse(arguments))
    assert "\n" not in str(caught.value)
    return caught.value


def test_no_run(tmp_path: Path):
    error = refusal(f"--workdir={tmp_path / 'none'}")
    assert error.exit_code == 4
    assert str(tmp_path / "none") in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs", [2, 0])
def test_no_checkpoint(lenet: Path, tmp_path: Path, tfds_dir: Path, epochs: int):
    saved = json.loads((lenet / "config.json").read_text())
    saved["config"]["epochs"] = epochs
    (tmp_path / "config.json").write_text(json.dumps(saved))
    error = refusal(f"--workdir={tmp_path}", f"--data_dir={tfds_dir}")
    assert error.exit_code == 4
    assert f"{tmp_path / 'checkpoints'}: holds no checkpoint" in str(error)
    assert not (tmp_path / "report").exists()


def test_another_checkpoint_than_there_is(lenet: Path):
    error = refusal(f"--workdir={lenet}", "--checkpoint=3")
    assert error.exit_code == 4
    assert "10, 20" in str(error)


def test_no_data(lenet: Path, tmp_path: Path):
    error = refusal(f"--workdir={lenet}", f"--data_dir={tmp_path}", f"--output={tmp_path / 'out'}")
    assert error.exit_code == 3
    assert "tiny_squares" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_an_output_that_is_a_file(lenet: Path, tmp_path: Path, tfds_dir: Path, below: str):
    file = tmp_path / "file"
    file.write_text("precious")
    error = refusal(f"--workdir={lenet}", f"--data_dir={tfds_dir}", f"--output={file / below}")
    assert error.exit_code == 2
    assert f"{file} is a file" in str(error)
    assert file.read_text() == "precious"


def test_the_command(strided: Path, tfds_dir: Path, tmp_path: Path):
    done = run_command(
        "report", f"--workdir={strided}", f"--data_dir={tfds_dir}", f"--output={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written to {tmp_path / 'out' / 'index.html'}\n"
    assert "fashion_mnist/strided" in Page(tmp_path / "out" / "index.html").text()
