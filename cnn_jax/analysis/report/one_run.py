"""The content of the page of one run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnn_jax.analysis import plotting
from cnn_jax.analysis.attribution import methods, picture
from cnn_jax.analysis.plotting import Chart
from cnn_jax.analysis.report import charts, features, formatting, run_data
from cnn_jax.analysis.report.run_data import Facts
from cnn_jax.common import images
from cnn_jax.config import Config
from cnn_jax.models.kernels import first_kernel

# The fields of a configuration on which the learning rate depends.
SCHEDULE = (
    "epochs",
    "learning_rate",
    "schedule",
    "warmup_epochs",
    "final_learning_rate",
    "milestones",
    "step_factor",
)
MISTAKES = 12
CAUSES = 4
CONFUSIONS = 5
EXAMPLE = 112  # pixels


@dataclasses.dataclass(frozen=True)
class Example:
    """A test image, its true class and its predicted class."""

    picture: Chart
    true: str
    predicted: str
    probability: float
    place: int


def content(run: Facts) -> tuple[dict[str, Any], list[Chart]]:
    """The values for run.html.j2, and the pictures among them."""
    names, matrix = run.run.class_names, run.result.confusion
    used = np.flatnonzero(matrix.sum(0) + matrix.sum(1))  # a head may have unused classes
    accuracy = run.result.class_accuracy()
    tested = {i: share for i in used if (share := accuracy[i]) is not None}
    shown = {
        "loss": run.lines and charts.curves(run.lines, "loss", run.run.step),
        "accuracy": run.lines and charts.curves(run.lines, "accuracy", run.run.step),
        "learning_rate": run.lines and _schedule(run),
        "class_accuracy": charts.class_accuracy([names[i] for i in tested], [*tested.values()]),
        "confusion": charts.confusion([names[i] for i in used], matrix[np.ix_(used, used)]),
        "layers": charts.layers(run.summary),
    }
    mistakes = [
        _example(run, place, f"mistake-{k:02d}")
        for k, place in enumerate(run.predictions.mistakes(MISTAKES), 1)
    ]
    kernel = first_kernel(run.run.model, run.run.image_shape, run.run.variables["params"])
    kernels = kernel and _kernels(*kernel)
    journeys, stages = _journeys(run)
    causes, methods = _causes(run)
    values = dict(
        **shown,
        causes=causes,
        methods=methods,
        title=run.run.experiment or run.run.workdir.name,
        facts=run,
        config=run.run.saved["config"],
        settings=run_data.settings(run),
        classes=len(tested),
        confusions=_confusions(names, matrix),
        mistakes=mistakes,
        kernels=kernels,
        kernel=kernel,
        most_kernels=images.MOST_KERNELS,
        journeys=journeys,
        stages=stages,
        sizes=_sizes(run),
        reasons=_reasons(run),
        maps=any(len(stage.shape) == 3 for stage in stages) and features.MAPS,
    )
    drawn = [chart for chart in (*shown.values(), causes, kernels) if chart]
    drawn += [mistake.picture for mistake in mistakes]
    for example, strips in journeys:
        drawn += [example.picture, *(strip for strip in strips if strip)]
    return values, drawn


def _kernels(name: str, kernel: np.ndarray) -> Chart:
    """The first kernels of a layer."""
    return plotting.picture(
        "kernels",
        images.draw_kernels(kernel, side=96),
        f"The first {min(kernel.shape[-1], images.MOST_KERNELS)} kernels of {name}, "
        f"{formatting.shape(kernel.shape[:3])} weights each, as images.",
    )


def _schedule(run: Facts) -> Chart | None:
    saved = run.run.saved["config"]
    fields = {name: saved[name] for name in SCHEDULE if name in saved}
    fields["milestones"] = tuple(fields.get("milestones", ()))
    config = Config(run.run.model, run.run.data, **fields)
    return charts.learning_rate(config, run.lines[-1]["step"] // run.lines[-1]["epoch"])


def _confusions(names: Sequence[str], matrix: np.ndarray) -> list[tuple[int, str, str]]:
    """The most frequent kinds of mistake: (how often, true, predicted)."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(place), len(matrix)) for place in order]
    return [(int(wrong[i, j]), names[i], names[j]) for i, j in pairs if wrong[i, j]]


def _example(run: Facts, place: int, name: str) -> Example:
    image = run.test[np.array([place])]["image"][0]
    label, winner = int(run.predictions.label[place]), int(run.predictions.winner[place])
    true, predicted = run.run.class_names[label], run.run.class_names[winner]
    alt = f"Test image {place}: {true}" + (f", taken for {predicted}" if label != winner else "")
    probability = float(run.predictions.probability[place])
    return Example(
        plotting.picture(name, _enlarged(image), alt), true, predicted, probability, place
    )


def _causes(run: Facts) -> tuple[Chart | None, list[str]]:
    """The worst mistakes and what they depend on, and the methods; None if there are no mistakes."""
    places = run.predictions.mistakes(CAUSES)
    if not len(places):
        return None, []
    image = run.test[places]["image"]
    maps = methods.explain(run.run, run.summary, image, run.predictions.winner[places])
    alt = f"The {len(places)} most confident mistakes, one a row: image, {', '.join(maps)}."
    return plotting.picture("causes", picture.tiles(image, maps), alt), [*maps]


def _journeys(run: Facts) -> tuple[list[tuple[Example, list[Chart | None]]], list[features.Stage]]:
    """Test images, each with a picture for each layer (None for Flatten), and the layers."""
    places = _chosen(run)
    stages = features.follow(run.run, run.summary, run.test[places]["image"])
    stages = features.shown(stages)
    drawn = [None if stage.kind == "Flatten" else features.draw(stage) for stage in stages]
    journeys = []
    for k, place in enumerate(places):
        example = _example(run, place, f"image-{k + 1}")
        pictures = [
            None
            if strips is None
            else plotting.picture(
                f"image-{k + 1}-layer-{i:02d}",
                strips[k],
                f"Output of {stage.name}, {formatting.shape(stage.shape)}, for the {example.true}.",
            )
            for i, (stage, strips) in enumerate(zip(stages, drawn, strict=True), 1)
        ]
        journeys.append((example, pictures))
    return journeys, stages


def _chosen(run: Facts) -> np.ndarray:
    """Indices of up to three test examples: two correct ones of two classes, the worst mistake."""
    right = np.flatnonzero(run.predictions.label == run.predictions.winner)
    _, first = np.unique(run.predictions.label[right], return_index=True)
    places = [*np.sort(right[first])[:2], *run.predictions.mistakes(1)]
    return np.array(places, int)


def _sizes(run: Facts) -> list[int]:
    """The height of the image and of each map that differs from the one before: 28, 26, 24, 12."""
    heights = [run.run.image_shape[0]]
    for layer in run.summary.layers:
        if len(layer.shape) == 3 and layer.shape[0] != heights[-1]:
            heights.append(layer.shape[0])
    return heights


def _reasons(run: Facts) -> str:
    """Why the maps of this network have the sizes they have."""
    kinds = [layer.kind for layer in run.summary.layers]
    known = {
        "a kernel without padding takes its size minus one off the map": "valid",
        "a stride of 2 halves it": "/2",
        "2x2 pooling halves it": "MaxPool 2x2",
        "'same' padding keeps it": "same",
    }
    clauses = [text for text, sign in known.items() if any(sign in kind for kind in kinds)]
    *first, last = clauses or ["each layer sees the output of the one before"]
    return f"{', '.join(first)} and {last}" if first else last


def what(stage: features.Stage) -> str:
    """The kind of a layer, without its name: "3x3 /2 valid, ReLU" for Conv_1."""
    kind = stage.kind
    if stage.name.rpartition("/")[2].startswith(kind.split()[0]):
        kind = kind.partition(" ")[2]
    return ", ".join(filter(None, (kind, stage.activation)))


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Scales the longer side of an image [h, w, C] to about EXAMPLE pixels, not interpolated."""
    longest = max(image.shape[:2])
    if longest <= EXAMPLE:
        return image.repeat(EXAMPLE // longest, 0).repeat(EXAMPLE // longest, 1)
    step = -(-longest // EXAMPLE)
    return np.asarray(image[::step, ::step])
