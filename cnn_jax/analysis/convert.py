"""Turns the flatten + dense head of a trained network into convolutions."""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.analysis.class_map import sliding_windows
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common import files
from cnn_jax.common.errors import ConfigError
from cnn_jax.config.serialize import to_json
from cnn_jax.models import summary
from cnn_jax.models.convolutional import convolutional
from cnn_jax.models.receptive_field import Field
from cnn_jax.train import checkpoint, parallel
from cnn_jax.train.apply import forward
from cnn_jax.train.checkpoint_writer import CheckpointWriter
from cnn_jax.train.preprocess import normalise
from cnn_jax.train.workdir import line_of, metrics, write_json, write_text

IMAGES = 64
# Relative to the largest logit: the same terms are added in another order.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
      run: with the network of convolutions only.
      kernels: of the layers that changed: name, shape before, shape after.
      field: what a score sees; None: not known.
      difference: the largest between the logits of both networks, on IMAGES images of noise.
      largest: the largest of these logits.
    """

    run: RestoredRun
    kernels: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    field: Field | None
    difference: float
    largest: float


def convert(run: RestoredRun, folder: Path) -> Converted:
    """Writes a workdir that holds `run` as a network of convolutions only.

    It has the run's config.json with the new model, its metrics.jsonl, and one checkpoint without
    optimizer state, so it cannot be trained further.

    Args:
      run: from `restore.load_run`.
      folder: of the new workdir; must be new or empty.

    Raises:
      ConfigError: the network cannot be converted, or `folder` is not new.
      ConfigError: `folder` cannot be written.
    """
    files.check_folder(folder, new=True)
    made = dataclasses.replace(as_convolutions(run), workdir=folder)
    difference, largest = _compare(run, made)
    if not difference <= TOLERANCE * largest:
        raise ConfigError(
            f"workdir={run.workdir}: {type(run.model).__name__} cannot be converted: its logits (up to "
            f"{largest:.3g}) differ by up to {difference:.3g} when it is made of convolutions; a layer "
            "between its dense layers must not mix the places of a map"
        )
    _check_larger(run, made)
    saved = copy.deepcopy(run.saved)
    saved["config"]["model"] = to_json(made.model)
    saved["converted_from"] = {"workdir": str(run.workdir), "checkpoint": run.step}
    with files.writing(folder):
        checkpoints = CheckpointWriter(folder)
        checkpoints.start_writing(None)
        checkpoints.save({"step": np.int32(run.step), **made.variables}, {})
        checkpoints.close()
        lines = [line for line in metrics(run.workdir) if line["step"] <= run.step]
        write_text(folder / "metrics.jsonl", "".join(map(line_of, lines)))
        write_json(folder / "config.json", saved)
    after = checkpoint.names(made.variables["params"])
    kernels = tuple(
        (name.removesuffix("/kernel"), old.shape, after[name].shape)
        for name, old in checkpoint.names(run.variables["params"]).items()
        if old.shape != after[name].shape
    )
    made = dataclasses.replace(made, saved=saved)
    field = summary.summarise(made.model, made.image_shape).field
    return Converted(made, kernels, field, difference, largest)


def as_convolutions(run: RestoredRun) -> RestoredRun:
    """Converts the run's network to one of convolutions only, in memory.

    Raises:
      ConfigError: it gives a class map already, or its head is not flatten + dense.
    """
    try:
        model = convolutional(run.model, run.image_shape)
    except ValueError as error:
        raise ConfigError(f"workdir={run.workdir}: {error}") from None
    image = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    try:
        params = jax.tree.map(
            lambda old, new: np.reshape(old, new.shape), run.variables["params"], template
        )
    except ValueError as error:
        raise ConfigError(
            f"workdir={run.workdir}: {type(run.model).__name__} cannot be converted ({error}); after "
            "layers.Flatten, only dense layers may have parameters"
        ) from None
    return dataclasses.replace(run, model=model, variables={**run.variables, "params": params})


def _check_larger(run: RestoredRun, made: RestoredRun) -> None:
    """Checks on a larger image that each score equals the output on its window alone.

    Raises:
      ConfigError: the network fails, its map does not grow with the image, or a score differs.
    """
    refused = (
        f"workdir={run.workdir}: {type(run.model).__name__} cannot be converted: on a larger image "
    )
    height, width, channels = run.image_shape
    field = summary.summarise(made.model, run.image_shape).field
    seen = (
        [size + step for size, step in zip(field.size, field.stride, strict=True)] if field else []
    )
    side = max(2 * height, 2 * width, *seen)
    image = np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)
    try:
        high = sliding_windows.on_whole_images(made)(image[None, :, :width])[0]
        logits = sliding_windows.on_whole_images(made)(image[None])[0]
    except Exception as error:  # each layer raises its own error if the size does not fit
        reason = " ".join(str(error).splitlines()[:1])[:200]
        raise ConfigError(f"{refused}it fails ({reason})") from error
    rows, columns = logits.shape[:2]
    if high.shape[:2] != (rows, 1) or min(rows, columns) < 2:
        raise ConfigError(
            f"{refused}its map stays as small as on a small one; the input of layers.Flatten must be "
            "a map [N, H, W, C]"
        )
    if field := summary.summarise(made.model, image.shape).field:
        places = sliding_windows.spread(field.inside(image.shape[:2]))[: sliding_windows.BATCH]
        windows = sliding_windows.on_windows(run, padding=False)
        expected = windows(image, places * field.stride + field.start, field.size)
        difference = np.abs(logits[tuple(places.T)] - expected).max(initial=0)
        if not difference <= TOLERANCE * np.abs(expected).max(initial=1e-30):
            raise ConfigError(
                f"{refused}scores differ by up to {difference:.3g} from those of their windows alone"
            )


def _compare(dense: RestoredRun, made: RestoredRun) -> tuple[float, float]:
    """The largest difference between the logits of the two on noise, and the largest logit.

    At full precision: by default accelerators round the factors, differently in each network.
    """
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, *dense.image_shape), np.uint8)

    def logits(run: RestoredRun) -> np.ndarray:
        model = parallel.jit(
            lambda variables, image: forward(run.model, variables, normalise(image, run.data))
        )
        return np.asarray(model(run.variables, noise), np.float32).reshape(IMAGES, -1)

    with jax.default_matmul_precision("highest"):
        expected, got = logits(dense), logits(made)
    return float(np.abs(got - expected).max()), float(np.abs(expected).max())
