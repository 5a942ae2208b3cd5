"""Writes the playground of one or two runs as one HTML file."""

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from cnn_jax.analysis import evaluate
from cnn_jax.analysis.playground import network
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import images
from cnn_jax.common.errors import ConfigError
from cnn_jax.common.files import check_folder, writing
from cnn_jax.data import sources
from cnn_jax.models.summary import Summary, summarise
from cnn_jax.train import parallel, preprocess, step
from cnn_jax.train.workdir import write_text

MOST_RUNS = 2
KINDS = ("right", "wrong", "unsure")
IMAGES_A_KIND = 10
# Test images that are looked through for those of the page.
LOOKED_AT, BATCH = 1000, 250
# The page is replaced where this is its first line; another file never is.
FIRST_LINE = "<!DOCTYPE html><!-- a playground of cnn_jax -->"
PARTS = Path(__file__).parent / "page"


def playground(
    runs: Sequence[RestoredRun], data_dir: str | None = None, output: Path | None = None
) -> Path:
    """Writes a page in which a reader plays with trained networks.

    Args:
      runs: one, or two to compare, from `restore.load_run`; of the same images and classes.
      data_dir: where their dataset lies, of which the page holds some test images.
      output: the file; None: playground.html in the workdir of the first run.

    Returns:
      The path of the file.

    Raises:
      ConfigError: there are more than two runs, they do not fit each other, the page cannot compute
        one of them, or `output` cannot be written.
      DataError: the dataset is missing, damaged, or does not fit the model.
    """
    target = output or runs[0].workdir / "playground.html"
    _check_target(target)
    layers = [summarise(run.model, run.image_shape) for run in runs]
    _check_runs(runs, layers)
    examples = evaluate.fitting(
        runs[0], sources.load_examples(runs[0].data, "test", data_dir), runs[0].data.name
    )
    batch = min(BATCH, len(examples))
    test = examples[np.arange(min(LOOKED_AT, len(examples)) // batch * batch)]
    logits = [predict(run, test["image"]) for run in runs]
    chosen = choose(logits[0], test["label"])
    places = np.array([place for _, place in chosen])
    probe = np.concatenate([test["image"][:8], 255 - test["image"][:8]])
    parts = [
        _run(run, summary, probe, scores[places])
        for run, summary, scores in zip(runs, layers, logits, strict=True)
    ]
    content = {
        "shape": runs[0].image_shape,
        "classes": runs[0].class_names,
        **drawing(test["image"]),
        "colours": _colours(),
        "images": [[kind, place, int(test["label"][place])] for kind, place in chosen],
        "pixels": _base64(np.ascontiguousarray(test["image"][places]).tobytes()),
        "runs": [
            about | {"label": label} for (about, _), label in zip(parts, labels(runs), strict=True)
        ],
        "texts": texts(),
    }
    page = _render(content, [weights for _, weights in parts])
    with writing(target.parent):
        write_text(target, page)
    return target


def predict(run: RestoredRun, image: np.ndarray) -> np.ndarray:
    """The logits of `step.predict_step`, float32 [N, classes]; N is a multiple of the batch."""
    compiled = parallel.jit(
        functools.partial(step.predict_step, **run.step_options), run.compute_dtype
    )
    batch = min(BATCH, len(image))
    parts = [compiled(run.variables, image[i : i + batch]) for i in range(0, len(image), batch)]
    return np.concatenate(jax.device_get(parts))


def choose(logits: np.ndarray, label: np.ndarray) -> list[tuple[str, int]]:
    """(kind, index) of the page's test images: right ones, the surest mistakes, the least sure ones.

    Of the right ones, each class comes once before any comes twice.
    """
    ordered = np.sort(logits, -1)
    margin = ordered[:, -1] - ordered[:, -2]
    right = logits.argmax(-1) == label
    turn = np.zeros(len(label), int)  # how many of the class came before
    for name in np.unique(label):
        of_class = np.flatnonzero(right & (label == name))
        turn[of_class] = np.arange(len(of_class))
    orders = (
        np.flatnonzero(right)[np.lexsort((label[right], turn[right]))],
        np.flatnonzero(~right)[np.argsort(-margin[~right], kind="stable")],
        np.argsort(margin, kind="stable"),
    )
    chosen: dict[int, str] = {}
    for kind, order in zip(KINDS, orders, strict=True):
        fresh = [int(place) for place in order if int(place) not in chosen]
        chosen |= dict.fromkeys(fresh[:IMAGES_A_KIND], kind)
    return [(kind, place) for place, kind in chosen.items()]


def drawing(image: np.ndarray) -> dict[str, Any]:
    """How a drawing becomes an image like these, uint8 [N, H, W, C].

    Returns:
      background: the colour around the things, [C] in [0, 1].
      extent: the longer side of a thing by that of the image; None where the images have no uniform
        background, so that a drawing is neither centred nor scaled.
    """
    rows, columns = image[:, [0, -1]], image[:, :, [0, -1]]
    border = np.concatenate([part.reshape(-1, image.shape[-1]) for part in (rows, columns)])
    background = np.round(np.median(border, 0))
    uniform = (np.abs(border - background) <= 16).all(-1).mean() > 0.6
    inside = (np.abs(image - background) > 32).any(-1)
    sides = [_side(inside.any(axis)) for axis in (1, 2)]
    extent = float(np.maximum(*sides).mean()) if uniform else None
    return {"background": (background / 255).tolist(), "extent": extent}


def _side(inside: np.ndarray) -> np.ndarray:
    """From the first to the last True of each row [N, size], as a share of the row: [N]."""
    size = inside.shape[1]
    first, last = inside.argmax(1), size - inside[:, ::-1].argmax(1)
    return np.where(inside.any(1), (last - first) / size, 0)


def labels(runs: Sequence[RestoredRun]) -> list[str]:
    """Short names: of the experiments, or of the workdirs of two runs of one experiment."""
    names = [run.experiment.rpartition("/")[2] for run in runs]
    return names if len(set(names)) == len(runs) else [run.workdir.name for run in runs]


def _colours() -> list[list[int]]:
    """The colours, [red, green, blue, 255], of values at equal distances from -1 to 1."""
    colours = images.colour(np.linspace(0, 1, 257), images.DIVERGING)
    return np.insert(colours, 3, 255, axis=-1).tolist()


def texts() -> dict[str, dict[str, str]]:
    """The page's texts by language: each file in page/texts is one."""
    files = sorted((PARTS / "texts").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise ConfigError(f"--output={target}: is a folder; name a file, as in playground.html")
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output={target}: must end in .html")
    check_folder(target.parent)
    if target.exists():
        with open(target, "rb") as file:
            if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                raise ConfigError(
                    f"--output={target}: exists and is no playground; name another file"
                )


def _check_runs(runs: Sequence[RestoredRun], layers: Sequence[Summary]) -> None:
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"workdir: {len(runs)} runs were given, a page shows one or {MOST_RUNS}")
    for run, summary in zip(runs, layers, strict=True):
        network.check(run, summary)
    first, last = runs[0], runs[-1]
    for what in ("image_shape", "class_names"):
        if getattr(first, what) != getattr(last, what):
            raise ConfigError(
                f"workdir={last.workdir}: its {what} differs from that of {first.workdir}; two runs on "
                "one page must be of the same images and classes"
            )


def _run(
    run: RestoredRun, summary: Summary, probe: np.ndarray, logits: np.ndarray
) -> tuple[dict, str]:
    """What the page says of a run, and its weights in base64."""
    steps, weights = network.read(run, summary, probe)
    about = {
        "name": run.experiment,
        "workdir": run.workdir.name,
        "model": summary.model,
        "parameters": summary.parameters,
        "step": run.step,
        "dtype": run.compute_dtype,
        "views": _views(run),
        "steps": steps,
        "deepest": max((step["shape"][2] for step in steps if len(step["shape"]) == 3), default=0),
        "any_size": network.takes_any_size(steps),
        "logits_of_predict": [[float(f"{value:.9g}") for value in row] for row in logits],
    }
    return about, _base64(weights.tobytes())


def _views(run: RestoredRun) -> list[tuple[float, list[int]]]:
    """The views of an image that predict averages: weight, and for each pixel where it comes from."""
    height, width, _ = run.image_shape
    places = jnp.arange(height * width).reshape(1, height, width, 1)
    views, weights = preprocess.test_views(places, run.data.test_time_augmentation)
    return [(w, np.ravel(view).tolist()) for w, view in zip(weights, views, strict=True)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _render(content: dict[str, Any], weights: list[str]) -> str:
    script, style = (
        (PARTS / name).read_text(encoding="utf-8") for name in ("playground.js", "playground.css")
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PARTS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    allowed = {
        name: _base64(hashlib.sha256(text.encode()).digest())
        for name, text in (("script", script), ("style", style))
    }
    return environment.get_template("playground.html.j2").render(
        first_line=FIRST_LINE,
        content=content,
        kinds=KINDS,
        weights=weights,
        script=script,
        style=style,
        allowed=allowed,
        title=" · ".join(run["name"] for run in content["runs"]),
    )
