"""From a TFDS dataset to examples in memory, or decoded on demand where memory is too small.

array_record files are read without TensorFlow, TFRECORD files through tf.data. Nothing is fetched
unless `download` says so.
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import socket
import typing
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cnn_jax import cache
from cnn_jax.config import DataConfig
from cnn_jax.data import decoded
from cnn_jax.errors import DataError

log = logging.getLogger(__name__)

EMBEDDED = "garments"
CHUNK = 1000
MAX_PIXELS = 50_000_000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Examples(typing.Protocol):
    """A split: `examples[indices]` is {"image": uint8 [n, H, W, C], "label": int32 [n]}."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...

    def take(self, indices: np.ndarray) -> "Examples": ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Examples that were all decoded at once."""

    image: np.ndarray
    label: np.ndarray
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image.shape[1:]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.image[indices], "label": self.label[indices]}

    def take(self, indices: np.ndarray) -> "InMemory":
        return InMemory(self.image[indices], self.label[indices], self.class_names)


@dataclasses.dataclass(frozen=True)
class OnDemand:
    """Examples that are read and decoded when they are asked for, by all processors."""

    read: Callable[[Sequence[int]], list[dict]]
    decode: Callable[[list[dict]], tuple[np.ndarray, np.ndarray]]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    indices: np.ndarray
    workers: ThreadPoolExecutor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        wanted = self.indices[indices]
        parts = np.array_split(wanted, min(os.cpu_count() or 1, len(wanted)))
        done = list(self.workers.map(lambda part: self.decode(self.read(part.tolist())), parts))
        image, label = (np.concatenate(arrays) for arrays in zip(*done, strict=True))
        return {"image": image, "label": label}

    def take(self, indices: np.ndarray) -> "OnDemand":
        return dataclasses.replace(self, indices=self.indices[indices])


def default_data_dir() -> str:
    """TFDS_DATA_DIR, else TFDS's own folder."""
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")


def load_examples(
    data: DataConfig,
    split: str,
    data_dir: str | None = None,
    download: bool = False,
    memory_bytes: int | None = None,
) -> Examples:
    """The examples of one split.

    Args:
      data: names the dataset; its splits are addressed by `split`.
      split: "train", "validation" or "test" as `data` defines them, or any split of the dataset in
        TFDS's notation ("test[:10%]").
      data_dir: where TFDS prepared the dataset; None: `default_data_dir()`.
      download: lets TFDS fetch and prepare a dataset that is not prepared.
      memory_bytes: what the decoded images may occupy; None: half of the machine's memory.

    Raises:
      DataError: the dataset or the split is unknown, not prepared, not of labelled images, or
        damaged; one line that says which.
    """
    if split in ("train", "validation"):
        train = _load(data, data.train_split, data_dir, download, memory_bytes)
        kept, held_out = _hold_out(data, len(train))
        if split == "validation" and not len(held_out):
            raise DataError("split=validation: this run has none (data.validation_examples=0)")
        return train.take(kept if split == "train" else held_out) if len(held_out) else train
    named = data.test_split if split == "test" else split
    return _load(data, named, data_dir, download, memory_bytes)


def _hold_out(data: DataConfig, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices that stay for training and those of the validation split, both ascending."""
    count = data.validation_examples
    if count >= total:
        raise DataError(
            f"data.validation_examples={count}: must be less than the {total} examples of "
            f"{data.name}/{data.train_split}"
        )
    order = np.random.default_rng(0).permutation(total)
    return np.sort(order[count:]), np.sort(order[:count])


def _load(
    data: DataConfig, split: str, data_dir: str | None, download: bool, memory_bytes: int | None
) -> Examples:
    if data.name == EMBEDDED:
        data_dir = str(cache.cache_dir() / "tfds")
    data_dir = os.path.expanduser(data_dir or default_data_dir())
    local = None if "://" in data_dir else Path(data_dir).absolute()
    dataset = data.name.partition(":")[0].partition("/")[0]

    def key() -> dict:
        files = decoded.fingerprint(local / dataset)
        return {
            "dataset": data.name,
            "split": split,
            "image_size": list(data.image_size) if data.image_size else None,
            "data_dir": str(local),
            "files": files,
        }

    if local is not None and (found := decoded.read(key())):
        return InMemory(**found)
    source = _Source.open(data, data_dir, download)
    examples = source.examples(split, memory_bytes)
    if local is not None and isinstance(examples, InMemory):
        decoded.write(key(), examples.image, examples.label, examples.class_names)
    return examples


class _Source:
    """A prepared TFDS builder of labelled images."""

    def __init__(self, builder: Any, data: DataConfig):
        import tensorflow_datasets as tfds

        self.builder, self.data = builder, data
        info = builder.info
        self.image_key, self.label_key = info.supervised_keys or ("image", "label")
        features = dict(info.features) if hasattr(info.features, "keys") else {}
        image, label = features.get(self.image_key), features.get(self.label_key)
        if not isinstance(image, tfds.features.Image) or not isinstance(
            label, tfds.features.ClassLabel
        ):
            raise DataError(
                f"data.name={data.name}: not a dataset of labelled images; it has "
                + ", ".join(f"{name}: {type(f).__name__}" for name, f in features.items())
            )
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        height, width, channels = image.shape
        if np.dtype(image.np_dtype) != np.uint8 or (channels or 3) not in MODES:
            raise DataError(
                f"data.name={data.name}: images of {image.np_dtype} with {channels} channels; "
                "uint8 with 1, 3 or 4 is read"
            )
        if data.image_size is None and None in (height, width):
            raise DataError(
                f"data.name={data.name}: its images differ in size; set one, as in "
                "--set data.image_size=64,64"
            )
        self.stored_size = (height, width)
        self.image_shape = (*(data.image_size or (height, width)), channels or 3)

    @classmethod
    def open(cls, data: DataConfig, data_dir: str, download: bool) -> "_Source":
        with _quiet_tfds():
            builder = _builder(data.name, data_dir)
            if not builder.is_prepared():
                _prepare(builder, data.name, data_dir, download)
            return cls(builder, data)

    def examples(self, split: str, memory_bytes: int | None) -> Examples:
        import tensorflow_datasets as tfds

        with _quiet_tfds():
            try:
                total = self.builder.info.splits[split].num_examples
            except (KeyError, ValueError, AssertionError):
                raise DataError(
                    f"split={split}: {self.data.name} has "
                    f"{', '.join(self.builder.info.splits)} (and slices such as train[:10%])"
                ) from None
            if not total:
                raise DataError(f"split={split}: {self.data.name} has no examples there")
            if memory_bytes is None:
                memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
            fits = total * int(np.prod(self.image_shape)) <= memory_bytes
            skip = {self.image_key: tfds.decode.SkipDecoding()}
            record_format = self.builder.info.file_format
            if record_format == tfds.core.FileFormat.ARRAY_RECORD:
                records = self.builder.as_data_source(split, decoders=skip)
                if not fits:
                    return self._on_demand(records, total)
                batches = self._read_chunks(records, split, total)
            elif fits:
                batches = self._read_dataset(split, skip)
            else:
                raise DataError(
                    f"data.name={self.data.name}: too large for memory, and {record_format.value} "
                    "files have no random access; prepare it with --file_format=array_record"
                )
            return self._in_memory(batches, split, total)

    def _on_demand(self, records: Any, total: int) -> OnDemand:
        log.info("%s is read on demand: decoded, it does not fit in memory", self.data.name)
        workers = ThreadPoolExecutor(os.cpu_count())
        return OnDemand(
            records.__getitems__,
            self._decode,
            self.class_names,
            self.image_shape,
            np.arange(total),
            workers,
        )

    def _in_memory(self, batches: Iterator[list[dict]], split: str, total: int) -> InMemory:
        log.info("decoding %s examples of %s/%s", f"{total:,}", self.data.name, split)
        image = np.empty((total, *self.image_shape), np.uint8)
        label = np.empty(total, np.int32)
        done = 0
        for batch in batches:
            new = done + len(batch)
            if new > total:
                break
            image[done:new], label[done:new] = self._decode(batch)
            done = new
        if done != total:
            raise DataError(
                f"{self.data.name}/{split}: {done} records in {self.builder.data_dir}, "
                f"{total} by its dataset_info.json: damaged; prepare it again"
            )
        absent = sorted(set(range(len(self.class_names))) - set(np.unique(label).tolist()))
        if absent:
            names = ", ".join(self.class_names[i] for i in absent[:5])
            log.warning("warning: %s/%s has no example of: %s", self.data.name, split, names)
        return InMemory(image, label, self.class_names)

    def _read_chunks(self, records: Any, split: str, total: int) -> Iterator[list[dict]]:
        for start in range(0, total, CHUNK):
            wanted = range(start, min(start + CHUNK, total))
            try:
                yield records.__getitems__(wanted)
            except Exception as error:  # array_record raises what it finds, of any type
                raise self._damaged(records, wanted, split, error) from error

    def _damaged(self, records: Any, wanted: range, split: str, error: Exception) -> DataError:
        """Names the shard of the first record of a chunk that cannot be read alone."""
        bad = wanted[0]
        for bad in wanted:
            try:
                records.__getitems__([bad])
            except Exception:
                break
        shard = "its files"
        for instruction in self.builder.info.splits[split].file_instructions:
            if bad < instruction.examples_in_shard:
                shard = instruction.filename
                break
            bad -= instruction.examples_in_shard
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return DataError(f"{shard}: record {bad} is damaged ({reason}); prepare the dataset again")

    def _read_dataset(self, split: str, skip: dict) -> Iterator[list[dict]]:
        import tensorflow_datasets as tfds

        read = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        dataset = self.builder.as_dataset(split, decoders=skip, read_config=read)
        chunk: list[dict] = []
        records = iter(tfds.as_numpy(dataset))
        while True:
            try:
                record = next(records)
            except StopIteration:
                break
            except Exception as error:  # tf.errors.DataLossError and its like
                reason = str(error).splitlines()[0][:200]
                folder = self.builder.data_dir
                raise DataError(
                    f"{folder}: damaged ({reason}); prepare the dataset again"
                ) from error
            chunk.append(record)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _decode(self, records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        image = np.empty((len(records), *self.image_shape), np.uint8)
        for i, record in enumerate(records):
            try:
                image[i] = self._decode_image(record[self.image_key])
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(
                    f"{self.builder.data_dir}: an image of {self.data.name} is damaged ({error}); "
                    "prepare the dataset again"
                ) from error
        label = np.array([record[self.label_key] for record in records], np.int64)
        if label.min() < 0 or label.max() >= len(self.class_names):
            worst = label.min() if label.min() < 0 else label.max()
            raise DataError(
                f"{self.builder.data_dir}: label {worst} of {self.data.name}: must be from 0 to "
                f"{len(self.class_names) - 1}"
            )
        return image, label.astype(np.int32)

    def _decode_image(self, encoded: bytes) -> np.ndarray:
        height, width, channels = self.image_shape
        with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} pixels")
            stored = tuple(
                there or own
                for there, own in zip(
                    self.stored_size, (picture.height, picture.width), strict=True
                )
            )
            if stored != (picture.height, picture.width):
                raise ValueError(
                    f"{picture.height}x{picture.width} instead of {stored[0]}x{stored[1]}"
                )
            if picture.mode != MODES[channels]:
                picture = picture.convert(MODES[channels])
            if (picture.height, picture.width) != (height, width):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(picture).reshape(height, width, channels)


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    if name == EMBEDDED:
        from cnn_jax.data.garments import Garments

        return Garments(data_dir=data_dir, file_format="array_record")
    if "://" not in data_dir and not Path(data_dir).is_dir():
        raise DataError(
            f"data_dir={data_dir}: no such folder (--data_dir, or TFDS_DATA_DIR); "
            f"the embedded dataset needs none: --experiment=quickstart"
        )
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), EMBEDDED]
        near = difflib.get_close_matches(name.partition(":")[0].partition("/")[0], known)
        raise DataError(
            f"data.name={name}: TFDS knows no such dataset and {data_dir} holds none of that name"
            + (f"; nearest: {', '.join(near)}" if near else "")
        ) from None
    except Exception as error:  # a version or a configuration that does not exist
        reason = " ".join(str(error).split())
        raise DataError(f"data.name={name}: {reason[-300:]}") from None


def _prepare(builder: Any, name: str, data_dir: str, download: bool) -> None:
    import tensorflow_datasets as tfds

    if name != EMBEDDED:
        advice = (
            f"data.name={name}: not prepared in data_dir={data_dir}; fetch and prepare it with "
            f"--download, or choose another folder with --data_dir; without a network, the embedded "
            f"dataset works: --experiment=quickstart"
        )
        if not download:
            raise DataError(advice)
        if unreachable := _unreachable_host(builder):
            raise DataError(f"{advice} (--download: {unreachable} cannot be reached)")
    log.info("preparing %s in %s", name, data_dir)
    try:
        config = tfds.download.DownloadConfig()
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.name={name}: could not be prepared in {data_dir}: {reason}"
        ) from error


def _unreachable_host(builder: Any) -> str | None:
    """The dataset's host if it does not answer within 3 s; TFDS itself tries for minutes."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    host = urllib.parse.urlparse(builder.info.homepage).hostname
    if not host:
        return None
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return host
    return None


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's remarks on OpenCV, variants and its own deprecations off the screen."""
    from absl import logging as absl_logging

    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl_logging.set_verbosity(level)
