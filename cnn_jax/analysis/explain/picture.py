"""An explanation as a picture: grids of numbers beside each other, or windows over an image."""

from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cnn_jax.analysis import plotting
from cnn_jax.analysis.explain.explanation import Explanation, Grid
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError
from cnn_jax.models.receptive_field import Field

CELL = 0.42  # inches
CHARACTER = 0.17  # cells, the width of a character of the arithmetic
MOST_LINES, MOST_CHARACTERS = 28, 120
MOST_PIXELS = 4000  # of a side
INK, MUTED, RULE = plotting.LIGHT.ink, plotting.LIGHT.muted, plotting.LIGHT.rule
MARKED, PADDING = "#cfe6f7", "#f1f3f5"
STYLE = {"font.size": 9, "text.parse_math": False, "text.color": INK}
LINES = plotting.LIGHT.series


def save(explanation: Explanation, path: Path) -> None:
    """Draws a PNG file into an existing folder.

    Raises:
      ConfigError: its name has another ending, or it cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output={path}: must end in .png")
    with files.written(f"--output={path}", ConfigError):
        draw(explanation).save(path)


def draw(explanation: Explanation) -> Image.Image:
    """The grids or windows, with the arithmetic below them."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(dpi=150)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        if explanation.windows:
            right, bottom = _windows(axes, explanation)
        else:
            right, bottom = _rows(axes, explanation.rows)
        lines = [*_table(explanation.table), *explanation.lines]
        if len(lines) > MOST_LINES + 1:
            lines = [*lines[:MOST_LINES], "..."]
        most = max(MOST_CHARACTERS, int(right / CHARACTER))
        lines = [line if len(line) <= most else _shorten(line, most) for line in lines]
        right = max(right, CHARACTER * max(map(len, lines)), 0.25 * len(explanation.title))
        axes.text(0, -0.5, explanation.title, fontsize=11, fontweight="bold", va="bottom")
        for i, line in enumerate(lines):
            axes.text(0, bottom + 0.5 + 0.5 * i, line, va="top", family="monospace", fontsize=8.5)
        bottom += 1 + 0.5 * len(lines)
        axes.set(xlim=(-0.7, right + 0.7), ylim=(bottom, -1.6))
        size = CELL * (right + 1.4), CELL * (bottom + 1.6)
        figure.set_size_inches(*size)
        figure.set_dpi(min(150, MOST_PIXELS / max(size)))
        return Image.fromarray(plotting.pixels(figure))


def _shorten(sum_: str, most: int) -> str:
    """Leaves out the middle terms of a sum."""
    return f"{sum_[: most - 20].rpartition(' + ')[0]} + ... + {sum_.rpartition(' + ')[2]}"


def _table(table: tuple[tuple[str, ...], ...]) -> list[str]:
    """The table as lines of text with aligned columns."""
    widths = [max(map(len, column)) + 3 for column in zip(*table, strict=True)]
    lines = ["".join(map(str.ljust, row, widths)).rstrip() for row in table]
    return [*lines, ""] if lines else []


def _rows(axes: Any, rows: tuple[tuple[Grid, ...], ...]) -> tuple[float, float]:
    """Draws grids of cells of one unit; returns how far they reach to the right and down."""
    right, top = 0.0, -0.3
    for row in rows:
        left, height = 0.0, max(len(grid.values) for grid in row)
        for grid in row:
            middle = top + 0.7 + height / 2
            if grid.sign:
                axes.text(left - 0.5, middle, grid.sign, ha="center", va="center", fontsize=13)
            _grid(axes, grid, left, middle - len(grid.values) / 2)
            width = max(grid.values.shape[1], 0.24 * len(grid.title))
            left += width + 1
        right, top = max(right, left - 1), top + height + 1.2
    return right, top


def _grid(axes: Any, grid: Grid, left: float, top: float) -> None:
    axes.text(left, top - 0.15, grid.title, va="bottom", color=MUTED)
    for (i, j), value in np.ndenumerate(grid.values):
        faint = grid.is_padding(i, j)
        face = MARKED if grid.is_marked(i, j) else PADDING if faint else "white"
        axes.add_patch(Rectangle((left + j, top + i), 1, 1, facecolor=face, edgecolor=RULE))
        text, colour = f"{value:g}", MUTED if faint else INK
        options = {"fontsize": 9 if len(text) < 4 else 7, "color": colour}
        axes.text(left + j + 0.5, top + i + 0.5, text, ha="center", va="center", **options)
    if all(grid.marked):
        height, width = grid.marked
        outline: dict[str, Any] = {"fill": False, "edgecolor": LINES[0], "linewidth": 1.8}
        axes.add_patch(Rectangle((left, top), width, height, **outline))


def _windows(axes: Any, explanation: Explanation) -> tuple[float, float]:
    """Draws what the middle output of each layer sees, over the image, scaled to fit."""
    height, width = explanation.image
    placed = [(name, *_middle(field), field.size) for name, field in explanation.windows]
    first_row = min(0, *(row for _, row, _, _ in placed))
    first_column = min(0, *(column for _, _, column, _ in placed))
    last_row = max(height, *(row + size[0] for _, row, _, size in placed))
    last_column = max(width, *(column + size[1] for _, _, column, size in placed))
    unit = 11 / max(last_row - first_row, last_column - first_column)

    def rectangle(row: int, column: int, size: tuple[int, int], **options: Any) -> None:
        corner = ((column - first_column) * unit, (row - first_row) * unit)
        axes.add_patch(Rectangle(corner, size[1] * unit, size[0] * unit, **options))

    rectangle(0, 0, (height, width), facecolor=PADDING, edgecolor=MUTED)
    if max(height, width) <= 64:
        for row in range(height):
            for column in range(width):
                rectangle(row, column, (1, 1), fill=False, edgecolor=RULE, linewidth=0.4)
    right = (last_column - first_column) * unit
    for i, (name, row, column, size) in reversed([*enumerate(placed)]):
        colour, dash = LINES[i % len(LINES)], "-" if i < len(LINES) else "--"
        outline = {
            "linewidth": 1.5 + 0.6 * i,
            "linestyle": dash,
        }  # wide enough to show behind a smaller window's
        rectangle(row, column, size, fill=False, edgecolor=colour, **outline)
        axes.text(right + 1.1, 0.4 + 0.75 * i, name, va="center")
        axes.plot([right + 0.4, right + 0.9], [0.4 + 0.75 * i] * 2, dash, color=colour, linewidth=3)
    axes.text(right + 0.4, 0.4 + 0.75 * len(placed), "grey: the image", va="center", color=MUTED)
    bottom = max((last_row - first_row) * unit, 0.75 * (len(placed) + 1))
    return right + 6, bottom + 0.3


def _middle(field: Field) -> tuple[int, int]:
    """The first row and column of what the output in the middle sees."""
    return field.origin((field.places[0] - 1) // 2, (field.places[1] - 1) // 2)
