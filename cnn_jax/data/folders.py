"""A user's own images as a dataset: classes, splits, sizes, and the decoding of the files.

The order of the examples is that of a table's rows. For folders it is drawn once, by SHA-256 of the
files' paths, so that no class comes first. The same number decides which images become the test
split where there is none: those of a class with the lowest ones. It is the same on every machine, and
an image that is added moves few others.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from cnn_jax.common import cpu, decode, files
from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.data import image_files, tfds_builder
from cnn_jax.data.image_files import ImageFile
from cnn_jax.data.prefetch import Workers, look_ahead
from cnn_jax.data.records import CHUNK, Decoded, ImageRecords, changed

if TYPE_CHECKING:  # it imports JAX, which processes that only decode images do not need
    from cnn_jax.config import DataConfig

log = logging.getLogger(__name__)

SEED = 0
TEST_FRACTION = 0.2
SUGGESTED_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Headers:
    """What the headers of a dataset's files say.

    Attributes:
      size: int32 [N, 2], height and width of the upright images; 0, 0 if a header is damaged.
      grey: bool [N].
    """

    size: np.ndarray
    grey: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """The sizes [n, 2] of the readable images."""
        return self.size[self.size[:, 0] > 0]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The user's images.

    Attributes:
      name: the whole path of the folder or table.
      root: what the paths of its files are relative to.
      class_names: in the order of the labels.
      splits: the images of each: train, test, validation.
      carved: whether the test split was taken from the training split.
      remarks: what a user should know, a line each.
    """

    name: str
    root: str
    class_names: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    carved: bool
    remarks: tuple[str, ...]

    @functools.cached_property
    def images(self) -> list[ImageFile]:
        """Those of all splits."""
        return [image for images in self.splits.values() for image in images]

    def digest(self, modified: bool = False) -> str:
        """A hash of paths, classes, splits and sizes in bytes; with `modified` also of their times."""
        rows = [
            [split, image.file, image.class_name, image.size, modified and image.modified]
            for split, images in self.splits.items()
            for image in images
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    @property
    def headers(self) -> Headers:
        """Read once, until a file changes."""
        return _headers(self.root, tuple(image.file for image in self.images), self.digest(True))

    def image_shape(self, data: "DataConfig") -> tuple[int, int, int]:
        """(H, W, C): one channel if all files are stored as grey, otherwise three.

        Raises:
          SizesDiffer: data.image_size is not set, and the images differ in size.
          DataError: no image can be read.
        """
        sizes, grey = self.headers.sizes, self.headers.grey[self.headers.size[:, 0] > 0]
        if not len(sizes):
            raise DataError(
                f"data.name={self.name}: none of its {len(self.images)} images can be read"
            )
        channels = 1 if grey.all() else 3
        if data.image_size:
            return (*data.image_size, channels)
        if len(np.unique(sizes, axis=0)) > 1:
            raise tfds_builder.SizesDiffer(
                f"data.name={self.name}: its images differ in size: {size_range(sizes)}; add "
                f"--set data.image_size={','.join(map(str, suggested_size(sizes)))}, or another size"
            )
        height, width = map(int, sizes[0])
        return height, width, channels

    def select(self, split: str, field: str) -> list[ImageFile]:
        """The images of a split in TFDS's notation; errors name it as `field`.

        Raises:
          DataError: there is no such split, or it is empty.
        """
        known = self.splits | {"all": self.images}
        if split in known:
            images = known[split]
        else:
            images = [image for part in self._parts(split, field, known) for image in part]
        if not images:
            raise DataError(f"{field}={split}: {self.name} has no images there")
        return images

    def _parts(self, split: str, field: str, known: dict) -> list[list[ImageFile]]:
        with tfds_builder.quiet():
            from tensorflow_datasets.core import ReadInstruction

            counts = {name: SimpleNamespace(num_examples=len(i)) for name, i in self.splits.items()}
            try:
                parts = ReadInstruction.from_spec(split).to_absolute(counts)
            except Exception as error:  # as in tfds_records
                reason = str(error).partition("\n")[0]
                reason = "" if reason.startswith("Unknown split") else f" ({reason})"
                raise DataError(
                    f"{field}={split}: must be a split of {self.name} ({', '.join(known)}) or a slice "
                    f"of one, such as train[:10%]{reason}"
                ) from None
        return [known[part.splitname][part.from_ : part.to] for part in parts]


def open_dataset(data: "DataConfig") -> Dataset:
    """Finds the images of `data.name`; decodes none of them.

    Raises:
      DataError: there are none, or what the folder or table says is not clear.
      ConfigError: data.test_fraction is set, and the dataset has a test split.
    """
    root, (images, remarks) = image_files.find(data.name)
    if root == data.name:
        images = sorted(images, key=_drawn)
    names = _in_order({image.class_name for image in images})
    splits: dict[str, list[ImageFile]] = {}
    for image in images:
        splits.setdefault(image.split or "train", []).append(image)
    own = "test" in splits
    if own and data.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction={data.test_fraction}: must be none, as {data.name} has a test split"
        )
    carved = not own and data.test_split == "test" and "train" in splits
    if carved:
        fraction = data.test_fraction or TEST_FRACTION
        splits["train"], splits["test"] = _carved(splits["train"], fraction)
        remarks.append(f"no test split: {fraction:.0%} of each class become one (seed {SEED})")
        counts = Counter(image.class_name for image in images)
        if alone := [name for name in names if counts[name] == 1]:
            remarks.append(f"of {_listed(alone)} there is one image, for training alone")
    ordered: dict[str, list[ImageFile]] = {
        name: splits[name] for name in ("train", "validation", "test") if name in splits
    }
    return Dataset(data.name, root, names, ordered, carved, tuple(remarks))


def has_validation(data: "DataConfig", dataset: Dataset | None = None) -> bool:
    """Whether the run's validation split is the one that the dataset has."""
    used = f"{data.train_split} {data.test_split}"
    found = "validation" not in used and "validation" in (dataset or open_dataset(data)).splits
    if found and data.validation_examples:
        raise ConfigError(
            f"data.validation_examples={data.validation_examples}: must be 0, as {data.name} has a "
            "validation split"
        )
    return found


def check_training(data: "DataConfig", dataset: Dataset) -> None:
    """Says what a user should know of the dataset, before it is decoded for training.

    Raises:
      DataError: it has one class, or a class without a training image.
    """
    names, trained = dataset.class_names, dataset.select(data.train_split, "data.train_split")
    found = {image.class_name for image in trained}
    if len(names) < 2:
        raise DataError(f"data.name={data.name}: has one class, {names[0]}; training needs two")
    if absent := [name for name in names if name not in found]:
        raise DataError(
            f"data.name={data.name}: no image of {_listed(absent)} in {data.train_split}, but in "
            "another split; add some, or leave that class out"
        )
    counts = ", ".join(f"{name} {len(images):,}" for name, images in dataset.splits.items())
    log.info("%s: %d classes; %s", files.printable(data.name), len(names), counts)
    for remark in dataset.remarks:
        log.warning("%s: %s", files.printable(data.name), remark)


def size_range(sizes: np.ndarray) -> str:
    """Sizes [n, 2] in words: smallest, median and largest, by their area, or the only one."""
    if len(np.unique(sizes, axis=0)) == 1:
        return "all {}x{}".format(*sizes[0])
    ordered = sizes[np.lexsort((sizes[:, 0], sizes.prod(1, dtype=np.int64)))]
    shown = ("x".join(map(str, ordered[i])) for i in (0, len(ordered) // 2, -1))
    return "{} the smallest, {} the median, {} the largest (height x width)".format(*shown)


def suggested_size(sizes: np.ndarray) -> tuple[int, int]:
    """A square size for images of sizes [n, 2]: the median of their shorter sides, at most 64."""
    side = min(SUGGESTED_SIDE, int(np.median(sizes.min(1))))
    return side, side


class FileRecords(ImageRecords):
    """The examples of one split; `files` has their paths, relative to `root`."""

    random_access = True

    def __init__(self, dataset: Dataset, images: Sequence[ImageFile], data: "DataConfig"):
        """Prepares to decode `images` of `dataset`.

        Raises:
          DataError: as `Dataset.image_shape`.
        """
        self.name, self.root = dataset.name, dataset.root
        self.class_names, self.image_shape = dataset.class_names, dataset.image_shape(data)
        self.files = tuple(image.file for image in images)
        self.stamps = np.array([(image.size, image.modified) for image in images], np.int64)
        self.any_size = data.image_size is not None
        index = {name: i for i, name in enumerate(self.class_names)}
        self.labels = np.array([index[image.class_name] for image in images], np.int32)
        self.workers = Workers(np.median(dataset.headers.sizes.prod(1, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.files)

    def chunks(self) -> Iterator[Decoded]:
        starts = range(0, len(self), CHUNK)
        return look_ahead(
            self.decoded(range(start, min(start + CHUNK, len(self)))) for start in starts
        )

    def decoded(self, indices: Sequence[int]) -> Decoded:
        def read(i: int) -> tuple[np.ndarray, int]:
            return self._read(self._path(indices[i])), self.labels[indices[i]]

        return self.decode_each(len(indices), read)

    def check_unchanged(self, indices: Sequence[int]) -> None:
        for index in indices:
            before, now = tuple(self.stamps[index].tolist()), None
            with contextlib.suppress(OSError):
                status = os.stat(self._path(index))
                now = status.st_size, status.st_mtime_ns
            if now != before and before[0] >= 0:
                raise changed(self._path(index), now, before)

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def _read(self, path: str) -> np.ndarray:
        """uint8 [H, W, C]."""
        height, width, channels = self.image_shape
        picture = decode.decode_file(path, channels)
        if not self.any_size and picture.size != (width, height):
            raise DataError(
                f"{path}: is {picture.height}x{picture.width}, the others {height}x{width} (height x "
                "width); set data.image_size"
            )
        return decode.pixels(picture, height, width)


@functools.lru_cache(maxsize=2)
def _headers(root: str, names: tuple[str, ...], digest: str) -> Headers:
    """The headers of files; `digest` is another one if a file has changed."""
    size, grey = np.zeros((len(names), 2), np.int32), np.zeros(len(names), bool)

    def read(i: int) -> None:
        try:
            with open(os.path.join(root, names[i]), "rb") as file:
                *size[i], grey[i] = decode.header(file)
        except (OSError, decode.Unsuitable):
            pass  # decoding says why

    with ThreadPoolExecutor(cpu.cores()) as workers:
        list(workers.map(read, range(len(names)), chunksize=CHUNK))
    return Headers(size, grey)


def _drawn(image: ImageFile) -> bytes:
    """The number of an image by which it is drawn at random."""
    return hashlib.sha256(f"{SEED}/".encode() + os.fsencode(image.file)).digest()


def _carved(images: list[ImageFile], fraction: float) -> tuple[list[ImageFile], list[ImageFile]]:
    """Training and test images: of each class, `fraction` become test images, but never all."""
    by_class: dict[str, list[ImageFile]] = {}
    for image in images:
        by_class.setdefault(image.class_name, []).append(image)
    chosen: set[str] = set()
    for same in by_class.values():
        count = min(max(round(fraction * len(same)), 1), len(same) - 1)
        chosen |= {image.file for image in sorted(same, key=_drawn)[:count]}
    test = [image for image in images if image.file in chosen]
    return [image for image in images if image.file not in chosen], test


def _in_order(names: set[str]) -> tuple[str, ...]:
    """Class names, sorted: by their value if all of them are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
