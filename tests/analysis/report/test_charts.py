"""The charts: in every case that a run can be in, of any size, and the same for everyone."""

import dataclasses
import types

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from cnn_jax.analysis import plotting
from cnn_jax.analysis.report import charts, comparison
from cnn_jax.config import Config, DataConfig
from cnn_jax.models import LeNet
from tests.analysis.report.pages import pixels

LINE = {"step": 10, "epoch": 1, "train_loss": 2.0, "train_accuracy": 0.25, "epoch_seconds": 1.0}


def coloured(chart: plotting.Chart, colour: str) -> int:
    """How many pixels of the light form have nearly this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels(chart.light)[..., :3].astype(int) - wanted).max(-1) < 24).sum())


def test_only_the_measured_splits_have_a_curve():
    train, validation, test = (plotting.LIGHT.series[i] for i in (1, 2, 0))
    chart = charts.curves([LINE, LINE | {"epoch": 2, "test_loss": 1.5}], "loss", 10)
    assert coloured(chart, train) > 20
    assert coloured(chart, test) > 20
    assert coloured(chart, validation) == 0
    assert "train 2.000 after epoch 1" in chart.alt
    assert "test 1.500 after epoch 2" in chart.alt
    assert "validation" not in chart.alt


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_any_number_of_epochs(epochs: int):
    lines = [LINE | {"epoch": i + 1, "step": 10 * i} for i in range(epochs)]
    chart = charts.curves(lines, "accuracy", 0)
    assert coloured(chart, plotting.LIGHT.series[1]) > 20
    assert pixels(chart.light).shape == (250, 360, 4)


@pytest.mark.parametrize("last", [1, 2, 3, 10, 300])
def test_epochs_are_whole_numbers(last: int):
    axes = Figure().add_subplot()
    plotting.epoch_axis(axes, last)
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) >= 1 for tick in ticks)
    assert low <= 1 <= last <= high


def test_bars_are_as_long_as_the_accuracy():
    chart = charts.class_accuracy(["high", "low"], [0.9, 0.45])
    blue = np.array([0, 0x72, 0xB2])
    bars = np.abs(pixels(chart.light)[..., :3].astype(int) - blue).max(-1) < 24
    lengths = bars.sum(1)
    low, high = lengths[: len(lengths) // 2].max(), lengths[len(lengths) // 2 :].max()
    assert low / high == pytest.approx(0.5, abs=0.02)  # the lower one is above
    assert "from 45.0\u00a0% (low) to 90.0\u00a0% (high)" in chart.alt


def test_of_many_classes_the_weakest_have_bars():
    names = [f"class {i}" for i in range(100)]
    few = charts.class_accuracy(names[:20], [0.5] * 20)
    many = charts.class_accuracy(names, [0.5] * 100)
    assert pixels(few.light).shape == pixels(many.light).shape
    assert "100 classes" in many.alt


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 100])
def test_a_confusion_matrix_of_any_size(classes: int):
    matrix = np.eye(classes, dtype=int) * 20_000
    matrix[0, -1] += 1
    chart = charts.confusion([f"class {i}" for i in range(classes)], matrix)
    darkest = "#002852"  # of canvas.LIGHT.heat: a row that is all on the diagonal
    assert coloured(chart, darkest) > 100
    assert f"{int(matrix.trace()):,} of {matrix.sum():,} test examples" in chart.alt


def test_settings_of_the_users_matplotlib_change_nothing():
    draw = lambda: charts.class_accuracy(["a", "b"], [0.5, 1.0])  # noqa: E731
    plain = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.parse_math": True}):
        assert draw() == plain


def test_light_and_dark_differ_only_in_colours():
    chart = charts.class_accuracy(["a", "b"], [0.5, 1.0])
    light, dark = (pixels(png)[..., :3].astype(int) for png in (chart.light, chart.dark))
    assert light.shape == dark.shape
    differs = (light == light[0, 0]).all(-1) != (dark == dark[0, 0]).all(-1)
    assert differs.mean() < 1e-3  # a few pixels at the edges of letters


def test_a_learning_rate_is_drawn_if_it_changes():
    config = Config(LeNet(), DataConfig("tiny"), epochs=4, learning_rate=0.5)
    assert charts.learning_rate(config, 10) is None
    config = dataclasses.replace(config, schedule="step", milestones=(1.0, 3.0))
    alt = charts.learning_rate(config, 10).alt
    assert alt.endswith("0.5 at the first step, at most 0.5, 0.005 at the last step.")


def test_runs_without_a_class_in_common_have_no_chart_of_the_classes():
    def tested(*accuracies):
        of = types.SimpleNamespace(class_names=("cat", "dog"))
        return types.SimpleNamespace(
            run=of, result=types.SimpleNamespace(class_accuracy=lambda: accuracies)
        )

    assert comparison.classes([tested(0.5, None), tested(None, 0.5)], ["a", "b"]) is None
    chart = comparison.classes([tested(0.5, None), tested(0.25, 0.5)], ["a", "b"])
    assert chart.alt == "Accuracy of each class by network: cat is the hardest on average."
