"""TFDS builders: finds them by name, prepares datasets on request, describes their images.

Only `prepare` imports TensorFlow, and only for a dataset of TFDS that raw_files.py cannot read.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import logging
import os
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax.common import extras
from cnn_jax.common.errors import DataError
from cnn_jax.common.files import library_path

if TYPE_CHECKING:  # it imports JAX, which processes that only decode images do not need
    from cnn_jax.config import DataConfig

log = logging.getLogger(__name__)

EMBEDDED = "garments"
CHANNELS = (1, 3, 4)
NO_TENSORFLOW = extras.missing("TensorFlow", "prepare")
# TFDS also accepts arguments, and namespaces ("huggingface:mnist"), whose code it would download.
NAME = re.compile(r"(?P<dataset>[A-Za-z]\w*)(/\w[\w+.-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?")


class SizesDiffer(DataError):
    """The images of a dataset differ in size, and data.image_size is not set."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the records of a dataset hold.

    Attributes:
      image_key: the name of the image's feature.
      label_key: the name of the label's feature.
      class_names: in the order of the labels.
      stored_size: (height, width) of the stored images; None where it varies.
      image_shape: (H, W, C) of the decoded images.
    """

    image_key: str
    label_key: str
    class_names: tuple[str, ...]
    stored_size: tuple[int | None, int | None]
    image_shape: tuple[int, int, int]


def tensorflow_is_installed() -> bool:
    """Whether TensorFlow is installed; does not import it."""
    return importlib.util.find_spec("tensorflow") is not None


def dataset_name(name: str) -> str:
    """The first part of "dataset/config:version".

    Raises:
      DataError: `name` is not of that form.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"data.name={name}: must be dataset, dataset/config, dataset:1.0.0 or "
            "dataset/config:1.0.0"
        )
    return match["dataset"]


def open_builder(name: str, data_dir: str) -> Any:
    """The TFDS builder called `name`. The dataset need not be prepared; nothing is downloaded.

    Raises:
      DataError: there is no such dataset, configuration or version, or its description in
        `data_dir` is damaged.
    """
    base = dataset_name(name)
    place = data_dir
    if Path(data_dir).is_dir():
        place = str(library_path(Path(data_dir)))
    with quiet():
        import tensorflow_datasets as tfds

        try:
            if name == EMBEDDED:
                from cnn_jax.data.garments import Garments

                return Garments(data_dir=place, file_format="array_record")
            return tfds.builder(name, data_dir=place)
        except tfds.core.DatasetNotFoundError:
            known = [*tfds.list_builders(with_community_datasets=False), EMBEDDED]
            near = difflib.get_close_matches(base, known)
            raise DataError(
                f"data.name={name}: there is no such dataset in TFDS or in "
                f"data_dir={data_dir}" + (f"; nearest: {', '.join(near)}" if near else "")
            ) from None
        except Exception as error:  # TFDS raises AssertionError, ValueError, ParseError, ...
            if bad := _damaged_json(Path(data_dir, base)):
                raise DataError(
                    f"{bad}: damaged; remove its folder, and prepare it again"
                ) from None
            raise DataError(f"data.name={name}: {_reason(error)}") from None


def prepare(name: str, data_dir: str, download: bool) -> Any:
    """The builder called `name`; prepares the dataset if it is not prepared.

    Args:
      name: the dataset.
      data_dir: where the dataset is or will be.
      download: allows TFDS to download it. The embedded dataset needs no download.

    Raises:
      DataError: as `open_builder`; or preparing it is not allowed, or fails.
    """
    builder = open_builder(name, data_dir)
    if _is_prepared(builder):
        return builder
    if name != EMBEDDED:
        _check_download(builder, name, data_dir, download)
    log.info("preparing %s in %s", name, data_dir)
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        builder = open_builder(name, data_dir)  # library_path needs the folder
        _prepare(builder, data_dir)
    except DataError:
        raise
    except Exception as error:
        if not _is_prepared(open_builder(name, data_dir)):  # else another process was faster
            raise DataError(
                f"data.name={name}: cannot be prepared in data_dir={data_dir}: {_reason(error)}"
            ) from error
    builder = open_builder(name, data_dir)
    if not _is_prepared(builder):  # TFDS skips a folder without dataset_info.json
        raise DataError(
            f"{shown(builder.data_dir)}: incomplete; remove this folder, and prepare it again"
        )
    return builder


def shown(path: Any) -> str:
    """The path of a file or folder of a dataset, as errors show it."""
    return os.path.realpath(path)


def layout(builder: Any, data: "DataConfig") -> Layout:
    """The layout of the records of `builder`. The dataset need not be prepared.

    Raises:
      DataError: it has no labelled images, they are not uint8 with 1, 3 or 4 channels, or they
        differ in size and data.image_size is not set.
    """
    with quiet():
        import tensorflow_datasets as tfds

        info = builder.info
    features = dict(info.features) if isinstance(info.features, tfds.features.FeaturesDict) else {}
    keys = info.supervised_keys or ("image", "label")
    image, label = (features.get(key) if isinstance(key, str) else None for key in keys[:2])
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        raise DataError(
            f"data.name={data.name}: not a dataset of labelled images; it has "
            + ", ".join(f"{name}: {type(feature).__name__}" for name, feature in features.items())
        )
    if len(image.shape) != 3:
        raise DataError(
            f"data.name={data.name}: images of shape {image.shape}; must be (height, width, channels)"
        )
    height, width, channels = image.shape
    channels = channels or 3
    if np.dtype(image.np_dtype) != np.uint8 or channels not in CHANNELS:
        raise DataError(
            f"data.name={data.name}: images of {np.dtype(image.np_dtype)} with {channels} channels; "
            "must be uint8 with 1, 3 or 4 (of a uint8 feature, files of 16 bits are scaled to 8)"
        )
    if data.image_size is None and None in (height, width):
        raise SizesDiffer(
            f"data.name={data.name}: its images differ in size; set one: train and summary take "
            "--set data.image_size=64,64"
        )
    return Layout(
        image_key=keys[0],
        label_key=keys[1],
        class_names=tuple(label.names or map(str, range(label.num_classes))),
        stored_size=(height, width),
        image_shape=(*(data.image_size or (height, width)), channels),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides TFDS's messages about OpenCV, variants and its own deprecations."""
    from absl import logging as absl_logging

    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl_logging.set_verbosity(level)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Hides the progress bars and messages that TFDS prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _is_prepared(builder: Any) -> bool:
    with quiet():
        return builder.is_prepared()


def _check_download(builder: Any, name: str, data_dir: str, download: bool) -> None:
    """Refuses at once what would fail after minutes or hours; may restart the program."""
    there = Path(data_dir).is_dir()
    advice = (
        f"data.name={name}: not prepared in data_dir={data_dir}"
        f"{'' if there else ' (no such folder)'}; fetch and prepare it with train --download, "
        "or name another folder with --data_dir or TFDS_DATA_DIR; without a network the embedded "
        "dataset works: --experiment=quickstart"
    )
    if not download:
        raise DataError(advice)
    from cnn_jax.data import raw_files

    of_tfds = builder.__module__.startswith("tensorflow_datasets.")
    if of_tfds and not raw_files.is_known(builder) and not tensorflow_is_installed():
        extras.add_tensorflow()
        raise DataError(f"data.name={name}: preparing it {NO_TENSORFLOW}")
    if silent := _silent_hosts(builder, data_dir):
        raise DataError(f"{advice} (--download: {', '.join(silent)} cannot be reached)")


def _prepare(builder: Any, data_dir: str) -> None:
    from cnn_jax.data import raw_files

    known = raw_files.is_known(builder)
    with contextlib.ExitStack() as stack:
        if known:
            stack.enter_context(raw_files.source(builder, _downloads(data_dir)))
        stack.enter_context(quiet())
        if known or builder.name == EMBEDDED:
            stack.enter_context(_no_output())
        # TFDS's default is TFRECORD, which only TensorFlow reads, and only sequentially.
        builder.download_and_prepare(file_format="array_record")


def _downloads(data_dir: str) -> Path:
    """TFDS's folder for downloads."""
    return Path(data_dir, "downloads")


def _silent_hosts(builder: Any, data_dir: str) -> list[str]:
    """The hosts of the dataset's files if none of them answers; TFDS would try for minutes.

    Also empty if some files were downloaded before, because they may be all that is needed.
    """
    from cnn_jax.data import raw_files
    from cnn_jax.data.download import silent_hosts

    downloads = _downloads(data_dir)
    if raw_files.is_known(builder):
        missing = raw_files.missing(builder, downloads)
        return silent_hosts(url for file in missing for url in file.urls)
    if any(downloads.glob("manual/*")) or any(downloads.glob(f"{builder.name}/**/*.INFO")):
        return []
    return silent_hosts(builder.url_infos or ())


def _damaged_json(folder: Path) -> Path | None:
    """The first JSON file of a dataset's description that cannot be parsed."""
    for path in sorted(folder.rglob("*.json")):
        try:
            json.loads(path.read_text())
        except (OSError, ValueError):
            return path
    return None


def _reason(error: Exception) -> str:
    """TFDS's error in one short line, without the dataset's name and arguments repeated."""
    if isinstance(error, ImportError) and error.name == "tensorflow":
        return NO_TENSORFLOW
    text = " ".join(str(error).rpartition('}": ')[2].split())
    text = re.sub(r" Here are \d+ .* match:$", "", text) or type(error).__name__
    return textwrap.shorten(text, 200, placeholder=" ...")
