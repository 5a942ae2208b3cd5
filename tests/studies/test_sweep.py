"""Every combination of some values, and what may be said of it."""

import json
import re
import statistics

import pytest
from PIL import Image

from cnn_jax.common.errors import ConfigError
from cnn_jax.studies import sweep, sweep_plot
from cnn_jax.studies.subprocesses import Processes
from cnn_jax.train import trackers
from cnn_jax.train import workdir as workdirs
from tests.tiny import run_command

EXPERIMENT = '''"""An MLP on tiny squares."""

from cnn_jax.config import Config, DataConfig
from cnn_jax.models import MLP


def config() -> Config:
    data = DataConfig("tiny_squares", validation_examples=32)
    return Config(model=MLP(), data=data, epochs=2, eval_batch_size=24)
'''


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.py"
    path.write_text(EXPERIMENT)
    return str(path)


# --------------------------------------------------------------------------------- the settings


def values(experiment, *assignments):
    return [list(setting.values.values()) for setting in sweep.settings(experiment, assignments)]


def test_every_combination_in_the_order_given(experiment):
    found = sweep.settings(experiment, ["learning_rate=1e-4, 1e-3", "batch_size=32,64"])
    assert [(s.config.learning_rate, s.config.batch_size) for s in found] == [
        (1e-4, 32),
        (1e-4, 64),
        (1e-3, 32),
        (1e-3, 64),
    ]
    assert found[1].name == "learning_rate=0.0001, batch_size=64"
    assert len({setting.folder for setting in found}) == 4
    assert [setting.name for setting in sweep.settings(experiment, [])] == ["as it is"]


def test_many_fields_still_make_the_name_of_a_folder(experiment):
    fixed = [f"data.{name}=(0.123456,0.234567,0.345678)" for name in ("mean", "std")]
    fixed += ["data.test_time_augmentation=mirror_shift", "data.crop_padding=2", "data.flip=true"]
    fixed += ["label_smoothing=0.2", "weight_decay=0.05", "schedule=cosine"]
    one, two = sweep.settings(experiment, [*fixed, "learning_rate=0.1,0.2"])
    assert one.folder != two.folder
    assert len(one.folder) == len(two.folder) == 200


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("data.mean=0.1,0.2,0.3", [["0.1,0.2,0.3"]]),
        ("data.mean=(0.1,0.2),(0.3,)", [["0.1,0.2"], ["0.3"]]),
        ("data.mean=[0.1,0.2],[0.3,0.4]", [["0.1,0.2"], ["0.3,0.4"]]),
        ("data.image_size=32,16", [["32,16"]]),
        ("data.image_size=none,(32,16)", [["None"], ["32,16"]]),
        ("data.train_split=train[:10%],train[:20%]", [["train[:10%]"], ["train[:20%]"]]),
        ("schedule=cosine,linear", [["cosine"], ["linear"]]),
        ("clip_norm=none,1", [["None"], ["1.0"]]),
        ("data.flip=true,false", [["True"], ["False"]]),
        ("model.num_classes=10,20", [["10"], ["20"]]),
    ],
)
def test_a_comma_separates_values_but_not_those_of_one_tuple(experiment, assignment, expected):
    assert values(experiment, assignment) == expected


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["learning_rate=1e-3,fast"], "--set learning_rate=fast: 'fast' is not a number"),
        (["learning_rate=1e-3,-1"], "learning_rate=-1.0: must be greater than 0"),
        (["learning_rate=1e-3,"], "--set learning_rate=: '' is not a number"),
        (["rate=1,2"], "--set rate=1: the configuration has no field 'rate'"),
        (["learning_rate=1e-3,0.001"], "--set learning_rate=0.001: is given twice"),
        (["epochs=1", "epochs=2"], "--set epochs=2: epochs is given twice; write epochs=value,va"),
        (["seed=1,2"], "--set seed=1,2: sweep sets the seed itself; write --seeds=N"),
        (["epochs"], "--set epochs: write field=value"),
        (["optimizer=adam,sgd"], "--set optimizer=adam: --set cannot change this field"),
        (["epochs=1", "warmup_epochs=0,2"], "warmup_epochs=2.0: must be at most epochs=1"),
    ],
)
def test_bad_values_are_refused(experiment, assignments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sweep.settings(experiment, assignments)


def test_nothing_is_trained_before_every_value_is_checked(experiment, tmp_path):
    flags = (f"--experiment={experiment}", "--set", "learning_rate=1e-3,x", "--workdir", tmp_path)
    done = run_command("sweep", *flags, CNN_JAX_CACHE="off")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --set learning_rate=x: 'x' is not a number\n"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ the runs


@pytest.fixture(scope="module")
def swept(experiment, tfds_dir, tmp_path_factory):
    """Two learning rates, of which one is hopeless, over two seeds: exit code and workdir."""
    workdir = tmp_path_factory.mktemp("swept")
    assignments = ["learning_rate=1e-3,1e30"]
    given = workdir, str(tfds_dir)
    return sweep.sweep(experiment, assignments, 2, *given, trackers=["csv"]), workdir


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_means_over_the_seeds_after_the_last_epoch(swept):
    code, workdir = swept
    assert code == 0  # a loss that is not finite is a result
    head, _, *body = rows((workdir / "sweep.md").read_text())
    assert head == ["learning_rate", "n", "validation accuracy", "test accuracy", ""]
    folder = workdir / "learning_rate=0.001"
    ends = [workdirs.metrics(folder / f"seed_{seed}")[-1] for seed in (0, 1)]
    assert [line["epoch"] for line in ends] == [2, 2]
    shown = [
        f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
        for split in ("validation", "test")
        for found in [[line[f"{split}_accuracy"] for line in ends]]
    ]
    good, hopeless = body
    assert good == ["0.001", "2", *shown, "best"]
    assert hopeless[:4] == ["1e+30", "0 of 2", "-", "-"]
    assert re.fullmatch(r"loss=\S+ at step \d+: not finite \(seed 0, 1\)", hopeless[4])


def test_the_same_is_in_sweep_json(swept):
    _, workdir = swept
    report = json.loads((workdir / "sweep.json").read_text())
    assert (report["chosen_by"], report["best"]) == ("validation", {"learning_rate": "0.001"})
    last = [run["last_epoch"] for run in report["settings"][0]["runs"]]
    assert last[1] == workdirs.metrics(workdir / "learning_rate=0.001" / "seed_1")[-1]
    assert "not finite" in report["settings"][1]["runs"][0]["problem"]


def test_the_picture_is_one(swept):
    with Image.open(swept[1] / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.size[0] > 900
        assert picture.size[1] > 200


def test_every_run_has_the_trackers_that_were_asked_for(swept):
    runs = [swept[1] / "learning_rate=0.001" / f"seed_{seed}" for seed in (0, 1)]
    made = [{name for name in trackers.KNOWN if (run / name).exists()} for run in runs]
    assert made == [{"csv"}, {"csv"}]


def test_what_ended_is_not_trained_again(swept, experiment, tfds_dir, monkeypatch):
    _, workdir = swept
    before = (workdir / "sweep.md").read_text()
    monkeypatch.setattr(Processes, "run", lambda *_, **__: pytest.fail("trains again"))
    again = ["learning_rate=0.00100,1E30"]  # the same values
    assert sweep.sweep(experiment, again, 2, workdir, str(tfds_dir)) == 0
    assert rows((workdir / "sweep.md").read_text()) == rows(before)


def test_a_run_that_was_cut_short_goes_on(experiment, tfds_dir, tmp_path, capfd):
    """One that has its first epoch only, as after a signal."""
    folder = tmp_path / "epochs=2" / "seed_0"
    train = ["train", f"--experiment={experiment}", f"--workdir={folder}", "--set", "epochs=1"]
    with Processes() as processes:
        processes.run(*train, f"--data_dir={tfds_dir}")
    assert sweep.sweep(experiment, ["epochs=2"], 1, tmp_path, str(tfds_dir)) == 0
    assert "resumed from step 4" in capfd.readouterr().out
    assert [line["epoch"] for line in workdirs.metrics(folder)] == [1, 2]


def test_without_validation_nothing_is_chosen(experiment, tfds_dir, tmp_path, caplog, capsys):
    fixed = ["data.validation_examples=0", "epochs=1"]
    assert sweep.sweep(experiment, fixed, 1, tmp_path, str(tfds_dir)) == 0
    (warning,) = [text for text in caplog.messages if text.startswith("warning: ")]
    assert "no best setting is chosen, as test accuracy must not choose it" in warning
    shown = capsys.readouterr().out
    assert "Nothing is chosen" in shown
    assert "best" not in shown
    assert rows(shown)[0] == ["n", "test accuracy", ""]


def test_a_run_that_fails_is_shown_and_gives_the_exit_code(experiment, tmp_path, capsys):
    code = sweep.sweep(experiment, ["epochs=1"], 1, tmp_path, str(tmp_path / "nothing"))
    assert code == 3
    shown = capsys.readouterr().out
    _, _, (n, *_, problem) = rows(shown)
    assert n == "0 of 1"
    assert "tiny_squares" in problem
    assert "none is chosen" in shown
    assert "curves.png" not in shown


def ended(validation, test, problem=""):
    line = {"epoch": 1, "validation_accuracy": validation, "test_accuracy": test}
    return sweep.Run(0, [line], problem)


def test_validation_accuracy_chooses_among_settings_that_never_failed():
    runs = {
        "best in test": (ended(0.5, 0.9), ended(0.5, 0.9)),
        "best": (ended(0.5, 0.1), ended(0.7, 0.1)),
        "failed once": (ended(0.9, 0.1), ended(0.9, 0.1, "not finite")),
    }
    found = [sweep.Setting({"name": name}, [], None, pair) for name, pair in runs.items()]
    assert sweep.choose(found, 2).values == {"name": "best"}
    assert sweep.choose(found[2:], 2) is None


# ---------------------------------------------------------------------------------- the picture


def test_a_curve_is_the_mean_of_the_epochs_that_all_runs_have():
    one = [{"epoch": e, "train_loss": loss} for e, loss in ((1, 3.0), (2, 1.0), (3, 0.5))]
    two = [{"epoch": 1, "train_loss": 5.0}, {"epoch": 2, "train_loss": float("inf")}, {"epoch": 3}]
    assert sweep_plot.means([one, two], "train_loss") == [(1, 4.0)]
    assert sweep_plot.means([one], "train_loss") == [(1, 3.0), (2, 1.0), (3, 0.5)]


def test_too_many_settings_are_cut_to_the_best(monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep_plot, "MOST", 2)
    monkeypatch.setattr(
        sweep_plot.plotting, "draw", lambda name, alt, height, paint: drawn.append(alt)
    )
    lines = {
        name: [[{"epoch": 1, "test_loss": 1.0, "test_accuracy": accuracy}]]
        for name, accuracy in (("a", 0.1), ("b", 0.9), ("c", 0.5))
    }
    sweep_plot.curves([*lines.items()], "test")
    assert drawn == ["Loss and accuracy by epoch, means over the seeds, of b, c."]
    assert sweep_plot.curves([("a", [[]])], "test") is None


LONG = "/home/somebody/of/many/folders/that/go/on/and/on/for/eighty/letters/and/more"


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (f"workdir={LONG}: cannot be made: No space", "workdir=…/more: cannot be made: No space"),
        (f"{LONG}/config.json: damaged (x)", "…/config.json: damaged (x)"),
        (f"data.name=a/b: not in data_dir={LONG}", "data.name=a/b: not in data_dir=…/more"),
        ("loss=nan at step 3: not finite", "loss=nan at step 3: not finite"),
        ("x" * 130, "x" * 119 + "…"),
        ("runs/a/b: gone", "runs/a/b: gone"),
    ],
)
def test_a_reason_in_the_table_is_not_a_path_alone(problem, shown):
    assert sweep._short(problem) == shown
