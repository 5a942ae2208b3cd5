"""Loss and accuracy by epoch of a sweep's settings, as one picture."""

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from cnn_jax.analysis import plotting

MOST = 16  # settings; more curves would hide each other


def curves(settings: Sequence[tuple[str, list[list[dict]]]], split: str) -> plotting.Chart | None:
    """Two panels, loss and accuracy, with one line per setting: the mean over its runs.

    Args:
      settings: the name of each, and the lines of metrics.jsonl for each of its runs.
      split: "validation" or "test"; its curves are solid, the training curves thin and dotted.

    Returns:
      The chart; None if no run ended an epoch.
    """
    drawn = [(name, [lines for lines in runs if lines]) for name, runs in settings]
    drawn = [(name, runs) for name, runs in drawn if runs]
    if not drawn:
        return None
    total = len(drawn)
    if total > MOST:
        ends = {
            name: (means(runs, f"{split}_accuracy") or [(0, 0.0)])[-1][1] for name, runs in drawn
        }
        kept = sorted(ends, key=ends.__getitem__, reverse=True)[:MOST]
        drawn = [(name, runs) for name, runs in drawn if name in kept]
    last = max(lines[-1]["epoch"] for _, runs in drawn for lines in runs)

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        panels = figure.subplots(2, 1, sharex=True)
        for axes, metric in zip(panels, ("loss", "accuracy"), strict=True):
            axes.grid(axis="y")
            heights = []
            for i, (name, runs) in enumerate(drawn):
                marker = plotting.MARKERS[i % 8] if last <= 25 else None
                line = plotting.LINES[i // len(theme.series)]
                evaluated = {"label": name, "linestyle": line, "marker": marker, "linewidth": 1.6}
                training = {"alpha": 0.5, "linestyle": ":", "linewidth": 0.9}
                for source, style in ((split, evaluated), ("train", training)):
                    points = means(runs, f"{source}_{metric}")
                    heights += [value for _, value in points]
                    color = theme.series[i % len(theme.series)]
                    if points:
                        axes.plot(*zip(*points, strict=True), color=color, clip_on=False, **style)
            if metric == "loss" and heights and max(heights) > 20 * min(heights) > 0:
                axes.set_yscale("log")
            axes.set_ylabel(metric)
        plotting.percent_axis(panels[1].yaxis)
        plotting.epoch_axis(panels[1], last)
        note = f"solid: {split}, dotted: training" + (
            f"; the best {MOST} of {total} settings" if total > MOST else ""
        )
        panels[0].set_title(note, fontsize=7.5, loc="left", color=theme.muted)
        handles, labels = panels[1].get_legend_handles_labels()
        labels = [plotting.clip(label, 60) for label in labels]
        columns = 2 if max(map(len, labels), default=0) < 24 else 1
        figure.legend(handles, labels, ncols=columns, loc="outside lower left")

    rows = len(drawn) if any(len(name) >= 24 for name, _ in drawn) else -(-len(drawn) // 2)
    names = ", ".join(name for name, _ in drawn)
    alt = f"Loss and accuracy by epoch, means over the seeds, of {names}."
    return plotting.draw("curves", alt, 4.2 + 0.16 * rows, paint)


def means(runs: list[list[dict]], key: str) -> list[tuple[int, float]]:
    """(epoch, mean over the runs) for the epochs in which every run has a finite value."""
    values: dict[int, list[float]] = {}
    for lines in runs:
        for line in lines:
            if key in line and math.isfinite(line[key]):
                values.setdefault(line["epoch"], []).append(line[key])
    return [
        (epoch, statistics.fmean(found))
        for epoch, found in sorted(values.items())
        if len(found) == len(runs)
    ]
