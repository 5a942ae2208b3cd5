"""Images beside the maps of what their class depends on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cnn_jax.analysis import plotting
from cnn_jax.analysis.attribution import methods
from cnn_jax.analysis.predict import read_image
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import images
from cnn_jax.common.files import printable, writing
from cnn_jax.models.summary import summarise

log = logging.getLogger(__name__)

TILE = 88  # pixels, of a picture for a page
PANEL, LETTER = 0.9, 0.07  # inches of 100 pixels
MOST = 16  # images
SHADES = 31  # a quantised picture is a third as large


def tiles(image: np.ndarray, maps: dict[str, np.ndarray]) -> np.ndarray:
    """A row for each image, itself and its maps, each scaled to its highest value: uint8 [h, w, 4]."""
    rows = []
    for i, one in enumerate(image):
        rows.append(np.broadcast_to(one, (*one.shape[:2], 3)))
        rows += _coloured(maps, i)
    return images.tiles(np.stack(rows), 1 + len(maps), TILE)


def of_files(run: RestoredRun, files: Sequence[str], output: Path) -> Path:
    """Draws what the most probable class of image files depends on.

    Args:
      run: from `restore.load_run`.
      files: images that can be read; the first MOST of them are drawn, in the size of the training.
      output: the folder of the picture; made if missing.

    Returns:
      The path of the picture.

    Raises:
      ConfigError: `output` cannot be written.
    """
    if len(files) > MOST:
        log.warning("warning: --attribution draws the first %d of %d images", MOST, len(files))
    files = files[:MOST]
    image = np.stack([read_image(file, run.image_shape) for file in files])
    found = methods.probabilities(run)(image)
    target = found.argmax(-1)
    maps = methods.explain(run, summarise(run.model, run.image_shape), image, target)
    labels = [
        f"{plotting.clip(run.class_names[c], 24)}, {100 * found[i, c]:.1f} %\n"
        + plotting.clip(printable(Path(files[i]).name), 28)
        for i, c in enumerate(target)
    ]

    height, width, _ = image.shape[1:]
    titles = f"at {height}x{width}", *maps

    def paint(figure: Figure, theme: plotting.Theme) -> None:
        panels = figure.subplots(len(image), len(titles), squeeze=False)
        for axes, name in zip(panels[0], titles, strict=True):
            axes.set_title(name, color=theme.muted, fontsize=8)
        for i, row in enumerate(panels):
            row[0].set_ylabel(labels[i], rotation=0, ha="right", va="center", color=theme.ink)
            shown = np.broadcast_to(image[i], (*image.shape[1:3], 3))
            for axes, one in zip(row, (shown, *_coloured(maps, i)), strict=True):
                axes.imshow(one, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)

    panel = PANEL * np.array([width, height]) / max(width, height)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    across = LETTER * longest + len(titles) * panel[0]
    chart = plotting.draw("attribution", "", 0.3 + len(files) * panel[1], paint, across)
    path = output / "attribution.png"
    with writing(output):
        path.write_bytes(chart.light)
    return path


def _coloured(maps: dict[str, np.ndarray], i: int) -> list[np.ndarray]:
    """The maps of an image, each scaled to its highest value: uint8 [h, w, 3]."""
    scaled = [values[i] / (values[i].max() or 1) for values in maps.values()]
    return [images.colour(np.round(one * SHADES) / SHADES, images.SEQUENTIAL) for one in scaled]
