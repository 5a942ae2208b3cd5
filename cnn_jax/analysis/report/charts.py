"""The charts of one run."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from cnn_jax.analysis import plotting
from cnn_jax.analysis.report import formatting
from cnn_jax.config import Config
from cnn_jax.models.summary import Summary
from cnn_jax.train.optim import make_schedule

MOST_BARS = 20
# The colour and line of each split's curve.
SPLITS = {"train": (1, "--"), "validation": (2, ":"), "test": (0, "-")}
MOST_COUNTS = 12  # classes; a larger matrix has no room for numbers


def curves(lines: list[dict], metric: str, step: int) -> plotting.Chart:
    """The loss or accuracy of each split by epoch, from the lines of metrics.jsonl.

    A thin line marks the epoch of the checkpoint, `step`, unless it is the last one.
    """
    splits = [
        s for s in ("train", "validation", "test") if any(f"{s}_{metric}" in x for x in lines)
    ]
    points = {
        s: [(x["epoch"], x[f"{s}_{metric}"]) for x in lines if f"{s}_{metric}" in x] for s in splits
    }

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for split in splits:
            place, line = SPLITS[split]
            epochs, values = zip(*points[split], strict=True)
            axes.plot(
                epochs,
                values,
                line,
                color=theme.series[place],
                marker=None if len(epochs) > 25 else plotting.MARKERS[place],
                label=split,
                clip_on=False,
            )
        axes.set_ylabel(metric)
        plotting.epoch_axis(axes, lines[-1]["epoch"])
        marked = [line["epoch"] for line in lines[:-1] if line["step"] == step]
        if marked:
            axes.axvline(marked[0], color=theme.muted, linewidth=0.8, label="checkpoint")
        if metric == "accuracy":
            plotting.percent_axis(axes.yaxis)
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)

    def show(value: float) -> str:
        return formatting.percent(value) if metric == "accuracy" else f"{value:.3f}"

    ends = "; ".join(
        f"{split} {show(points[split][0][1])} after epoch {points[split][0][0]}, "
        f"{show(points[split][-1][1])} after epoch {points[split][-1][0]}"
        for split in splits
    )
    return plotting.draw(metric, f"{metric.capitalize()} by epoch: {ends}.", 2.5, paint)


def learning_rate(config: Config, steps_per_epoch: int) -> plotting.Chart | None:
    """The learning rate by epoch; None if it is constant."""
    total = config.epochs * steps_per_epoch
    steps = np.unique(np.linspace(0, total - 1, 800).astype(int))
    rates = np.asarray(jax.vmap(make_schedule(config, steps_per_epoch))(jnp.asarray(steps)))
    if np.ptp(rates) < 1e-6 * config.learning_rate:
        return None

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.plot(steps / steps_per_epoch, rates, color=theme.series[0])
        axes.set_ylabel("learning rate")
        plotting.epoch_axis(axes, config.epochs)
        axes.set_xlim(0, config.epochs)
        axes.set_ylim(bottom=0)

    alt = (
        f"Learning rate by epoch, {config.schedule} schedule: {rates[0]:.3g} at the first step, "
        f"at most {rates.max():.3g}, {rates[-1]:.3g} at the last step."
    )
    return plotting.draw("learning-rate", alt, 1.7, paint)


def class_accuracy(names: list[str], accuracy: list[float]) -> plotting.Chart:
    """One bar for each class, the lowest at the top; at most the MOST_BARS lowest."""
    order = np.argsort(accuracy, kind="stable")
    lowest = order[:MOST_BARS]

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        values = [accuracy[i] for i in lowest]
        places = range(len(values))
        axes.barh(places, values, height=0.62, color=theme.series[0])
        axes.set_yticks(places, [plotting.clip(names[i], 18) for i in lowest], color=theme.ink)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.015, place, formatting.percent(value), va="center", fontsize=7.5)
        axes.set_xlim(0, 1.17)
        axes.set_ylim(len(values) - 0.4, -0.6)
        plotting.bare(axes)

    first, last = order[0], order[-1]
    alt = (
        f"Accuracy of {formatting.plural(len(names), 'class')}, from "
        f"{formatting.percent(accuracy[first])} ({names[first]}) to "
        f"{formatting.percent(accuracy[last])} ({names[last]})."
    )
    return plotting.draw("class-accuracy", alt, 0.35 + 0.23 * len(lowest), paint)


def confusion(names: list[str], matrix: np.ndarray) -> plotting.Chart:
    """Rows by true class, columns by predicted one, coloured by the share of the row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        # The square root makes a share of 2 % visible. More than 40 names are not readable.
        labels = [plotting.clip(name, 12) for name in names] if len(names) <= 40 else []
        size = 7.5 if len(names) <= MOST_COUNTS else 5
        plotting.heat_map(axes, theme, np.sqrt(share), labels, labels, size)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(names) > MOST_COUNTS:
            return
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                text = (
                    str(count)
                    if count < 10_000
                    else formatting.short(count).replace(formatting.SPACE, "")
                )
                level = np.sqrt(share[row, column])
                size = 6.5 if len(names) <= 10 else 5.5
                plotting.number(axes, theme, row, column, text, level, size)

    right = int(matrix.trace())
    alt = f"Confusion matrix: {right:,} of {int(matrix.sum()):,} test examples lie on the diagonal."
    return plotting.draw("confusion", alt, 3.4, paint)


def layers(summary: Summary) -> plotting.Chart:
    """Parameters and FLOPs of the largest layers, side by side, in the network's order."""
    both = [(layer.parameters, layer.flops) for layer in summary.layers]
    totals = [max(summary.parameters, 1), max(summary.flops, 1)]
    weight = [max(p / totals[0], f / totals[1]) for p, f in both]
    kept = sorted(np.argsort(weight, kind="stable")[::-1][:8])
    kept = [i for i in kept if weight[i] > 0]

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        places = range(len(kept))
        for k, (axes, title) in enumerate(zip(panels, ("parameters", "FLOPs"), strict=True)):
            values = [both[i][k] / totals[k] for i in kept]
            axes.barh(places, values, height=0.62, color=theme.series[k])
            for place, i in zip(places, kept, strict=True):
                label = formatting.short(both[i][k])
                axes.text(both[i][k] / totals[k] + 0.02, place, label, va="center", fontsize=7.5)
            axes.set_title(title, fontsize=8, loc="left", color=theme.muted)
            axes.set_xlim(0, 1.38)
            plotting.bare(axes)
        labels = [plotting.clip(summary.layers[i].name, 16) for i in kept]
        panels[0].set_yticks(places, labels, color=theme.ink)
        panels[0].set_ylim(len(kept) - 0.4, -0.6)

    most = [max(range(len(both)), key=lambda i: both[i][k]) for k in (0, 1)]
    alt = (
        f"{summary.layers[most[0]].name} holds the most parameters, "
        f"{formatting.count(both[most[0]][0])} of {formatting.count(totals[0])}; "
        f"{summary.layers[most[1]].name} computes the most, {formatting.short(both[most[1]][1])} of "
        f"{formatting.short(totals[1])} FLOPs."
    )
    return plotting.draw("layers", alt, 0.55 + 0.25 * len(kept), paint)
