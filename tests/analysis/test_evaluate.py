import json
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from cnn_jax import main, models
from cnn_jax.analysis import evaluate, restore
from cnn_jax.cli import tables
from cnn_jax.common.errors import DataError, NotFiniteError
from cnn_jax.config import Config, DataConfig
from cnn_jax.data import sources
from cnn_jax.data.examples import InMemory, Relabelled
from cnn_jax.models.layers import Dense, Flatten
from cnn_jax.train import evaluation, loop, parallel
from tests.data.test_sources import encode, write_pictures
from tests.quick import make_run, noisy_variables, unoptimised
from tests.tiny import CLASS_NAMES, make_examples, run_command

SHAPE = (28, 28, 1)


class Mine(nn.Module):
    """A module that is not one of cnn_jax.models."""

    @nn.compact
    def __call__(self, image, train=False):
        return Dense(10)(Flatten()(image))


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def train(workdir, data_dir, model, **fields):
    config = Config(
        model,
        DataConfig("tiny_squares", validation_examples=20),
        epochs=3,
        optimizer=optax.sgd,
        learning_rate=0.01,
        eval_batch_size=20,
        **fields,
    )
    return loop.train(config, workdir, "mine", str(data_dir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tfds_dir):
    """A workdir of an MLP, its log, and the folder of its data."""
    workdir = tmp_path_factory.mktemp("trained")
    lines = train(workdir, tfds_dir, models.MLP(), keep_checkpoints=3)
    return workdir, lines, tfds_dir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def fully_conv(tmp_path):
    """A run of FullyConvCNN as `load_run` would give it."""
    return make_run(tmp_path, models.FullyConvCNN())


def in_numpy(params, examples):
    """Accuracy, loss and confusion of an MLP in float64, example by example."""
    x = examples.image.reshape(len(examples), -1) / 255
    for name in ("Dense_0", "Dense_1"):
        x = x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        x = np.maximum(x, 0) if name == "Dense_0" else x
    confusion = np.zeros((10, 10), int)
    for label, scores in zip(examples.label, x, strict=True):
        confusion[label, scores.argmax()] += 1
    losses = np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), examples.label]
    return confusion.trace() / len(x), losses.mean(), confusion


# -------------------------------------------------------------------------- every example


@pytest.mark.parametrize("batch_size", [4, 8, 36, 48, 1_000_000])
@pytest.mark.parametrize("count", [35, 36, 48])
def test_every_example_is_counted_once(batch_size, count):
    mesh = parallel.make_mesh(2)
    variables = noisy_variables(models.MLP(), SHAPE) | {"batch_stats": {}}
    examples = make_examples(count)
    eval_step = evaluation.make_eval_step(Config(models.MLP(), DataConfig("x")), mesh)
    result = evaluation.evaluate_examples(
        eval_step, parallel.replicate(variables, mesh), examples, batch_size, mesh
    )
    accuracy, loss, confusion = in_numpy(variables["params"], examples)
    assert result.examples == count
    assert result.accuracy == accuracy
    np.testing.assert_array_equal(result.confusion, confusion)
    assert result.confusion.sum() == count
    assert result.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_loss_that_is_not_finite_is_an_error(value, tmp_path, monkeypatch):
    run = make_run(tmp_path, models.MLP())
    run.variables["params"]["Dense_0"]["kernel"][:] = value
    monkeypatch.setattr(evaluate.sources, "load_examples", lambda *_, **__: make_examples(20))
    with pytest.raises(
        NotFiniteError, match=r"^checkpoint 7 of .*/test: loss=(nan|inf) is not"
    ) as e:
        evaluate.evaluate(run, devices=1)
    assert e.value.exit_code == 5
    assert [*tmp_path.iterdir()] == []


def test_accuracy_of_each_class():
    confusion = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 6]])
    result = evaluation.Metrics(12, 0.5, 9 / 12, confusion)
    assert result.class_accuracy() == [0.75, None, 0.75]


# ------------------------------------------------------------------- equal to the training log


def test_the_command_repeats_the_log_to_the_digit(tmp_path, tfds_dir):
    """Two processes, a convolutional network, the same optimised programs as a user's."""
    experiment = tmp_path / "mine.py"
    experiment.write_text(
        "from cnn_jax.config import Config, DataConfig\n"
        "from cnn_jax.models import LeNet\n"
        "def config():\n"
        "    data = DataConfig('tiny_squares', validation_examples=30)\n"
        "    return Config(LeNet(), data, epochs=2, eval_batch_size=20)\n"
    )
    workdir = tmp_path / "run"
    done = run_command(
        "train", f"--experiment={experiment}", f"--workdir={workdir}", f"--data_dir={tfds_dir}"
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    done = run_command("evaluate", f"--workdir={workdir}", f"--data_dir={tfds_dir}")
    assert done.returncode == 0, done.stderr
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["loss"] == last["test_loss"]
    assert report["accuracy"] == last["test_accuracy"]
    assert report["checkpoint"] == last["step"] == 2 * (130 // 32)
    assert f"checkpoint 8: accuracy {last['test_accuracy']:.4f}" in done.stdout
    done = run_command(
        "evaluate", f"--workdir={workdir}", f"--data_dir={tfds_dir}", "--split=validation"
    )
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["loss"] == last["validation_loss"]
    assert report["accuracy"] == last["validation_accuracy"]
    assert report["examples"] == 30


def test_the_report(trained):
    workdir, lines, data_dir = trained
    run = restore.load_run(workdir)
    report = evaluate.evaluate(run, data_dir=str(data_dir))
    evaluate.write(report, workdir)
    assert report == json.loads((workdir / "evaluation.json").read_text())
    assert [*report] == [
        "checkpoint",
        "dataset",
        "split",
        "examples",
        "loss",
        "accuracy",
        "class_accuracy",
        "confusion_matrix",
        "top_5_accuracy",
        "macro",
        "classes",
        "brier",
        "ece",
        "reliability",
        "intervals",
    ]
    examples = make_examples(48, seed=1)  # what tiny_squares holds
    accuracy, loss, confusion = in_numpy(run.variables["params"], examples)
    assert (report["dataset"], report["split"]) == ("tiny_squares", "test")
    assert (report["checkpoint"], report["examples"]) == (12, 48)
    assert report["accuracy"] == accuracy
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["confusion_matrix"] == confusion.tolist()
    assert [*report["class_accuracy"]] == [*CLASS_NAMES]
    shares = np.diag(confusion) / confusion.sum(1)
    assert [*report["class_accuracy"].values()] == shares.tolist()
    # The run is on 1 device, the training was on 4: equal but for rounding.
    assert report["accuracy"] == lines[-1]["test_accuracy"]
    assert report["loss"] == pytest.approx(lines[-1]["test_loss"], rel=1e-5)


# ------------------------------------------------------------------------ flags of the command


def command(*arguments):
    return main.main(["evaluate", *map(str, arguments)])


def written(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


def said(caplog):
    """The one line of the error."""
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_which_checkpoint(workdir, trained):
    _, lines, data_dir = trained
    by_step = {line["step"]: line for line in lines}
    assert [*by_step] == [4, 8, 12]
    scores = {step: line["validation_accuracy"] for step, line in by_step.items()}
    best = max(scores, key=scores.get)
    for which, step in (("latest", 12), ("4", 4), ("8", 8), ("best", best)):
        assert (
            command(f"--workdir={workdir}", f"--checkpoint={which}", f"--data_dir={data_dir}") == 0
        )
        assert written(workdir)["checkpoint"] == step
        expected = by_step[step]["test_loss"]
        assert written(workdir)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("which", ["5", "nonsense", "-1", "4.0", "²", "../4"])
def test_no_such_checkpoint(trained, caplog, which):
    assert command(f"--workdir={trained[0]}", f"--checkpoint={which}") == 4
    assert f"--checkpoint={which}: " in said(caplog)
    assert "must be latest, best or a step in" in said(caplog)
    assert said(caplog).rstrip().endswith(": 4, 8, 12")


def test_best_without_validation(tmp_path, splits, caplog):
    config = Config(models.MLP(), DataConfig("tiny"), epochs=1, eval_batch_size=20)
    loop.train(config, tmp_path / "run", splits=splits)
    assert command(f"--workdir={tmp_path / 'run'}", "--checkpoint=best") == 4
    assert "has a validation accuracy; choose latest" in said(caplog)


@pytest.mark.parametrize(
    ("split", "examples"),
    [
        ("test", 48),
        ("validation", 20),
        ("train", 140),
        ("test[:10]", 10),
        ("train[:50%]", 80),
        ("train+test", 208),
    ],
)
def test_which_split(workdir, trained, split, examples):
    assert command(f"--workdir={workdir}", f"--split={split}", f"--data_dir={trained[2]}") == 0
    report = written(workdir)
    assert (report["split"], report["examples"]) == (split, examples)
    assert sum(map(sum, report["confusion_matrix"])) == examples


def test_a_class_without_examples(workdir, trained, capsys):
    assert command(f"--workdir={workdir}", "--split=test[:3]", f"--data_dir={trained[2]}") == 0
    report = written(workdir)
    first = sources.load_examples(DataConfig("tiny_squares"), "test[:3]", str(trained[2]))
    present = {CLASS_NAMES[label] for label in first.label}
    assert {k for k, v in report["class_accuracy"].items() if v is not None} == present
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum(row[2:4] == ["-", "0"] for row in rows) == 10 - len(present)


@pytest.mark.parametrize("split", ["nope", "test[", "test[5:5]"])
def test_no_such_split(trained, caplog, split):
    assert command(f"--workdir={trained[0]}", f"--split={split}", f"--data_dir={trained[2]}") == 3
    assert f"split={split}" in said(caplog)


def test_a_split_the_run_has_not(tmp_path, trained, caplog):
    config = Config(models.MLP(), DataConfig("tiny_squares"), epochs=1, eval_batch_size=20)
    workdir = tmp_path / "run"
    loop.train(config, workdir, "x", str(trained[2]))
    assert command(f"--workdir={workdir}", "--split=validation", f"--data_dir={trained[2]}") == 3
    assert "split=validation: this run has no validation split" in said(caplog)


# ---------------------------------------------------------------------------- another dataset


def others(monkeypatch, examples):
    """Any other dataset is `examples`."""
    asked = []

    def load(data, split, data_dir=None):
        asked.append((data.name, split))
        return examples

    monkeypatch.setattr(sources, "load_examples", load)
    return asked


def test_another_dataset(monkeypatch, workdir, trained):
    asked = others(monkeypatch, make_examples(30, seed=9))
    assert command(f"--workdir={workdir}", "--dataset=other") == 0
    assert asked == [("other", "test")]
    report = written(workdir)
    assert (report["dataset"], report["examples"]) == ("other", 30)
    params = restore.load_run(workdir).variables["params"]
    assert report["accuracy"] == in_numpy(params, make_examples(30, seed=9))[0]


def test_another_dataset_with_fewer_classes(monkeypatch, workdir):
    few = make_examples(30)
    others(monkeypatch, InMemory(few.image, few.label % 3, CLASS_NAMES[:3]))
    assert command(f"--workdir={workdir}", "--dataset=other") == 0
    assert np.array(written(workdir)["confusion_matrix"])[3:].sum() == 0


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((28, 28, 3), CLASS_NAMES, ("3 channels", "must have 1 as those")),
        (SHAPE, [*CLASS_NAMES, "k"], ("not trained on its classes k", "trained on a, b, c, d")),
        (SHAPE, ["bird", *CLASS_NAMES[1:]], ("not trained on its classes bird", "trained on a, b")),
        ((32, 32, 1), CLASS_NAMES, ("32x32x1", "trained on 28x28x1", "MLP", "use FullyConvCNN")),
        ((28, 29, 1), CLASS_NAMES, ("28x29x1", "trained on 28x28x1", "MLP", "use FullyConvCNN")),
    ],
)
def test_a_dataset_that_does_not_fit(monkeypatch, trained, caplog, shape, names, expected):
    examples = make_examples(30, shape)
    others(monkeypatch, InMemory(examples.image, examples.label, tuple(names)))
    assert command(f"--workdir={trained[0]}", "--dataset=other") == 3
    message = said(caplog)
    assert message.startswith("error: dataset=other: ")
    for part in expected:
        assert part in message


@pytest.mark.parametrize("memory", ["in memory", "on demand"])
@pytest.mark.parametrize("order", [[1, 0, *range(2, 10)], [*range(9, -1, -1)], [7, 3, 5]])
def test_classes_are_matched_by_name(tmp_path, monkeypatch, order, memory):
    """A dataset of the same names in another order, or of some of them."""
    run = make_run(tmp_path, models.MLP())
    examples = make_examples(60)
    kept = examples.take(np.flatnonzero(np.isin(examples.label, order)))
    label = np.argsort(order)[np.searchsorted(np.sort(order), kept.label)].astype(np.int32)
    other = InMemory(kept.image, label, tuple(CLASS_NAMES[i] for i in order), skipped=2)
    expected = evaluate.fitting(run, kept, "other")
    found = evaluate.fitting(run, other, "other")
    if memory == "on demand":
        found = Relabelled(other, CLASS_NAMES, np.array(order, np.int32)).take(np.arange(len(kept)))
    np.testing.assert_array_equal(found[np.arange(len(kept))]["label"], kept.label)
    assert found.class_names == expected.class_names == CLASS_NAMES
    assert found.skipped == 2
    others(monkeypatch, other)
    report = evaluate.evaluate(run, dataset="other", devices=1)
    others(monkeypatch, kept)
    assert report == evaluate.evaluate(run, dataset="other", devices=1)


def test_a_dense_model_keeps_to_its_size_where_its_parameters_would_fit_another(tmp_path):
    """StridedCNN has equal parameters for 25x25 to 28x28."""
    run = make_run(tmp_path, models.StridedCNN())
    with pytest.raises(
        DataError, match=r"27x27x1, .* was trained on 28x28x1, and StridedCNN takes"
    ):
        evaluate.fitting(run, make_examples(10, (27, 27, 1)), "other")
    evaluate.fitting(run, make_examples(10), "other")


def test_fully_conv_takes_larger_images(monkeypatch, fully_conv):
    examples = make_examples(12, (40, 36, 1))
    others(monkeypatch, examples)
    report = evaluate.evaluate(fully_conv, dataset="other", devices=1)
    images = examples.image / np.float32(255)
    maps = jax.jit(fully_conv.model.apply)({"params": fully_conv.variables["params"]}, images)
    assert maps.shape == (12, 4, 3, 10)
    expected = (np.asarray(maps).mean((1, 2)).argmax(1) == examples.label).mean()
    assert report["accuracy"] == expected


def test_fully_conv_refuses_smaller_images(fully_conv):
    with pytest.raises(DataError, match=r"^dataset=other: its images are 28x27x1.*from 28x28 up"):
        evaluate.fitting(fully_conv, make_examples(10, (28, 27, 1)), "other")


# ------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("batch_size", [30, 7, 1, 500])
def test_devices_need_not_divide_the_batch(monkeypatch, tmp_path, batch_size):
    others(monkeypatch, make_examples(30))
    run = make_run(tmp_path, models.MLP(), batch_size=batch_size)
    one, three, all_four = (evaluate.evaluate(run, devices=count) for count in (1, 3, None))
    assert one["examples"] == three["examples"] == all_four["examples"] == 30
    assert one["confusion_matrix"] == three["confusion_matrix"] == all_four["confusion_matrix"]
    np.testing.assert_allclose([three["loss"], all_four["loss"]], one["loss"], rtol=1e-5)


# ----------------------------------------------------------------------------- what is damaged


def test_no_run_there(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        assert command(f"--workdir={path}") == 4
        assert str(path) in said(caplog)


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["config"].pop("model"),
        lambda saved: saved["config"].pop("eval_batch_size"),
        lambda saved: saved.pop("experiment"),
        lambda saved: saved.update(config=3),
        lambda saved: saved["config"].update(model="LeNet"),
        lambda saved: saved["config"].update(data=None),
        lambda saved: saved.update(image_shape=28),
    ],
)
def test_a_damaged_config(workdir, caplog, damage):
    saved = json.loads((workdir / "config.json").read_text())
    damage(saved)
    (workdir / "config.json").write_text(json.dumps(saved))
    assert command(f"--workdir={workdir}") == 4
    assert said(caplog).startswith(f"error: {workdir / 'config.json'}: damaged (")


def test_a_result_that_cannot_be_written_is_shown_all_the_same(workdir, trained, caplog, capsys):
    """As of a run in a folder that is somebody else's. Tests may run as root, who may write all."""
    (workdir / "evaluation.json").unlink(missing_ok=True)
    (workdir / "evaluation.json").mkdir()
    flags = f"--workdir={workdir}", f"--data_dir={trained[2]}"
    assert command(*flags) == 0
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    path = workdir / "evaluation.json"
    assert (
        warning
        == f"warning: {path}: cannot be written: Is a directory; name another folder with --output"
    )
    shown = capsys.readouterr().out
    assert re.search(r"accuracy \d\.\d{4}, loss \d\.\d{4} over 48 examples\n$", shown)


def test_a_result_in_another_folder(workdir, trained, caplog, capsys, tmp_path):
    before = sorted(workdir.rglob("*"))
    output = tmp_path / "new" / "folder"
    flags = f"--workdir={workdir}", f"--data_dir={trained[2]}"
    assert command(*flags, f"--output={output}") == 0
    assert capsys.readouterr().out.endswith(f"written to {output / 'evaluation.json'}\n")
    assert written(output)["checkpoint"] == 12
    assert sorted(workdir.rglob("*")) == before
    (output / "evaluation.json").unlink()
    (output / "evaluation.json").mkdir()
    assert command(*flags, f"--output={output}") == 2
    assert said(caplog) == f"error: --output={output}: cannot be written: Is a directory"
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [[(28, 28), (32, 16)], [(5, 9), (60, 60)], [(14, 14)] * 2])
def test_a_dataset_whose_images_differ_in_size_is_resized_to_the_trainings(
    trained, tmp_path, caplog, sizes
):
    """evaluate has no --set data.image_size to advise."""
    images = [np.full((*size, 1), 100, np.uint8) for size in sizes]
    write_pictures(
        tmp_path, [encode(image) for image in images], (None, None, 1), names=CLASS_NAMES[:3]
    )
    flags = f"--workdir={trained[0]}", "--dataset=pictures", "--split=train[:2]"
    output = tmp_path / "out"
    assert command(*flags, f"--data_dir={tmp_path}", f"--output={output}") == 0
    assert "pictures has images of several sizes: resized to 28x28" in caplog.text
    assert written(output)["examples"] == 2


def test_a_model_of_ones_own(tmp_path, tfds_dir, caplog):
    workdir = tmp_path / "run"
    lines = train(workdir, tfds_dir, Mine())
    assert command(f"--workdir={workdir}", f"--data_dir={tfds_dir}") == 2
    assert "model.class: 'Mine' is not one of cnn_jax.models" in said(caplog)
    assert "--experiment" in said(caplog)
    caplog.clear()
    experiment = tmp_path / "mine.py"
    experiment.write_text(
        "from cnn_jax.config import Config, DataConfig\n"
        "from tests.analysis.test_evaluate import Mine\n"
        "def config(): return Config(Mine(), DataConfig('tiny_squares'))\n"
    )
    given = ["--experiment", experiment, f"--workdir={workdir}", f"--data_dir={tfds_dir}"]
    assert command(*given) == 0
    assert written(workdir)["accuracy"] == lines[-1]["test_accuracy"]
    # ... and a model that is not the saved one
    assert command("--experiment=quickstart", f"--workdir={workdir}") == 2
    assert "--experiment: its model is LeNet, must be Mine as in the run" in said(caplog)


# --------------------------------------------------------------------------------- the table


def report_of(classes):
    names = [f"name {i}" for i in range(classes)]
    matrix = (np.eye(classes, dtype=int) * 3 + 1).tolist()
    return {
        "checkpoint": 5,
        "dataset": "tiny",
        "split": "test",
        "examples": 1234,
        "loss": 0.51239,
        "accuracy": 0.98766,
        "class_accuracy": dict.fromkeys(names, 0.5) | {"name 1": None},
        "confusion_matrix": matrix,
    }


def test_the_table(capsys):
    tables.print_evaluation(report_of(3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "accuracy", "examples", "->", "0", "->", "1", "->", "2"]
    assert lines[1].split() == ["0", "name", "0", "0.5000", "6", "4", "1", "1"]
    assert lines[2].split() == ["1", "name", "1", "-", "6", "1", "4", "1"]
    assert lines[-1] == (
        "tiny/test, checkpoint 5: accuracy 0.9877, loss 0.5124 over 1,234 examples"
    )


def test_a_wide_matrix_is_left_to_the_file(capsys):
    tables.print_evaluation(report_of(21))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "accuracy", "examples"]
    assert len(lines) == 23


def test_a_run_is_what_its_workdir_says(trained):
    run = restore.load_run(trained[0], "4")
    assert (run.step, run.experiment, run.image_shape) == (4, "mine", SHAPE)
    assert (run.batch_size, run.compute_dtype) == (20, "float32")
    assert run.class_names == CLASS_NAMES
    assert run.model == models.MLP()
    assert run.data == DataConfig("tiny_squares", validation_examples=20)
