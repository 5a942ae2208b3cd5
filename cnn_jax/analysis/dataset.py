"""What a user should look at before training: counts, sizes, scaling, broken files, twins, pictures."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from cnn_jax.analysis import fonts, plotting
from cnn_jax.common import files, images
from cnn_jax.config import Config, DataConfig
from cnn_jax.config.paths import is_path
from cnn_jax.data import balance, folders, sources, statistics
from cnn_jax.data.examples import Examples
from cnn_jax.data.tfds_builder import SizesDiffer
from cnn_jax.train.augmentation import augmented
from cnn_jax.train.step import run_keys, step_keys

COLUMNS = 8
MOST_ROWS = 20
SIDES = 72, 160  # of an image on the contact sheet, in pixels: the least and the most
STYLE = {"font.size": 8, "text.parse_math": False}


@dataclasses.dataclass(frozen=True)
class Description:
    """A dataset as a run gets it.

    Attributes:
      name: of the dataset.
      class_names: in the order of the labels.
      counts: by split, int [classes].
      image_shape: (H, W, C).
      sizes: of the files, in words; empty where the dataset has one.
      mean: of each channel of the training split, in [0, 1].
      std: likewise.
      broken: why each image that cannot be decoded cannot.
      twins: pairs of images with equal pixels, in words.
      twins_across: how many of them are in two splits.
      twins_apart: how many of them are in two classes.
      remarks: anything else, a line each.
      settings: what to add to the command that trains.
    """

    name: str
    class_names: tuple[str, ...]
    counts: dict[str, np.ndarray]
    image_shape: tuple[int, int, int]
    sizes: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    broken: tuple[str, ...]
    twins: tuple[str, ...]
    twins_across: int
    twins_apart: int
    remarks: tuple[str, ...]
    settings: tuple[str, ...]


def describe(
    config: Config, data_dir: str | None = None, download: bool = False
) -> tuple[Description, Config, Examples]:
    """Reads the whole dataset of `config`, as training would.

    Returns:
      The description; `config` with numbers for "auto", and with an image_size if it needs one; the
      training split.

    Raises:
      DataError: as `sources.load_examples`; but broken images are listed.
    """
    data = dataclasses.replace(config.data, skip_corrupt="all")
    dataset = folders.open_dataset(data) if is_path(data.name) else None
    given = []
    try:
        sources.image_shape(data, data_dir)
    except SizesDiffer:
        side = folders.SUGGESTED_SIDE, folders.SUGGESTED_SIDE
        size = folders.suggested_size(dataset.headers.sizes) if dataset else side
        data = dataclasses.replace(data, image_size=size)
        given = [f"data.image_size={size[0]},{size[1]}"]
    splits = {
        name: sources.load_examples(data, name, data_dir, download)
        for name in ("train", "validation", "test")
        if name != "validation" or sources.has_validation(data)
    }
    train = splits["train"]
    mean, std = statistics.mean_and_deviation(train)
    if len(train.class_names) != getattr(config.model, "num_classes", None):
        given.append(f"model.num_classes={len(train.class_names)}")
    given += [f"data.mean={_comma(mean)}", f"data.std={_comma(std)}"]
    broken = _broken(dataset, data, splits) if dataset else []
    if broken:
        given.append("data.skip_corrupt=all")
    pairs = statistics.twins(splits)
    description = Description(
        name=data.name,
        class_names=train.class_names,
        counts={
            name: np.bincount(balance.labels(examples), minlength=len(train.class_names))
            for name, examples in splits.items()
        },
        image_shape=train.image_shape,
        sizes=folders.size_range(dataset.headers.sizes) if dataset else "",
        mean=mean,
        std=std,
        broken=tuple(broken),
        twins=tuple(f"{_place(splits, *one)} = {_place(splits, *other)}" for one, other in pairs),
        twins_across=sum(one[0] != other[0] for one, other in pairs),
        twins_apart=sum(_label(splits, *one) != _label(splits, *other) for one, other in pairs),
        remarks=dataset.remarks if dataset else (),
        settings=tuple(given),
    )
    data = dataclasses.replace(data, skip_corrupt=config.data.skip_corrupt)
    config = dataclasses.replace(config, data=data)
    return description, statistics.in_numbers(config, train), train


def save_contact_sheet(config: Config, train: Examples, output: Path) -> Path:
    """Draws training images, augmented as in the run's first step; writes contact_sheet.png.

    Args:
      config: seed and augmentations; with numbers for mean and deviation.
      train: the training split.
      output: the folder, made if missing.

    Returns:
      The file.

    Raises:
      ConfigError: it cannot be written.
    """
    with matplotlib.style.context(["default", STYLE]), files.writing(output):
        path = output / "contact_sheet.png"
        path.write_bytes(plotting.png(_draw(config, train)))
    return path


def _draw(config: Config, train: Examples) -> np.ndarray:
    """A row for each class, with up to COLUMNS of its images: uint8 [h, w, 3]."""
    labels, random = balance.labels(train), np.random.default_rng(config.seed)
    found = np.unique(labels)[:MOST_ROWS]
    chosen = [random.permutation(np.flatnonzero(labels == label))[:COLUMNS] for label in found]
    index = np.concatenate(chosen)
    order = random.permutation(len(index))  # as in a batch, where images of all classes are mixed
    seen = _as_the_step_sees(config, train, index[order])[np.argsort(order)]
    blank = np.full((1, *seen.shape[1:]), 255, np.uint8)
    starts = np.cumsum([0, *map(len, chosen)])
    rows = [
        np.concatenate([seen[start : start + len(row)], *[blank] * (COLUMNS - len(row))])
        for start, row in zip(starts, chosen, strict=False)
    ]
    sheet = images.tiles(np.concatenate(rows), COLUMNS, int(np.clip(max(seen.shape[1:3]), *SIDES)))
    names = [plotting.clip(train.class_names[label], 22) for label in found]
    margin, (height, width) = 20 + 8 * max(map(fonts.columns, names)), sheet.shape[:2]
    figure = Figure(figsize=((width + margin) / 100, height / 100), dpi=150)
    axes = figure.add_axes((margin / (width + margin), 0, width / (width + margin), 1))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set_yticks([(i + 0.5) * height / len(names) for i in range(len(names))], names)
    axes.tick_params(length=0)
    axes.set_xticks([])
    return plotting.pixels(figure)


def _as_the_step_sees(config: Config, train: Examples, index: np.ndarray) -> np.ndarray:
    """Images after augmentation, with the scaling undone: uint8 [N, H, W, 3]."""
    batch = train[index] | {
        "index": index.astype(np.int32),
        "epoch": np.zeros(len(index), np.int32),
    }
    _, run_key = run_keys(config.seed)
    key, _ = step_keys(run_key, 0)
    data = config.data
    seen = jax.jit(functools.partial(augmented, data=data))(run_key, key, batch)
    image = seen["image"]
    image = np.asarray(image * jnp.array(data.std) + jnp.array(data.mean))[..., :3]
    image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:3], 3))


def _broken(dataset: folders.Dataset, data: DataConfig, splits: dict[str, Examples]) -> list[str]:
    """Why each image that is in no split cannot be decoded."""
    decoded = {file for examples in splits.values() for file in examples.files}
    left = [image for image in dataset.images if image.file not in decoded]
    records = folders.FileRecords(dataset, left, data)
    return [text for i in range(len(left)) if (text := records.problem(i))]


def _place(splits: dict[str, Examples], split: str, index: int) -> str:
    """A name for an example."""
    examples = splits[split]
    label = examples.class_names[_label(splits, split, index)]
    file = files.printable(examples.files[index]) if examples.files else f"example {index}"
    return f"{file} ({split}, {label})"


def _label(splits: dict[str, Examples], split: str, index: int) -> int:
    return int(splits[split][np.array([index])]["label"][0])


def _comma(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def default_output(name: str) -> Path:
    """The folder for what is written about a dataset, where --output names none."""
    stem = os.path.splitext(os.path.basename(name))[0] if is_path(name) else name
    return Path("runs", "data", stem.replace("/", "_").replace(":", "_"))
