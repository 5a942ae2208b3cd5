"""A converted workdir is a workdir: every command that reads one gives what it gave before."""

import csv
import json
import re
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnn_jax import main, models
from cnn_jax.analysis import convert, evaluate, restore
from cnn_jax.analysis.report import run_data
from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Dense, Flatten
from cnn_jax.train import loop
from cnn_jax.train.checkpoint import Checkpoints
from tests.quick import make_run, unoptimised
from tests.tiny import make_examples

OWN = '''"""A network of one's own."""

import flax.linen as nn

from cnn_jax.config import Config, DataConfig
from cnn_jax.models.layers import Dense, Flatten


class Own(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(Flatten()(nn.relu(nn.Conv(1, (3, 3), strides=4)(image))))


def config():
    return Config(model=Own(), data=DataConfig("tiny_squares"), epochs=1, devices=1)
'''


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, splits):
    """LeNet after two epochs, each with a checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "lenet"
    config = Config(
        models.LeNet(),
        DataConfig("tiny_squares", mean=(0.3,), std=(0.5,)),
        epochs=2,
        batch_size=16,
        eval_batch_size=20,
        devices=1,
    )
    loop.train(config, workdir, "fashion_mnist/lenet", splits=splits)
    return workdir


@pytest.fixture(scope="module")
def converted(trained):
    workdir = trained.parent / "converted"
    assert command("convert", f"--workdir={trained}", f"--output={workdir}") == 0
    return workdir


def command(*arguments):
    return main.main([*map(str, arguments)])


def error(caplog):
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "\n" not in line
    return line.removeprefix("error: ")


def evaluation(workdir, data_dir):
    assert command("evaluate", f"--workdir={workdir}", f"--data_dir={data_dir}") == 0
    return json.loads((workdir / "evaluation.json").read_text())


def test_evaluate(trained, converted, tfds_dir):
    before, after = evaluation(trained, tfds_dir), evaluation(converted, tfds_dir)
    assert before.pop("loss") == pytest.approx(after.pop("loss"), rel=1e-5)
    assert before == after
    assert after["accuracy"] > 0.2


def test_predict_and_its_class_map(trained, converted, tmp_path):
    examples = make_examples(3, seed=5)
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(examples.image[i, :, :, 0]).save(tmp_path / "images" / f"{i}.png")
    rows = []
    for workdir in (trained, converted):
        out = tmp_path / workdir.name
        flags = (f"--images={tmp_path}/images", f"--output={out}", "--top_k=10")
        assert command("predict", f"--workdir={workdir}", *flags) == 0
        with open(out / "predictions.csv", newline="") as file:
            rows.append([*csv.reader(file)][1:])
        assert [path.name for path in out.iterdir()] == ["predictions.csv"]
    for before, after in zip(*rows, strict=True):
        assert before[1::2] == after[1::2]
        np.testing.assert_allclose(*([float(p) for p in r[2::2]] for r in (before, after)), 1e-4)

    Image.fromarray(np.tile(examples.image[0, :, :, 0], (2, 3))).save(tmp_path / "large.png")
    flags = (f"--images={tmp_path}/large.png", f"--output={tmp_path}/map")
    assert command("predict", f"--workdir={converted}", *flags) == 0
    names = sorted(path.name for path in (tmp_path / "map").iterdir())
    assert names == ["0000_large_class_map.png", "predictions.csv"]


def test_report(trained, converted, tfds_dir, tmp_path):
    flags = (f"--data_dir={tfds_dir}", f"--output={tmp_path}")
    assert command("report", f"--workdir={converted}", *flags) == 0
    page = (tmp_path / "index.html").read_text()
    accuracy = evaluation(trained, tfds_dir)["accuracy"]
    assert f"{100 * accuracy:.1f}" in page
    assert "Conv 5x5 valid" in page
    command_of, note = run_data.command_of(
        converted, json.loads((converted / "config.json").read_text())
    )
    *training, conversion = command_of.splitlines()
    assert [line.removesuffix(" \\") for line in training[:3]] == [
        "./launch.sh train",
        "  --experiment=fashion_mnist/lenet",
        f"  --workdir={trained}",
    ]
    assert conversion == f"./launch.sh convert --workdir={trained} --output={converted}"
    assert "model" not in "".join(training)
    assert note == ""


def test_summary(converted, capsys):
    assert command("summary", f"--workdir={converted}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Convolutional on 28x28x1"
    found = [re.split(r"  +", line) for line in lines[2:-1]]
    assert [row[:3] for row in found[-3:]] == [
        ["Dense_0", "Conv 5x5 valid", "1x1x120"],
        ["Dense_1", "Conv 1x1 valid", "1x1x84"],
        ["Dense_2", "Conv 1x1 valid", "1x1x10"],
    ]
    assert lines[-1].startswith("61,706 parameters")
    assert command("summary", f"--workdir={converted}", "--input_size=64x48x1") == 0
    # (64 - 28) / 4 + 1
    assert re.search(r"Dense_2 .* 10x6x10 .* 32x32 +4 +-2\n", capsys.readouterr().out)


def test_verify(trained, converted, capsys):
    assert command("verify", f"--workdir={converted}") == 0
    assert "1 of 1 checkpoints are valid" in capsys.readouterr().out
    assert Checkpoints(converted).steps() == Checkpoints(trained).steps()[-1:]


def test_what_it_says(trained, tmp_path, capsys):
    assert command("convert", f"--workdir={trained}", f"--output={tmp_path / 'new'}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["Dense_0", "a", "5x5", "convolution", "400x120", "5x5x16x120"]
    assert lines[3].split() == ["Dense_2", "a", "1x1", "convolution", "84x10", "1x1x84x10"]
    numbers = re.fullmatch(r".* up to ([\d.]+), differing by at most (\S+)", lines[4])
    assert float(numbers[2]) <= 1e-5 * float(numbers[1])
    assert "each seeing 32x32 pixels, 4 further than the one before" in lines[5]
    assert lines[6] == f"written to {tmp_path / 'new'}"


def test_an_mlp_is_one_convolution_of_the_images_size(tmp_path):
    made = convert.convert(make_run(tmp_path, models.MLP(), saved=saved()), tmp_path / "new")
    assert made.kernels[0] == ("Dense_0", (784, 128), (28, 28, 1, 128))
    assert (made.field.size, made.field.stride) == ((28, 28), (1, 1))


class Head(nn.Module):
    """A convolution, something, `layers.Flatten`, something, a dense layer."""

    before: object = staticmethod(lambda x: x)
    behind: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(image))
        return Dense(10)(self.behind(Flatten()(self.before(x))))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Head(behind=lambda x: nn.LayerNorm()(x)), "only dense layers may"),
        (
            Head(behind=lambda x: x * nn.BatchNorm(True)(x)),
            "only dense layers may",
        ),
        (Head(before=lambda x: x.transpose(0, 3, 1, 2)), "on a larger image it fails ("),
        (
            Head(before=lambda x: x.transpose(0, 2, 1, 3)),
            "its map stays as small as on a small one",
        ),
        (Head(before=lambda x: x.reshape(len(x), 7, 7, 12)), "on a larger image it fails ("),
        (
            Head(before=lambda x: jnp.pad(x, ((0, 0), (1, 14 - x.shape[1]), (0, 0), (0, 0)))),
            "larger image",
        ),
    ],
)
def test_what_is_no_network_of_convolutions_on_larger_images(model, said, tmp_path):
    run = make_run(tmp_path, model, saved=saved())
    with pytest.raises(ConfigError) as caught:
        convert.convert(run, tmp_path / "new")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_head_of_flatten_and_dense_is_converted(tmp_path):
    run = make_run(tmp_path, Head(behind=nn.relu), saved=saved())
    made = convert.convert(run, tmp_path / "new")
    assert made.field.stride == (2, 2)


def saved():
    """What `convert` changes of a config.json."""
    return {"config": {"model": {"class": "MLP", "num_classes": 10}}}


def test_an_earlier_checkpoint(trained, tmp_path):
    """Its metrics end where it was saved, so that they are those of what is converted."""
    first, last = Checkpoints(trained).steps()
    run = restore.load_run(trained, str(first))
    made = convert.convert(run, tmp_path / "new")
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert (steps, made.run.step) == ([first], first)
    assert last > first
    assert made.run.saved["converted_from"] == {"workdir": str(trained), "checkpoint": first}
    again = restore.load_run(tmp_path / "new")
    assert again.model == made.run.model == models.Convolutional(models.LeNet(), (5, 5))


def test_a_network_of_ones_own(splits, tfds_dir, tmp_path, caplog):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    run, made = tmp_path / "run", tmp_path / "made"
    data = f"--data_dir={tfds_dir}"
    assert command("train", f"--experiment={own}", f"--workdir={run}", data) == 0
    assert command("convert", f"--experiment={own}", f"--workdir={run}", f"--output={made}") == 0
    expected = evaluation_of(run, own, data)
    found = evaluation_of(made, own, data)
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
    assert found == expected
    for workdir in (run, made):  # images, maps and kernels of one channel
        assert command("report", f"--experiment={own}", f"--workdir={workdir}", data) == 0
    caplog.clear()
    assert command("summary", f"--workdir={made}") == 2
    assert error(caplog).startswith("model.class: 'Own' is not one of cnn_jax.models")


def evaluation_of(workdir, experiment, data):
    assert command("evaluate", f"--workdir={workdir}", f"--experiment={experiment}", data) == 0
    return json.loads((workdir / "evaluation.json").read_text())


# -------------------------------------------------------------------------- what is refused


def test_a_network_that_is_convolutional_already(converted, tmp_path, caplog):
    assert command("convert", f"--workdir={converted}", f"--output={tmp_path / 'new'}") == 2
    assert error(caplog).startswith(f"workdir={converted}: Convolutional is convolutional already")
    assert not (tmp_path / "new").exists()
    run = make_run(tmp_path, models.FullyConvCNN())
    with pytest.raises(convert.ConfigError, match=r"FullyConvCNN is convolutional already: it "):
        convert.convert(run, tmp_path / "new")


def test_training_it_further(converted, tfds_dir, caplog):
    flags = ("--experiment=fashion_mnist/lenet", f"--workdir={converted}", f"--data_dir={tfds_dir}")
    names = ("--set", "data.name=tiny_squares", "--set", "batch_size=16", "--set", "devices=1")
    assert command("train", *flags, *names) == 2
    line = error(caplog)
    assert "holds another run" in line
    assert "model.class: Convolutional -> LeNet" in line


def test_an_image_smaller_than_the_window(converted, tmp_path, monkeypatch, caplog):
    assert command("summary", f"--workdir={converted}", "--input_size=20x20x1") == 2
    line = error(caplog)
    assert line.startswith(
        "model=Convolutional: takes no images of 20x20x1 (LeNet leaves a map of "
    )
    caplog.clear()
    small = make_examples(20, (32, 27, 1))
    monkeypatch.setattr(evaluate.sources, "load_examples", lambda *_: small)
    assert command("evaluate", f"--workdir={converted}", "--dataset=other") == 3
    line = error(caplog)
    assert line.startswith("dataset=other: its images are 32x27x1, ")
    assert "needs 5x5" in line


def test_a_dataset_of_larger_images(converted, monkeypatch):
    """What the dense network refuses."""
    large = make_examples(20, (40, 32, 1))
    monkeypatch.setattr(evaluate.sources, "load_examples", lambda *_: large)
    assert command("evaluate", f"--workdir={converted}", "--dataset=other") == 0
    (converted / "evaluation.json").unlink()


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("{}/file", 2, "--output={}/file: {}/file is a file; name a folder"),
        ("{}/file/below", 2, "--output={}/file/below: {}/file is a file; name a folder"),
        ("{}/full", 2, "--output={}/full: must be a new or an empty folder; name another one"),
        ("/proc/x", 2, "--output=/proc/x: cannot be written: "),
    ],
)
def test_where_it_cannot_be_written(trained, tmp_path, caplog, output, code, said):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    output = output.format(tmp_path)
    assert command("convert", f"--workdir={trained}", f"--output={output}") == code
    assert error(caplog).startswith(said.replace("{}", str(tmp_path)))


@pytest.mark.parametrize("name", ["convert", "class_map", "export", "report", "summary"])
def test_a_workdir_without_a_checkpoint(trained, tmp_path, caplog, name):
    workdir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    more = [f"--output={tmp_path / 'new'}"] if name == "convert" else []
    assert command(name, f"--workdir={workdir}", *more) == 4
    assert error(caplog) == f"{workdir / 'checkpoints'}: holds no checkpoint"
    caplog.clear()
    assert command(name, f"--workdir={tmp_path / 'missing'}", *more) == 4
    assert error(caplog).startswith(f"workdir={tmp_path / 'missing'}: no such folder")


def test_a_run_that_was_stopped_in_its_first_epoch(trained, tfds_dir, tmp_path, caplog):
    """It has a checkpoint and no line of metrics."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    flags = (f"--workdir={workdir}", f"--data_dir={tfds_dir}")
    assert command("report", *flags) == 0
    new = tmp_path / "new"
    assert command("convert", f"--workdir={workdir}", f"--output={new}") == 0
    assert (new / "metrics.jsonl").read_text() == ""
    assert command("report", f"--workdir={new}", f"--data_dir={tfds_dir}") == 0
    assert (
        command("class_map", f"--workdir={workdir}", f"--data_dir={tfds_dir}", "--canvas=70") == 0
    )
    assert command("report", f"--workdir={new}", "--checkpoint=best") == 4
    assert "has a validation accuracy; choose latest" in error(caplog)


def test_a_head_that_mixes_the_places_of_a_map_is_noticed(tmp_path):
    """Its mean is of the units of a vector, but of the rows of a map."""

    class Centred(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            x = Dense(8)(Flatten()(nn.Conv(4, (3, 3))(image)))
            return Dense(3)(x - x.mean(1, keepdims=True))

    run = make_run(tmp_path, Centred(), (6, 6, 1), saved=saved())
    with pytest.raises(convert.ConfigError, match=r"must not mix the places of a map$"):
        convert.convert(run, tmp_path / "new")
    assert not (tmp_path / "new").exists()
