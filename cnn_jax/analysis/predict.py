"""Classifies image files with the model of a workdir."""

import csv
import dataclasses
import functools
import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import decode
from cnn_jax.common import files as outputs
from cnn_jax.common.errors import ConfigError, DataError, NotFiniteError
from cnn_jax.models import summary
from cnn_jax.models.convolutional import gives_class_map
from cnn_jax.train import parallel, step

log = logging.getLogger(__name__)

BROKEN_IMAGES_EXIT_CODE = DataError.exit_code
# The output of a layer of 256 channels without stride then takes 4 GB.
MAX_MAP_PIXELS = 2048 * 2048


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
      file: its path.
      classes: names, the most probable first.
      probabilities: of these, the softmax of the logits (of their mean in a class map).
      class_map: where the model gives one, float32 [h, w, classes] of probabilities.
      map_file: the picture of the class map, if that has more than one score.
    """

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    class_map: np.ndarray | None = None
    map_file: Path | None = None


def predict(
    run: RestoredRun, patterns: Sequence[str], output: Path, top_k: int | None = None
) -> tuple[list[Prediction], list[str]]:
    """Classifies image files; writes predictions.csv, and a picture for each class map.

    Args:
      run: from `restore.load_run`.
      patterns: files, folders or glob patterns, also several in one text, separated by commas.
      output: the folder for what is written; made if missing.
      top_k: how many classes to name; None: 3, or all if there are fewer.

    Returns:
      The predictions, and the files that could not be read, which are logged.

    Raises:
      ConfigError: `top_k` is out of range, or `output` cannot be written.
      DataError: no image is found, or none can be read.
      NotFiniteError: a probability is NaN.
    """
    if top_k is None:
        top_k = min(3, len(run.class_names))
    if not 1 <= top_k <= len(run.class_names):
        raise ConfigError(f"--top_k={top_k}: must be from 1 to {len(run.class_names)}, the classes")
    files = find_images(patterns)
    outputs.check_folder(output)
    scores = parallel.jit(functools.partial(_scores, run=run), run.compute_dtype)
    own_size = gives_class_map(run.model, run.image_shape)
    predictions: list[Prediction] = []
    broken = []
    for file in files:
        try:
            image = read_image(file, run.image_shape, own_size)
        except DataError as error:
            log.error("error: %s", error)
            broken.append(file)
            continue
        probabilities, class_map = jax.device_get(scores(run.variables, image[None]))
        if not np.isfinite(probabilities).all():
            raise NotFiniteError(
                f"{outputs.printable(file)}: checkpoint {run.step} of {run.workdir} gives logits "
                "that are not finite; choose another one with --checkpoint"
            )
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        prediction = Prediction(
            outputs.printable(file),
            tuple(run.class_names[i] for i in best),
            tuple(float(probabilities[i]) for i in best),
        )
        if class_map is not None:
            prediction = dataclasses.replace(prediction, class_map=class_map)
        if class_map is not None and class_map.size > class_map.shape[-1]:
            map_file = output / f"{len(predictions):04d}_{Path(file).stem}_class_map.png"
            picture = _picture(run, image, class_map)
            with outputs.writing(output):
                picture.save(map_file)
            prediction = dataclasses.replace(prediction, map_file=map_file)
        predictions.append(prediction)
    if not predictions:
        raise DataError(f"--images: none of the {len(files)} files could be read")
    with outputs.writing(output):
        _write_csv(output / "predictions.csv", predictions)
    return predictions, broken


def find_images(patterns: Sequence[str]) -> list[str]:
    """The files that --images names, each once, in order.

    An existing path is taken literally, also with commas, brackets and stars in its name. Hidden
    files and folders are taken only if named literally.

    Raises:
      DataError: a pattern matches no file.
    """
    files: dict[str, None] = {}
    for text in patterns:
        files |= dict.fromkeys(_find_all(text))
    if not files:
        raise DataError("--images: must name at least one file, folder or glob pattern")
    return list(files)


def _find_all(text: str) -> list[str]:
    """The files of one --images: a pattern, or several separated by commas."""
    if found := _find(text):
        return found
    files, start = [], ""
    for part in text.split(","):
        pattern = f"{start},{part}" if start else part  # a comma may belong to a name
        found = _find(pattern.strip())
        files += found
        start = "" if found else pattern.strip()
    if start:
        missing = os.path.expanduser(start.partition(",")[0])
        reason = "holds no image file" if os.path.isdir(missing) else "no such file"
        raise DataError(f"--images={missing}: {reason}")
    return files


def _find(pattern: str) -> list[str]:
    """The files of a file's name, a folder's name or a glob pattern, in order."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        return sorted({p for p in _matches(path) if os.path.isfile(p)})
    try:
        names = [name for name in os.listdir(path) if not outputs.is_left_out(name)]
    except OSError as error:
        raise DataError(f"--images={path}: cannot be read ({error.strerror})") from None
    inside = [Path(path, name) for name in names if Path(name).suffix.lower() in decode.suffixes()]
    return sorted(str(p) for p in inside if p.is_file())


def _matches(pattern: str) -> list[str]:
    """Like glob.glob, but if a part of the pattern is an existing name, it matches only that."""
    found = [""]
    for part in Path(pattern).parts:
        found = [match for folder in dict.fromkeys(found) for match in _inside(folder, part)]
    return found


def _inside(folder: str, part: str) -> list[str]:
    """What one part of a pattern matches in a folder."""
    if os.path.lexists(written := os.path.join(folder, part)):
        return [written]
    matches = glob.glob(part, root_dir=folder or None, recursive=True)
    kept = [m for m in matches if outputs.LEFT_BY_SYSTEMS.isdisjoint(Path(m.lower()).parts)]
    return [os.path.join(folder, m) for m in (["", *kept] if part == "**" else kept)]


def read_image(file: str, image_shape: tuple[int, int, int], own_size: bool = False) -> np.ndarray:
    """Reads an image file as the model's input, with `decode.decode`.

    Args:
      file: of any size.
      image_shape: (H, W, C) that the model was trained on.
      own_size: keeps the file's size if it is at least H x W, instead of resizing. More than
        MAX_MAP_PIXELS pixels are reduced to that number, with a warning.

    Returns:
      uint8 [h, w, C].

    Raises:
      DataError: it is no image, is damaged, or has too many pixels; names the file.
    """
    height, width, channels = image_shape
    picture = decode.decode_file(file, channels)
    own = picture.size
    if own_size and own[0] >= width and own[1] >= height:
        scale = min(1, (MAX_MAP_PIXELS / (own[0] * own[1])) ** 0.5)
        width, height = (max(width, int(own[0] * scale)), max(height, int(own[1] * scale)))
        if (width, height) != own:
            log.warning("warning: %s: reduced from %dx%d to %dx%d", file, *own, width, height)
    return decode.pixels(picture, height, width)


def _picture(run: RestoredRun, image: np.ndarray, class_map: np.ndarray) -> Image.Image:
    # matplotlib is slow to import
    from cnn_jax.analysis.class_map import picture as class_map_picture

    field = summary.summarise(run.model, image.shape).field
    return class_map_picture.draw(image, class_map, field, run.class_names)


def _scores(
    variables: dict, image: jax.Array, *, run: RestoredRun
) -> tuple[jax.Array, jax.Array | None]:
    """uint8 [1, H, W, C] -> probabilities [classes], and those of the class map [h, w, classes]."""
    logits = step.predict_step(variables, image, **run.step_options)
    class_map = step.class_map_step(variables, image, **run.step_options)
    maps = class_map.ndim == 4
    return jax.nn.softmax(logits[0]), jax.nn.softmax(class_map[0]) if maps else None


def _write_csv(path: Path, predictions: list[Prediction]) -> None:
    places = range(1, len(predictions[0].classes) + 1)
    header = ["file", *(f"{kind}_{i}" for i in places for kind in ("class", "probability"))]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for prediction in predictions:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            writer.writerow([prediction.file, *(item for pair in pairs for item in pair)])
