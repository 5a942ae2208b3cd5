"""The charts of several runs side by side."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cnn_jax.analysis import plotting
from cnn_jax.analysis.report import formatting
from cnn_jax.analysis.report.run_data import Facts

MOST_CLASSES, MOST_RUNS = 20, 10


def curves(runs: list[Facts], names: list[str], metric: str) -> plotting.Chart | None:
    """Test "loss" or "accuracy" of every run by epoch; None if no run has finished an epoch."""
    key = f"test_{metric}"
    points = [[(line["epoch"], line[key]) for line in run.lines if key in line] for run in runs]
    if not any(points):
        return None
    last = max(epoch for series in points for epoch, _ in series)
    columns = 2 if max(map(len, names)) <= 16 else 1

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for i, (series, name) in enumerate(zip(points, names, strict=True)):
            if series:
                epochs, values = zip(*series, strict=True)
                style = _style(theme, i)
                if len(epochs) > 25:
                    style["marker"] = None
                axes.plot(epochs, values, **style, label=plotting.clip(name, 40), clip_on=False)
        axes.set_ylabel(f"test {metric}")
        plotting.epoch_axis(axes, last)
        if metric == "accuracy":
            plotting.percent_axis(axes.yaxis)
        figure.legend(ncols=columns, loc="outside upper left")

    ends = "; ".join(
        f"{name} "
        f"{formatting.percent(series[-1][1]) if metric == 'accuracy' else f'{series[-1][1]:.3f}'}"
        for series, name in zip(points, names, strict=True)
        if series
    )
    height = 2.3 + 0.16 * -(-len(runs) // columns)
    return plotting.draw(
        f"test-{metric}", f"Test {metric} by epoch, at the end: {ends}.", height, paint
    )


def accuracy_against(
    runs: list[Facts], names: list[str], what: str, value: Callable[[Facts], float | None]
) -> plotting.Chart | None:
    """One point for each run: its test accuracy against its cost, on a logarithmic axis.

    Args:
      runs: to compare.
      names: of the runs.
      what: the cost's name, as in "parameters".
      value: gives the cost of a run; a run with None or 0 is left out.
    """
    found = [(i, cost) for i, run in enumerate(runs) if (cost := value(run))]
    if not found:
        return None
    places, costs = [i for i, _ in found], [cost for _, cost in found]
    scores = [runs[i].result.accuracy for i in places]

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xscale("log")
        for i, cost, score in zip(places, costs, scores, strict=True):
            style = _style(theme, i) | {"linestyle": "none", "markersize": 6}
            axes.plot(cost, score, **style)
        low, high = np.log10(min(costs)), np.log10(max(costs))
        room = max(0.35, 0.18 * (high - low))
        axes.set_xlim(10 ** (low - room), 10 ** (high + room))
        margin = max(0.005, 0.12 * (max(scores) - min(scores)))
        axes.set_ylim(min(scores) - margin, max(scores) + margin)
        axes.set_xlabel(what)
        axes.set_ylabel("test accuracy")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: formatting.short(x)))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
        if high - low < 1:  # the axis may contain no power of ten
            axes.set_xticks(sorted(set(costs)))
        plotting.percent_axis(axes.yaxis)
        _label(axes, theme, costs, scores, [plotting.clip(names[i], 22) for i in places])

    alt = f"Test accuracy against {what}: " + "; ".join(
        f"{names[i]} {formatting.percent(score)} with {formatting.short(cost)}"
        for i, cost, score in zip(places, costs, scores, strict=True)
    )
    name = "accuracy-" + "-".join(what.split()[:1]).lower()
    return plotting.draw(name, f"{alt}.", 2.6, paint)


def classes(runs: list[Facts], names: list[str]) -> plotting.Chart | None:
    """Accuracy of the classes that all runs tested, one column for each; None if they do not fit."""
    labels = runs[0].run.class_names
    scores = np.array([run.result.class_accuracy() for run in runs], float).T
    tested = np.flatnonzero(~np.isnan(scores).any(1))
    if not 0 < len(tested) <= MOST_CLASSES or len(runs) > MOST_RUNS:
        return None
    shown, scores = [labels[i] for i in tested], scores[tested]

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        columns = [plotting.clip(name, 14) for name in names]
        plotting.heat_map(axes, theme, scores, [plotting.clip(name, 14) for name in shown], columns)
        axes.set_aspect("auto")
        for (row, column), score in np.ndenumerate(scores):
            plotting.number(axes, theme, row, column, f"{100 * score:.0f}", score, size=7)

    worst = shown[int(np.argmin(scores.mean(1)))]
    alt = f"Accuracy of each class by network: {worst} is the hardest on average."
    return plotting.draw("classes", alt, 1 + 0.23 * len(shown), paint)


def _label(axes: Any, theme: plotting.Theme, costs: list, scores: list, names: list[str]) -> None:
    """Writes names beside the points, towards the middle, without overlap."""
    low, high = (np.log10(x) for x in axes.get_xlim())
    bottom, top = axes.get_ylim()
    apart = 0.075 * (top - bottom)
    for side in ("left", "right"):
        level = -np.inf
        for i in np.argsort(scores, kind="stable"):
            left = (np.log10(costs[i]) - low) / (high - low) < 0.5
            if left != (side == "left"):
                continue
            level = max(scores[i], level + apart)
            axes.annotate(
                names[i],
                (costs[i], level),
                xytext=(6 if left else -6, 0),
                textcoords="offset points",
                ha="left" if left else "right",
                va="center",
                fontsize=7.5,
                color=theme.ink,
                annotation_clip=False,
            )


def _style(theme: plotting.Theme, i: int) -> dict:
    """The look of run `i`, the same in every chart: colour, mark and line together."""
    return {
        "color": theme.series[i % len(theme.series)],
        "marker": plotting.MARKERS[i % len(plotting.MARKERS)],
        "linestyle": plotting.LINES[i // len(theme.series) % len(plotting.LINES)],
    }
