"""A class map as a picture: the image, its most probable classes, and what one score sees."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from cnn_jax.analysis import plotting
from cnn_jax.common.pairs import pair
from cnn_jax.models.receptive_field import Field

PANEL = 3.6  # inches, the longer side of a panel
MOST_NAMES = 20
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $\frac
    "axes.titlesize": 10,
    "axes.edgecolor": plotting.LIGHT.muted,
    "axes.facecolor": "#e4e8ec",
    "legend.frameon": False,
}
SEEN, FOUND, MISSED = "#ff2a6d", "#00d68f", "#ffb000"


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Places of known class in an image.

    Attributes:
      places: int [N, 2], first row and column of each.
      size: height and width of each.
      scores: int [N, 2], row and column of the score that belongs to each.
      found: bool [N], whether that score is highest for the right class.
    """

    places: np.ndarray
    size: tuple[int, int]
    scores: np.ndarray
    found: np.ndarray


def draw(
    image: np.ndarray,
    class_map: np.ndarray,
    field: Field | None,
    class_names: Sequence[str],
    boxes: Boxes | None = None,
) -> Image.Image:
    """Draws image, classes and probabilities side by side; below each other for a wide image.

    Each score is drawn at the centre of its window, in a cell as large as the stride. The border,
    where no window has its centre, stays grey.

    Args:
      image: uint8 [H, W, C].
      class_map: float32 [h, w, classes], probabilities.
      field: what the scores see; None if not known: the map then covers the whole image.
      class_names: of the map, in order.
      boxes: drawn into image and map.
    """
    height, width = image.shape[:2]
    wide = width > 1.5 * height
    winner, probability = class_map.argmax(-1), class_map.max(-1)
    chosen = _choose(probability, field, (height, width), boxes)
    with matplotlib.style.context(["default", STYLE]):
        across, down = PANEL * width / max(width, height), PANEL * height / max(width, height)
        size = (across + 1.6, 3 * down + 2.6) if wide else (3 * across + 1.4, down + 1.5)
        figure = Figure(
            figsize=(max(size[0], 5 if wide else 8), max(size[1], 3)),
            dpi=150,
            layout="constrained",
        )
        panels = figure.subplots(3, 1) if wide else figure.subplots(1, 3)
        _image(panels[0], image, field, chosen, boxes)
        extent = _extent(winner.shape, field, (height, width))
        _winners(panels[1], figure, winner, probability, extent, class_names)
        shown = panels[2].imshow(
            probability, interpolation="nearest", extent=extent, cmap="cividis", vmin=0, vmax=1
        )
        panels[2].set_title("its probability")
        # If the panels are below each other, beside all of them: it would narrow the last one.
        place = {"ax": panels, "shrink": 0.3, "anchor": (0, 0)} if wide else {"ax": panels[2]}
        figure.colorbar(shown, **{"shrink": 0.85, "pad": 0.02, **place})
        for panel in panels:
            panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
            panel.set_aspect("equal")
        if boxes is not None:
            for place in boxes.places:
                _rectangle(panels[1], place, boxes.size, "#00000070", linewidth=0.8)
        if chosen is not None and field is not None:
            _rectangle(panels[0], field.origin(*chosen), field.size, SEEN, linewidth=2)
            _rectangle(panels[1], _cell(field, *chosen), field.stride, SEEN, linewidth=1.5)
        return Image.fromarray(plotting.pixels(figure))


def _choose(
    probability: np.ndarray, field: Field | None, image: tuple[int, int], boxes: Boxes | None
) -> tuple[int, int] | None:
    """The score whose window is drawn: the most probable of those found, or inside the image."""
    if field is None:
        return None
    allowed = np.zeros(probability.shape, bool)
    if boxes is not None and boxes.found.any():
        allowed[tuple(boxes.scores[boxes.found].T)] = True
    elif all(inside := field.inside(image)):
        allowed[np.ix_(*inside)] = True
    else:
        allowed[:] = True
    best = np.argmax(np.where(allowed, probability, -1))
    row, column = np.unravel_index(best, allowed.shape)
    return int(row), int(column)


def _image(
    axes: Any,
    image: np.ndarray,
    field: Field | None,
    chosen: tuple[int, int] | None,
    boxes: Boxes | None,
) -> None:
    pixels = image[..., :3] if image.shape[2] > 1 else image[..., 0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(f"image, {image.shape[0]} x {image.shape[1]} pixels")
    captions = []
    if boxes is not None:
        for place, found in zip(boxes.places, boxes.found, strict=True):
            line = {"colour": FOUND} if found else {"colour": MISSED, "linestyle": ":"}
            _rectangle(axes, place, boxes.size, **line)
        captions.append(
            f"green: {boxes.found.sum()} of {len(boxes.found)} images found; dotted: not"
        )
    if chosen is not None and field is not None:
        size, step = (" x ".join(map(str, pair)) for pair in (field.size, field.stride))
        captions.append(
            f"red: the {size} pixels that one score sees,\none score for each {step} pixels"
        )
    axes.set_xlabel("\n".join(captions))


def _winners(
    axes: Any,
    figure: Figure,
    winner: np.ndarray,
    probability: np.ndarray,
    extent: tuple[float, ...],
    names: Sequence[str],
) -> None:
    listed: Any = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    palette = listed.colors
    colours = np.array([palette[i % len(palette)] for i in range(len(names))])
    weak = 1 / len(names)  # the probability if all classes have the same
    strength = np.clip((probability - weak) / max(1 - weak, 1e-6), 0, 1)[..., None]
    shown = 1 - (1 - colours[winner]) * (0.15 + 0.85 * strength)
    axes.imshow(shown, interpolation="nearest", extent=extent)
    axes.set_title(f"most probable class, {winner.shape[0]} x {winner.shape[1]} scores")
    axes.set_xlabel("the paler, the less probable")
    named: Sequence[int] = range(len(names))
    if len(names) > MOST_NAMES:
        counts = np.bincount(winner.ravel(), minlength=len(names))
        named = [i for i in np.argsort(-counts, kind="stable")[:MOST_NAMES] if counts[i]]
    patches = [Patch(color=colours[i], label=plotting.clip(names[i], 24)) for i in named]
    columns = 5 if figure.get_figwidth() > 7 else 3
    figure.legend(handles=patches, loc="outside lower center", ncols=min(columns, len(patches)))


def _extent(
    scores: tuple[int, int], field: Field | None, image: tuple[int, int]
) -> tuple[float, ...]:
    """Left, right, bottom and top of a map whose scores lie at the centres of their windows."""
    first: tuple[float, float] = (0, 0)
    end: tuple[float, float] = image
    if field is not None:
        first, end = _cell(field, 0, 0), _cell(field, *scores)
    (top, left), (bottom, right) = first, end
    return left - 0.5, right - 0.5, bottom - 0.5, top - 0.5


def _cell(field: Field, row: int, column: int) -> tuple[float, float]:
    """First row and column of the cell in which a score is drawn."""
    axes = zip(field.origin(row, column), field.size, field.stride, strict=True)
    return pair(origin + (size - stride) / 2 for origin, size, stride in axes)


def _rectangle(
    axes: Any, place: Sequence[float], size: tuple[int, int], colour: str, **options: Any
) -> None:
    corner = (place[1] - 0.5, place[0] - 0.5)
    axes.add_patch(Rectangle(corner, size[1], size[0], fill=False, edgecolor=colour, **options))
