"""The pictures of evaluations: accuracy by checkpoint, reliability, accuracy by change."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cnn_jax.analysis import plotting
from cnn_jax.common.files import writing

FEWEST = 10  # examples of a bin that is drawn: fewer are noise
MOST_LINES = len(plotting.LIGHT.series)


def save(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what the rows can show, and returns the paths of the pictures.

    Args:
      rows: of evaluations.json.
      folder: made if missing.

    Raises:
      ConfigError: it cannot be written.
    """
    plain = [row for row in rows if not row["change"]]
    drawn = [
        reliability("reliability", [(name, rows[-1]) for name, rows in lines_of(plain).items()])
    ]
    if any(len(line) > 1 for line in lines_of(plain).values()):
        drawn.append(by_checkpoint(plain))
    last = {row["workdir"]: row["checkpoint"] for row in rows}
    latest = [row for row in rows if row["checkpoint"] == last[row["workdir"]]]
    kinds = dict.fromkeys(row["change"]["kind"] for row in rows if row["change"])
    moves = [kind for kind in kinds if kind in ("shift", "rotation")]
    drawn += [by_amount(latest, [kind]) for kind in moves]
    if corruptions := [kind for kind in kinds if kind not in moves]:
        drawn.append(by_amount(latest, corruptions))
    paths = [folder / f"{chart.name}.png" for chart in drawn]
    with writing(folder):
        for path, chart in zip(paths, drawn, strict=True):
            path.write_bytes(chart.light)
    return paths


def lines_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run, dataset and split, under the shortest name that tells them apart."""
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault((row["workdir"], row["dataset"], row["split"]), []).append(row)
    names = _short_names(list(dict.fromkeys(key[0] for key in found)))
    places = {key[1:] for key in found}
    return {
        names[run] + (f" {name}/{split}" if len(places) > 1 else ""): rows
        for (run, name, split), rows in found.items()
    }


def _short_names(runs: Sequence[str]) -> dict[str, str]:
    """The workdirs without the folders that all have in common; addresses in buckets as they are."""
    paths = {run: os.path.abspath(run) for run in runs if "://" not in run}
    if not paths:
        return dict(zip(runs, runs, strict=True))
    folders = [*paths.values()] if len(paths) > 1 else [os.path.dirname(*paths.values())]
    common = os.path.commonpath(folders)
    return {run: os.path.relpath(paths[run], common) if run in paths else run for run in runs}


def by_checkpoint(rows: Sequence[dict[str, Any]]) -> plotting.Chart:
    """The accuracy of each run by step, with its bootstrap interval."""
    lines = dict([*lines_of(rows).items()][:MOST_LINES])

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for i, (name, line) in enumerate(lines.items()):
            ordered = sorted(line, key=lambda row: row["checkpoint"])
            steps = [row["checkpoint"] for row in ordered]
            ends = np.array([row["intervals"]["accuracy"] for row in ordered])
            accuracy = [row["accuracy"] for row in ordered]
            axes.fill_between(steps, *ends.T, color=theme.series[i], alpha=0.2, linewidth=0)
            _line(axes, theme, i, steps, accuracy, name)
        axes.set_xlabel("step")
        _finish(axes)

    ends = "; ".join(f"{name} {line[-1]['accuracy']:.4f}" for name, line in lines.items())
    return plotting.draw("curve", f"Accuracy by checkpoint, the last: {ends}.", 2.7, paint)


def by_amount(rows: Sequence[dict[str, Any]], kinds: Sequence[str]) -> plotting.Chart:
    """The accuracy of each run by the strength of the change; the mean of several kinds."""
    lines = dict([*lines_of(rows).items()][:MOST_LINES])

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for i, (name, line) in enumerate(lines.items()):
            amounts: dict[int, list] = {0: [r["accuracy"] for r in line if not r["change"]]}
            for row in line:
                if row["change"] and row["change"]["kind"] in kinds:
                    amounts.setdefault(row["change"]["amount"], []).append(row["accuracy"])
            places = sorted(amounts)
            _line(axes, theme, i, places, [np.mean(amounts[n]) for n in places], name)
        titles = {"shift": "pixels to the right", "rotation": "degrees, counterclockwise"}
        several = f"strength, mean of {len(kinds)} corruptions"
        axes.set_xlabel(titles.get(kinds[0], several))
        _finish(axes)

    name = f"{kinds[0]}s" if kinds[0] in ("shift", "rotation") else "corruptions"
    return plotting.draw(name, f"Accuracy by {name}.", 2.7, paint)


def reliability(name: str, runs: Sequence[tuple[str, dict[str, Any]]]) -> plotting.Chart:
    """The accuracy of the predictions of each confidence; a calibrated network is on the diagonal."""

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=theme.rule, linewidth=1)
        for i, (label, row) in enumerate(runs[:MOST_LINES]):
            both = [(label, row, i)]
            if len(runs) == 1 and "with_temperature" in row:
                found = row["with_temperature"]
                both.append((f"temperature {found['temperature']:.2f}", found, i + 1))
            for text, measured, place in both:
                bins = [b for b in measured["reliability"] if b["count"] >= FEWEST]
                points = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
                _line(axes, theme, place, *points, f"ECE {measured['ece']:.3f}, {text}")
        plotting.percent_axis(axes.xaxis)
        axes.set_xlabel("confidence")
        _finish(axes)

    ends = "; ".join(f"{label} {row['ece']:.4f}" for label, row in runs)
    return plotting.draw(name, f"Accuracy by confidence; ECE: {ends}.", 2.9, paint)


def _line(
    axes: Any, theme: plotting.Theme, place: int, x: Sequence, y: Sequence, label: str
) -> None:
    axes.plot(
        x,
        y,
        plotting.LINES[place % len(plotting.LINES)],
        color=theme.series[place],
        marker=plotting.MARKERS[place] if len(x) <= 25 else None,
        label=plotting.clip(label, 40),
    )


def _finish(axes: Any) -> None:
    axes.set_ylabel("accuracy")
    plotting.percent_axis(axes.yaxis)
    axes.legend(ncols=1, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
