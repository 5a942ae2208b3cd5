"""What all charts share: width, colours, markers and PNG files.

Charts are drawn for a column 360 pixels wide, so that a phone does not shrink their text. Each is
drawn for a light page and for a dark one.
"""

import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from cnn_jax.analysis import fonts
from cnn_jax.common import images

WIDTH = 3.6  # inches of 100 pixels
DPI = 270


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of a page. Those of the series suit colour-blind readers (Okabe and Ito)."""

    paper: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]
    heat: tuple


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2126",
    muted="#59636e",
    rule="#d8dde3",
    series=("#0072b2", "#d55e00", "#009e73", "#b3609a", "#8a6d00", "#56b4e9", "#5b5bd6", "#1c2126"),
    heat=images.PAPER,
)
DARK = Theme(
    paper="#14181c",
    ink="#e6e9ec",
    muted="#9aa5b1",
    rule="#343b43",
    series=("#56b4e9", "#e69f00", "#2fc19a", "#d994c4", "#f0e442", "#0072b2", "#a3a3ff", "#e6e9ec"),
    heat=((26, 32, 38), (24, 84, 128), (86, 180, 233), (214, 238, 252)),
)
MARKERS = "os^Dv<>P"
LINES = ("-", "--", "-.", ":")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture as PNG.

    Attributes:
      name: of its file, without .png.
      light: the file's bytes.
      dark: the same for a dark page; None if `light` suits both.
      alt: what it shows, in words.
    """

    name: str
    light: bytes
    dark: bytes | None
    alt: str


def draw(
    name: str,
    alt: str,
    height: float,
    paint: Callable[[Figure, Theme], Any],
    width: float = WIDTH,
) -> Chart:
    """Paints a figure twice, for a light page and for a dark one.

    Args:
      name: of the file.
      alt: what the chart shows, in words.
      height: in inches of 100 pixels.
      paint: adds axes to the figure, in the theme's colours.
      width: in inches of 100 pixels.
    """
    files = []
    for theme in (LIGHT, DARK):
        with _style(theme):
            figure = Figure(figsize=(width, height), layout="constrained")
            paint(figure, theme)
            files.append(png(pixels(figure), 256))
    return Chart(name, files[0], files[1], alt)


def pixels(figure: Figure) -> np.ndarray:
    """Draws the figure, with fonts for the names in it: uint8 [h, w, 3]."""
    fonts.use_for(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def picture(name: str, image: np.ndarray, alt: str) -> Chart:
    """uint8 [h, w, 1, 3 or 4] as one picture for light and dark pages."""
    return Chart(name, png(image, 256 if image.shape[2] == 4 else None), None, alt)


def png(image: np.ndarray, colours: int | None = None) -> bytes:
    """uint8 [h, w, 1, 3 or 4] as a PNG file; at most 256 `colours` make it a third as large."""
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[image.shape[2]]
    drawn = Image.fromarray(image[..., 0] if mode == "L" else image)
    if colours:
        # MEDIANCUT does not support transparency. FASTOCTREE does, but gives fewer shades.
        method = Image.Quantize.FASTOCTREE if mode == "RGBA" else Image.Quantize.MEDIANCUT
        drawn = drawn.quantize(colours, method, dither=Image.Dither.NONE)
    file = io.BytesIO()
    drawn.save(file, "PNG", optimize=True)
    return file.getvalue()


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """matplotlib's defaults in the theme's colours; the user's matplotlibrc has no effect."""
    settings = {
        "savefig.dpi": DPI,
        "figure.dpi": DPI,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "font.size": 8,
        "text.color": theme.ink,
        "text.parse_math": False,  # a class may be called $\frac
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.rule,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.color": theme.rule,
        "grid.linewidth": 0.6,
        "xtick.color": theme.rule,
        "ytick.color": theme.rule,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "legend.handlelength": 2.4,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
    }
    with matplotlib.style.context(["default", settings]):
        yield


def percent_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def epoch_axis(axes: Any, last: int) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlim((1, last) if last > 1 else (0.5, 1.5))


def bare(axes: Any) -> None:
    """Removes all but the bars and their numbers."""
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def clip(text: str, length: int) -> str:
    """At most `length` characters on one line, as a label that the installed fonts can draw."""
    text = fonts.drawable(" ".join(text.split()))
    text = f" {text}" if text.startswith("_") else text  # a legend skips labels with _
    return text if len(text) <= length else text[: length - 1] + "…"


def heat_map(
    axes: Any,
    theme: Theme,
    shares: np.ndarray,
    rows: list[str],
    columns: list[str],
    size: float = 7.5,
) -> None:
    """Shares in [0, 1], [rows, columns], in the theme's colours, with names of `size` points."""
    heat = LinearSegmentedColormap.from_list("heat", np.array(theme.heat) / 255)
    axes.imshow(shares, cmap=heat, vmin=0, vmax=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size, color=theme.ink)
    axes.set_yticks(range(len(rows)), rows, fontsize=size, color=theme.ink)


def number(
    axes: Any, theme: Theme, row: int, column: int, text: str, share: float, size: float
) -> None:
    """Writes into a cell of `heat_map`, in a colour that is readable there."""
    colour = theme.ink if share < 0.5 else theme.paper
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
