"""Several evaluations at once, and what they measure beyond accuracy."""

import contextlib
import csv
import fcntl
import io
import json
import shutil

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from cnn_jax import main, models
from cnn_jax.analysis import restore
from cnn_jax.analysis.study import changes, charts, measures, rows, temperature
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import loop
from tests.quick import unoptimised
from tests.tiny import CLASS_NAMES, make_examples

NAMES = CLASS_NAMES[:7]


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def make_scores(count=200, classes=6, temperature=1.0, seed=0):
    """Scores of NAMES; the labels are drawn from the probabilities at this temperature.

    The last class has neither an example nor a prediction.
    """
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (count, classes))
    e = np.exp(logits)
    drawn = random.random((count, 1)) < (e / e.sum(1, keepdims=True)).cumsum(1)
    logits = np.concatenate([logits * temperature, np.full((count, 1), -60)], 1)
    return measures.Scores(drawn.argmax(1).astype(np.int32), logits.astype(np.float32))


# ------------------------------------------------------------------------------------- measures


def in_loops(scores):
    """Brier score, ECE and the negative log-likelihood, example by example."""
    brier, loss, bins = 0.0, 0.0, {}
    for label, logits in zip(scores.label, scores.logits.astype(float), strict=True):
        p = np.exp(logits) / np.exp(logits).sum()
        brier += sum((p[k] - (k == label)) ** 2 for k in range(len(p)))
        loss -= np.log(p[label])
        place = next(b for b in range(15) if p.max() <= (b + 1) / 15)
        bins.setdefault(place, []).append((p.max(), p.argmax() == label))
    count = len(scores.label)
    ece = sum(len(v) * abs(np.mean(v, 0) @ [1, -1]) for v in bins.values()) / count
    return brier / count, ece, loss / count, {place: len(v) for place, v in bins.items()}


def test_measures_against_loops_over_the_examples():
    scores = make_scores()
    found = measures.measure(scores, NAMES)
    brier, ece, loss, counts = in_loops(scores)
    assert found["brier"] == pytest.approx(brier)
    assert found["ece"] == pytest.approx(ece)
    assert measures.losses(scores).mean() == pytest.approx(loss)
    assert [b["count"] for b in found["reliability"]] == [counts.get(i, 0) for i in range(15)]
    assert found["classes"]["g"] == {"precision": None, "recall": None, "f1": None}
    order = np.argsort(-scores.logits, 1)[:, :5]
    assert found["top_5_accuracy"] == (order == scores.label[:, None]).any(1).mean()


def test_measures_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    scores = make_scores(60)
    scores.label[scores.label == 2] = 1  # predicted, but without an example
    found = measures.measure(scores, NAMES)
    label, winner, seen = scores.label, scores.winner, range(6)
    expected = metrics.precision_recall_fscore_support(label, winner, labels=seen, zero_division=0)
    for kind, values in zip(("precision", "recall", "f1"), expected, strict=False):
        by_class = [found["classes"][name][kind] for name in NAMES[:6]]
        np.testing.assert_allclose(by_class, values)
        assert found["macro"][kind] == pytest.approx(values.mean())
    five = metrics.top_k_accuracy_score(label, scores.logits, k=5, labels=range(7))
    assert found["top_5_accuracy"] == pytest.approx(five)
    loss = metrics.log_loss(label, scores.probabilities, labels=range(7))
    assert measures.losses(scores).mean() == pytest.approx(loss)


def test_intervals_against_scipys_bootstrap():
    scores = make_scores(150)
    found = measures.measure(scores, NAMES)["intervals"]
    assert (found["level"], found["examples"], found["resamples"]) == (0.95, 150, 1000)
    assert found == measures.measure(scores, NAMES)["intervals"]
    losses = measures.losses(scores)

    def statistic(i):
        return np.array([scores.correct[i].mean(), losses[i].mean()])

    options = {"n_resamples": 1000, "method": "percentile", "vectorized": False, "rng": 1}
    expected = scipy.stats.bootstrap((np.arange(150),), statistic, **options).confidence_interval
    for name, low, high in zip(("accuracy", "loss"), expected.low, expected.high, strict=True):
        width = high - low
        np.testing.assert_allclose(found[name], [low, high], atol=0.12 * width)


def test_mcnemar_by_hand():
    first = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 1], bool)
    second = np.array([1, 0, 1, 1, 1, 1, 1, 1, 1, 1], bool)
    found = measures.mcnemar(first, second)
    assert (found["only_first_right"], found["only_second_right"]) == (1, 7)
    assert found["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert measures.mcnemar(first, first)["p"] == 1


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_temperature_undoes_a_scaling_of_the_logits(true):
    scores = make_scores(4000, temperature=true)
    found = temperature.fit(scores)
    assert found == pytest.approx(true, rel=0.06)
    cooled = scores.cooled(found)
    np.testing.assert_array_equal(cooled.winner, scores.winner)
    grid = [measures.losses(scores.cooled(found * f)).mean() for f in (0.99, 1, 1.01)]
    assert grid[1] == min(grid)


# ----------------------------------------------------------------------------- several at once


def train(workdir, data_dir, seed=0):
    config = Config(
        models.MLP(),
        DataConfig("tiny_squares", validation_examples=20),
        epochs=3,
        learning_rate=0.01,
        eval_batch_size=20,
        keep_checkpoints=3,
        seed=seed,
        devices=1,
    )
    return loop.train(config, workdir, "mine", str(data_dir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tfds_dir):
    """A folder with two runs, a and b, and the log of a."""
    folder = tmp_path_factory.mktemp("runs")
    lines = train(folder / "a", tfds_dir)
    train(folder / "b", tfds_dir, seed=1)
    return folder, lines, f"--data_dir={tfds_dir}"


def evaluate(*arguments):
    return main.main(["evaluate", *map(str, arguments)])


def written(folder):
    return json.loads((folder / "evaluations.json").read_text())


def test_all_checkpoints_of_two_runs(trained, tmp_path, capsys):
    folder, lines, data_dir = trained
    output, file = tmp_path / "new", tmp_path / "examples.csv"
    where = ["--split=test", "--split=train[:30]"]
    flags = [data_dir, *where, "--checkpoint=all", f"--output={output}", f"--predictions={file}"]
    assert evaluate(folder / "a", folder / "b", *flags) == 0
    found = written(output)
    places = [(row["workdir"][-1], row["checkpoint"], row["split"]) for row in found["rows"]]
    assert places == [(r, c, s) for r in "ab" for c in (4, 8, 12) for s in ("test", "train[:30]")]
    log = {line["step"]: line for line in lines}
    for row in found["rows"]:
        if row["workdir"].endswith("a") and row["split"] == "test":
            assert row["accuracy"] == log[row["checkpoint"]]["test_accuracy"]
    with open(file, newline="") as text:
        examples = [*csv.DictReader(text)]
    assert len(examples) == 6 * (48 + 30)
    last = [e for e in examples if (e["checkpoint"], e["split"]) == ("12", "test")]
    right = [
        np.array([e["label"] == e["predicted"] for e in part]) for part in (last[:48], last[48:])
    ]
    assert found["rows"][4]["accuracy"] == right[0].mean()
    test = found["mcnemar"][0]
    assert (test["first"][-1], test["second"][-1], test["split"]) == ("a", "b", "test")
    assert test["only_first_right"] == (right[0] & ~right[1]).sum()
    assert len(found["mcnemar"]) == 2
    probabilities = [float(v) for k, v in last[0].items() if k.startswith("probability of ")]
    assert sum(probabilities) == pytest.approx(1)
    assert CLASS_NAMES[np.argmax(probabilities)] == last[0]["predicted"]
    shown = capsys.readouterr().out
    assert shown.count("a 12, tiny_squares/test") == 2
    assert {p.name for p in output.glob("*.png")} == {"curve.png", "reliability.png"}
    with Image.open(output / "curve.png") as picture:
        assert picture.width == 972


def test_a_temperature_is_kept_for_these_weights_alone(trained, tmp_path, capsys):
    folder, _, data_dir = trained
    run = shutil.copytree(folder / "a", tmp_path / "run")
    assert evaluate(run, data_dir, "--temperature") == 0
    kept = json.loads((run / "temperature.json").read_text())
    assert [*kept] == ["12"]
    assert (kept["12"]["fitted_on"], kept["12"]["examples"]) == ("validation", 20)
    assert evaluate(run, data_dir, "--checkpoint=all") == 0
    found = written(run / "evaluations")["rows"]
    assert ["with_temperature" in row for row in found] == [False, False, True]
    assert found[2]["with_temperature"]["temperature"] == kept["12"]["temperature"]
    kept["12"]["checkpoint_sha256"] = "of others"
    (run / "temperature.json").write_text(json.dumps(kept))
    assert temperature.kept(restore.load_run(run)) is None


def test_a_damaged_checkpoint_is_skipped(trained, tmp_path, caplog):
    folder, _, data_dir = trained
    run = shutil.copytree(folder / "a", tmp_path / "run")
    (run / "checkpoints" / "8" / "manifest" / "metadata").write_text("{}")
    assert evaluate(run, data_dir, "--checkpoint=all") == 0
    assert [row["checkpoint"] for row in written(run / "evaluations")["rows"]] == [4, 12]
    assert "warning: skipped " in caplog.text


def test_watching_ends_with_the_training(trained, tmp_path, monkeypatch):
    """The training is played: it holds the lock, saves while the watcher sleeps, and ends."""
    folder, _, data_dir = trained
    run = shutil.copytree(folder / "a", tmp_path / "run")
    saved = run / "checkpoints"
    shutil.move(saved / "12", tmp_path / "12")
    with contextlib.ExitStack() as training:
        fcntl.flock(training.enter_context(open(run / "lock")), fcntl.LOCK_EX)
        assert rows.is_running(run)

        def sleep(_):
            shutil.rmtree(saved / "4")
            shutil.move(tmp_path / "12", saved / "12")
            training.close()

        monkeypatch.setattr(rows.time, "sleep", sleep)
        assert evaluate(run, data_dir, "--watch") == 0
    found = written(run / "evaluations")["rows"]
    assert [row["checkpoint"] for row in found] == [4, 8, 12]


def with_test_split(run, folder, split):
    """A copy of a run that says that it was tested on another split."""
    shutil.copytree(run, folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["data"]["test_split"] = split
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def test_only_runs_on_the_same_examples_are_compared(trained, tmp_path):
    """Two examples of one class are not the same example."""
    folder, _, data_dir = trained
    label = make_examples(48, seed=1).label
    other = 1 + int(np.argmax(label[1:] == label[0]))
    splits = ["test[:1]", "test[:1]", f"test[{other}:{other + 1}]"]
    runs = [with_test_split(folder / "a", tmp_path / f"r{i}", s) for i, s in enumerate(splits)]
    assert evaluate(*runs, data_dir, f"--output={tmp_path}/out") == 0
    found = written(tmp_path / "out")
    assert [row["examples"] for row in found["rows"]] == [1, 1, 1]
    pairs = [(test["first"][-2:], test["second"][-2:]) for test in found["mcnemar"]]
    assert pairs == [("r0", "r1")]


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["runs/a", "/x/runs/b"], ["here/runs/a", "x/runs/b"]),
        (["runs/a", "runs/more/b"], ["a", "more/b"]),
        (["gs://x/a", "/x/b", "/x/c"], ["gs://x/a", "b", "c"]),
        (["runs/a"], ["a"]),
        (["gs://x/a"], ["gs://x/a"]),
    ],
)
def test_the_shortest_names_that_tell_runs_apart(monkeypatch, runs, names):
    monkeypatch.setattr(charts.os, "getcwd", lambda: "/here")
    found = [{"workdir": run, "dataset": "d", "split": "test"} for run in runs]
    assert [*charts.lines_of(found)] == names


@pytest.mark.parametrize("text", ["[]", "7", '{"12": {"temperature": 2}}', '{"12": 3}', "{", ""])
def test_a_temperature_file_of_another_form_is_none(trained, tmp_path, text):
    run = shutil.copytree(trained[0] / "a", tmp_path / "run")
    (run / "temperature.json").write_text(text)
    assert temperature.kept(restore.load_run(run)) is None


def test_a_refused_command_keeps_the_predictions_of_another(trained, tmp_path):
    folder, _, data_dir = trained
    file = tmp_path / "examples.csv"
    file.write_text("kept")
    flag = f"--predictions={file}"
    assert evaluate(folder / "nope", data_dir, flag) == 4
    assert evaluate(folder / "a", data_dir, flag, "--watch", "--checkpoint=4") == 2
    assert file.read_text() == "kept"
    assert evaluate(folder / "nope", data_dir, f"--predictions={tmp_path}/new.csv") == 4
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["{a}", "--watch", "--checkpoint=4"], 2, "--checkpoint: must not be given with --watch"),
        (["{a}/nope", "--watch"], 4, "a/nope: no such folder"),
        (["{a}/nope", "--checkpoint=all"], 4, "a/nope: no such folder"),
        (["{a}", "--predictions=/proc/x.csv"], 2, "--predictions=/proc/x.csv: cannot be written"),
        (["{a}", "{b}", "--checkpoint=5"], 4, "--checkpoint=5: must be latest, best or a step in"),
    ],
)
def test_what_is_refused(trained, caplog, flags, code, says):
    folder, _, data_dir = trained
    before = sorted(folder.rglob("*"))
    given = [flag.format(a=folder / "a", b=folder / "b") for flag in flags]
    assert evaluate(*given, data_dir) == code
    assert says in caplog.text
    assert sorted(folder.rglob("*")) == before


# ------------------------------------------------------------------------------------- changes


def test_corruptions_grow_with_their_strength():
    for shape in ((28, 28, 1), (32, 24, 3)):
        examples = make_examples(10, shape)
        for kind in changes.CORRUPTIONS:
            strong = [changes.Changed(examples, kind, n) for n in changes.STRENGTHS]
            changed = [c[np.arange(10)]["image"] for c in strong]
            assert all(c.shape == (10, *shape) and c.dtype == np.uint8 for c in changed)
            away = [((c / 255.0 - examples.image / 255.0) ** 2).mean() for c in changed]
            assert sorted(away) == away, kind
            assert away[0] > 0, kind


def test_changes_by_hand():
    image = make_examples(1).image[0]
    bright = changes.change(image, "brightness", 1)
    np.testing.assert_array_equal(bright, np.minimum(image + np.round(0.08 * 255), 255).round())
    moved = changes.change(image, "shift", 3)
    np.testing.assert_array_equal(moved[:, 3:], image[:, :-3])
    assert len(np.unique(moved[:, :3])) == 1
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "JPEG", quality=20)
    np.testing.assert_array_equal(
        changes.change(image, "jpeg", 3)[..., 0], np.asarray(Image.open(file))
    )
    dot = np.zeros((9, 9, 1), np.uint8)
    dot[4, 8] = 200
    turned = changes.change(np.pad(dot, ((1, 1), (1, 1), (0, 0))), "rotation", 90)
    assert np.unravel_index(turned.argmax(), turned.shape)[:2] == (1, 5)  # counterclockwise: up


def test_a_change_does_not_depend_on_the_batch():
    examples = make_examples(20)
    changed = changes.Changed(examples, "gaussian_noise", 2)
    alone = changed[np.array([7])]["image"][0]
    np.testing.assert_array_equal(changed[np.arange(20)]["image"][7], alone)
    assert not np.array_equal(changed[np.array([8])]["image"][0], alone)


def test_the_command_with_shifts(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "SHIFTS", (0, 2))
    monkeypatch.setattr(changes, "ROTATIONS", (0, 90))
    monkeypatch.setattr(changes, "CORRUPTIONS", {"fog": changes.CORRUPTIONS["fog"]})
    flags = ["--shifts", "--corruptions", f"--output={tmp_path}"]
    assert evaluate(trained[0] / "a", trained[2], *flags) == 0
    found = written(tmp_path)["rows"]
    kinds = [row["change"] and (row["change"]["kind"], row["change"]["amount"]) for row in found]
    assert kinds == [None, *(("fog", n) for n in range(1, 6)), ("shift", 2), ("rotation", 90)]
    assert found[0]["accuracy"] == trained[1][-1]["test_accuracy"] > found[-1]["accuracy"]
    drawn = {p.stem for p in tmp_path.glob("*.png")}
    assert drawn == {"reliability", "corruptions", "shifts", "rotations"}
