"""Demonstrates a class map: one forward pass finds the test images on a large canvas."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax.analysis import evaluate
from cnn_jax.analysis.class_map import sliding_windows
from cnn_jax.analysis.convert import as_convolutions
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError
from cnn_jax.data import sources
from cnn_jax.data.examples import Examples
from cnn_jax.models import summary
from cnn_jax.models.convolutional import gives_class_map
from cnn_jax.models.receptive_field import Field
from cnn_jax.train.workdir import write_json

LARGEST = 2048  # pixels; the first layer's output then takes half a gigabyte


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Images on a plain background, without overlap.

    Attributes:
      image: uint8 [H, W, C].
      places: int [N, 2], first row and column of each image.
      labels: int [N].
    """

    image: np.ndarray
    places: np.ndarray
    labels: np.ndarray


def compose(
    examples: Examples, side: int, background: Sequence[int] | np.ndarray = (0,), seed: int = 0
) -> Canvas:
    """Puts the first examples on a square canvas, each at random in a cell of twice its size.

    Args:
      examples: one is used for each cell.
      side: of the canvas, in pixels.
      background: pixel value around the images: one for all channels, or one for each.
      seed: of the random places.
    """
    size = np.array(examples.image_shape[:2])
    cells = np.mgrid[: side // (2 * size[0]), : side // (2 * size[1])]
    cells = np.moveaxis(cells, 0, -1).reshape(-1, 2)
    cells = cells[: len(examples)]
    batch = examples[np.arange(len(cells))]
    places = cells * 2 * size + np.random.default_rng(seed).integers(0, size + 1, cells.shape)
    image = np.empty((side, side, examples.image_shape[2]), np.uint8)
    image[:] = background
    for (row, column), part in zip(places, batch["image"], strict=True):
        image[row : row + size[0], column : column + size[1]] = part
    return Canvas(image, places, batch["label"])


def demonstrate(
    run: RestoredRun, folder: Path, side: int = 512, rounds: int = 3, data_dir: str | None = None
) -> dict[str, Any]:
    """Maps a canvas of test images and compares the map with sliding windows.

    Args:
      run: its network gives a class map, or can be converted to one that does.
      folder: where class_map.png and class_map.json are written; made if missing.
      side: of the canvas, in pixels.
      rounds: how often the map and the windows are timed, alternately.
      data_dir: where the dataset lies.

    Returns:
      The content of class_map.json; `tables.print_class_map` explains it.

    Raises:
      ConfigError: the network cannot be converted, an argument is out of range, or `folder` cannot
        be written.
      DataError: the dataset is missing, damaged, or does not fit the model.
    """
    files.check_folder(folder)
    mapped = run if gives_class_map(run.model, run.image_shape) else as_convolutions(run)
    single = summary.summarise(mapped.model, run.image_shape)
    _check_side(run, single.field, side)
    canvas = _canvas(run, side, data_dir)
    whole = summary.summarise(mapped.model, canvas.image.shape)
    field = whole.field
    assert field is not None, "that of an image of its own size is known"
    assert single.field is not None

    score_map = sliding_windows.on_whole_images(mapped)
    logits = score_map(canvas.image[None])[0]
    frames = sliding_windows.frames(field, single.field, run.image_shape[:2])
    nearest = np.round((canvas.places - frames.start) / frames.stride).astype(int)
    nearest = np.minimum(nearest, np.array(frames.places) - 1)
    found = logits[tuple(nearest.T)].argmax(-1) == canvas.labels
    windows = sliding_windows.on_windows(run)
    alone = windows(canvas.image, canvas.places, frames.size).argmax(-1) == canvas.labels
    raced = _race(windows, score_map, canvas.image, frames, rounds)
    report = {
        "model": type(run.model).__name__,
        "dataset": run.data.name,
        "checkpoint": run.step,
        "canvas": side,
        "images": len(found),
        "found": int(found.sum()),
        "recognised_alone": int(alone.sum()),
        "scores": field.places,
        "window": field.size,
        "stride": field.stride,
        "start": field.start,
        **_compare(run, canvas.image, logits, field),
        **raced,
        "flops_ratio": raced["cut_out"] * single.flops / whole.flops,
    }
    # matplotlib is slow to import
    from cnn_jax.analysis.class_map.picture import Boxes, draw

    boxes = Boxes(canvas.places, frames.size, nearest, found)
    class_map = np.asarray(jax.nn.softmax(logits))
    picture = draw(canvas.image, class_map, field, run.class_names, boxes)
    with files.writing(folder):
        picture.save(folder / "class_map.png")
        write_json(folder / "class_map.json", report)
    return report


def _canvas(run: RestoredRun, side: int, data_dir: str | None) -> Canvas:
    """A canvas of test images. Its background is the mean, which normalises to 0 like padding."""
    examples = sources.load_examples(run.data, "test", data_dir)
    examples = evaluate.fitting(run, examples, run.data.name)
    mean = np.clip(np.round(255 * np.array(run.data.mean)), 0, 255)
    return compose(examples, side, mean.astype(np.uint8))


def _check_side(run: RestoredRun, field: Field | None, side: int) -> None:
    if field is None:
        raise ConfigError(
            f"workdir={run.workdir}: class_map needs a network whose layers form a chain, as only "
            "then it is known what each score sees"
        )
    seen = max(size + step for size, step in zip(field.size, field.stride, strict=True))
    least = max(seen, 2 * max(run.image_shape[:2]))
    if not least <= side <= LARGEST:
        raise ConfigError(f"--canvas={side}: must be from {least} to {LARGEST} pixels")


def _compare(
    run: RestoredRun, image: np.ndarray, logits: np.ndarray, field: Field
) -> dict[str, Any]:
    """Compares the map's scores with the network's output on the windows that they see."""
    places = sliding_windows.spread(field.inside(image.shape[:2]))
    windows = sliding_windows.on_windows(run, padding=False)
    expected = windows(image, places * field.stride + field.start, field.size)
    return {
        "windows": len(places),
        "largest_difference": float(np.abs(logits[tuple(places.T)] - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }


def _race(
    windows: sliding_windows.Windows,
    score_map: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    frames: Field,
    rounds: int,
) -> dict[str, Any]:
    """Compares the map with the network on windows of the training size: seconds and scores."""
    inside = frames.inside(image.shape[:2])
    total, places = math.prod(map(len, inside)), sliding_windows.spread(inside)
    origins = places * frames.stride + frames.start
    logits = score_map(image[None])[0][tuple(places.T)]
    cut_out = windows(image, origins, frames.size)
    seconds = _in_turn(
        rounds,
        lambda: score_map(image[None]),
        lambda: windows(image, origins, frames.size),
    )
    sliding = seconds[1] * total / len(places)
    return {
        "cut_out": total,
        "cut_out_compared": len(places),
        "cut_out_largest_difference": float(np.abs(logits - cut_out).max()),
        "cut_out_same_class": float((logits.argmax(-1) == cut_out.argmax(-1)).mean()),
        "rounds": rounds,
        "map_seconds": seconds[0],
        "sliding_seconds": sliding,
        "speed_ratio": sliding / seconds[0],
    }


def _in_turn(rounds: int, *contenders: Callable[[], Any]) -> list[float]:
    """The median seconds of each; they are measured in turn, so that other load affects all of them."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for times, contender in zip(seconds, contenders, strict=True):
            began = time.perf_counter()
            contender()
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]
