"""Loads the examples of a TFDS dataset or of a user's own images.

All are decoded in memory, or on demand if memory is too small. Nothing is downloaded unless
`download` is true. TensorFlow Datasets is imported only if the cache has no decoded copy of the split.
"""

import dataclasses
import functools
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np

from cnn_jax.common import cache, cpu, decode, memory, remote
from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import DataConfig
from cnn_jax.config.paths import is_path
from cnn_jax.config.schema import AUTO
from cnn_jax.data import buckets, decoded_cache, folders, tfds_builder
from cnn_jax.data.examples import Examples, InMemory, OnDemand
from cnn_jax.data.records import BROKEN, ImageRecords

log = logging.getLogger(__name__)


def default_data_dir() -> str:
    """TFDS_DATA_DIR, or else TFDS's default folder."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")


def load_examples(
    data: DataConfig,
    split: str,
    data_dir: str | None = None,
    download: bool = False,
    memory_bytes: int | None = None,
    dataset: folders.Dataset | None = None,
) -> Examples:
    """The examples of one split.

    Args:
      data: names the dataset and defines its splits.
      split: "train", "validation" or "test" as `data` defines them, or any split of the dataset in
        TFDS's notation ("test[:10%]").
      data_dir: where TFDS prepared the dataset; None: `default_data_dir()`.
      download: lets TFDS fetch and prepare a dataset that is not prepared.
      memory_bytes: the limit for the decoded images, unless data.streaming is true or false; None:
        half of the memory that is available.
      dataset: a user's own images, if they are opened already: that takes time.

    Raises:
      DataError: the dataset or the split is unknown, not prepared, not of labelled images, or
        damaged; the message says which.
    """
    own = split == "validation" and not data.validation_examples and has_validation(data, dataset)
    if split == "validation" and not data.validation_examples and not own:
        raise DataError(
            "split=validation: this run has no validation split (data.validation_examples=0)"
        )
    if data.streaming != AUTO:
        memory_bytes = 0 if data.streaming else sys.maxsize
    elif memory_bytes is None:
        memory_bytes = memory.available_bytes() // 2
    load = functools.partial(
        _load,
        data,
        data_dir=data_dir,
        download=download,
        memory_bytes=memory_bytes,
        dataset=dataset,
    )
    if split == "test":
        return load(data.test_split, field="data.test_split")
    if own or split not in ("train", "validation"):
        return load(split, field="split")
    examples = load(data.train_split, field="data.train_split")
    if not data.validation_examples:
        return examples
    kept, held_out = _hold_out(data, len(examples))
    return examples.take(kept if split == "train" else held_out)


def has_validation(data: DataConfig, dataset: folders.Dataset | None = None) -> bool:
    """Whether the run has a validation split; `dataset` as in `load_examples`.

    Raises:
      ConfigError: the dataset has one, and data.validation_examples asks for another one.
    """
    own = is_path(data.name) and folders.has_validation(data, dataset)
    return own or bool(data.validation_examples)


def image_shape(data: DataConfig, data_dir: str | None = None) -> tuple[int, int, int]:
    """(H, W, C) of a dataset's images. The dataset need not be prepared; nothing is downloaded.

    Raises:
      DataError: there is no such dataset, it is not of labelled images, or they differ in size and
        data.image_size is not set.
    """
    if is_path(data.name):
        return folders.open_dataset(data).image_shape(data)
    builder = tfds_builder.open_builder(data.name, _folder(data, data_dir))
    return tfds_builder.layout(builder, data).image_shape


def input_shape(
    data: DataConfig, input_size: str | None, data_dir: str | None = None
) -> tuple[int, int, int]:
    """(H, W, C) of the images: from `input_size`; the dataset gives what that leaves out.

    The dataset need not be prepared. HEIGHTxWIDTHxCHANNELS does not use it at all.

    Raises:
      ConfigError: `input_size` is not SIZE, HEIGHTxWIDTH or HEIGHTxWIDTHxCHANNELS.
      DataError: as `image_shape`.
    """
    if input_size is None:
        return image_shape(data, data_dir)
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", input_size, re.ASCII):
        raise ConfigError(f"--input_size={input_size}: write SIZE, HxW or HxWxC, as in 64x64x3")
    sizes = [int(part) for part in input_size.split("x")]
    if len(sizes) == 3:
        return sizes[0], sizes[1], sizes[2]
    data = dataclasses.replace(data, image_size=(sizes[0], sizes[-1]))
    return image_shape(data, data_dir)


def _hold_out(data: DataConfig, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation split, both ascending."""
    count = data.validation_examples
    if count >= total:
        raise DataError(
            f"data.validation_examples={count}: must be less than the {total} examples of "
            f"{data.name}/{data.train_split}"
        )
    order = np.random.default_rng(0).permutation(total)
    return np.sort(order[count:]), np.sort(order[:count])


def _load(
    data: DataConfig,
    split: str,
    field: str,
    data_dir: str | None,
    download: bool,
    memory_bytes: int,
    dataset: folders.Dataset | None,
) -> Examples:
    """The examples of a split in TFDS's notation; errors name it as `field`."""
    if is_path(data.name):
        dataset = dataset or folders.open_dataset(data)
        return _load_files(data, dataset, split, field, memory_bytes)
    folder = _folder(data, data_dir)
    key = _cache_key(data, split, folder)
    if key and (found := decoded_cache.read(key, memory_bytes)):
        return InMemory(**found)
    from cnn_jax.data.tfds_records import Records

    builder = tfds_builder.prepare(data.name, folder, download)
    records = Records(builder, data, split, field)
    if len(records) * int(np.prod(records.image_shape)) > memory_bytes:
        if records.random_access:
            return _on_demand(records, data)
        reason = "too large for memory" if data.streaming == AUTO else "data.streaming=true"
        raise DataError(
            f"data.name={data.name}: {reason}, and the TFRECORD files in data_dir={folder} "
            "have no random access; prepare it as array_record: --download with another --data_dir"
        )
    examples, first = _decode_all(records, data)
    if not first and (key := _cache_key(data, split, folder)):
        decoded_cache.write(key, examples.image, examples.label, examples.class_names)
    return _without_broken(examples, first, data)


def _load_files(
    data: DataConfig, dataset: folders.Dataset, split: str, field: str, memory_bytes: int
) -> Examples:
    """The same for a user's own images."""
    images = dataset.select(split, field)
    key = {
        "dataset": Path(data.name).name[:40],
        "split": split,
        "image_size": list(data.image_size) if data.image_size else None,
        "data_dir": data.name,
        "files": [dataset.digest(modified=True), decode.fingerprint()],
    }
    if found := decoded_cache.read(key, memory_bytes):
        examples, first = InMemory(**found), ""
    else:
        records = folders.FileRecords(dataset, images, data)
        if len(records) * int(np.prod(records.image_shape)) > memory_bytes:
            return _on_demand(records, data)
        examples, first = _decode_all(records, data)
        decoded_cache.write(key, examples.image, examples.label, examples.class_names)
    broken = np.flatnonzero(examples.label == BROKEN)
    if found and len(broken):
        first = folders.FileRecords(dataset, images, data).problem(broken[0])
    examples = dataclasses.replace(examples, files=tuple(image.file for image in images))
    return _without_broken(examples, first, data)


def _on_demand(records: ImageRecords, data: DataConfig) -> OnDemand:
    """The examples of `records`; looks for those that cannot be decoded if they may be left out."""
    count = cpu.cores() if data.workers is None else data.workers
    by = f"{count} worker process{'es'[: 2 * (count > 1)]}" if count else "threads"
    reason = ": it does not fit in memory" if data.streaming == AUTO else ""
    log.info("%s is decoded on demand by %s%s", records.name, by, reason)
    if not data.skip_corrupt:
        return OnDemand(records, np.arange(len(records)), count)
    log.info("decoding all %s images once, to find broken ones", f"{len(records):,}")
    label, errors = [], []
    for _, labels, found in records.chunks():
        label.append(labels)
        errors += found
        if errors:
            _check_broken(str(errors[0]), len(errors), data)
    if errors:
        _report_broken(str(errors[0]), len(errors), len(records), data)
    readable = np.flatnonzero(np.concatenate(label) != BROKEN)
    return OnDemand(records, readable, count, skipped=len(errors))


def _without_broken(examples: InMemory, first: str, data: DataConfig) -> InMemory:
    """`examples` without those whose label is BROKEN; `first` says why the first of them is."""
    readable = np.flatnonzero(examples.label != BROKEN)
    skipped = len(examples) - len(readable)
    if not skipped:
        return examples
    _report_broken(first, skipped, len(examples), data)
    return dataclasses.replace(examples.take(readable), skipped=skipped)


def _check_broken(first: str, count: int, data: DataConfig) -> None:
    """Raises DataError if `count` images that cannot be decoded are more than may be left out."""
    allowed = data.skip_corrupt
    if allowed != "all" and count > allowed:
        more = f" ({count} such images, data.skip_corrupt={allowed})" if allowed else ""
        raise DataError(f"{first}{more}; --set data.skip_corrupt=all leaves such images out")


def _report_broken(first: str, count: int, total: int, data: DataConfig) -> None:
    """Says how many of `total` images cannot be decoded, and why the first cannot.

    Raises:
      DataError: they must not be left out, or there are no others.
    """
    _check_broken(first, count, data)
    if count == total:
        raise DataError(f"{first} ({count} images are broken); no image is left")
    log.warning("warning: %d broken images are left out; the first: %s", count, first)


def _decode_all(records: ImageRecords, data: DataConfig) -> tuple[InMemory, str]:
    """All examples, also those that are BROKEN, and why the first of these is.

    Raises:
      DataError: more are broken than may be left out.
    """
    log.info("decoding %s examples of %s", f"{len(records):,}", records.name)
    image = np.empty((len(records), *records.image_shape), np.uint8)
    label = np.empty(len(records), np.int32)
    done, broken, first = 0, 0, ""
    for images, labels, errors in records.chunks():
        image[done : done + len(labels)] = images
        label[done : done + len(labels)] = labels
        done += len(labels)
        broken += len(errors)
        first = first or next(map(str, errors), "")
        _check_broken(first, broken, data)
    names = records.class_names
    absent = np.flatnonzero(np.bincount(label[label >= 0], minlength=len(names)) == 0)
    if len(absent):
        shown = ", ".join(names[i] for i in absent[:5]) + (", ..." if len(absent) > 5 else "")
        log.warning("warning: %s has no example of: %s", records.name, shown)
    return InMemory(image, label, names), first


def _folder(data: DataConfig, data_dir: str | None) -> str:
    if data.name == tfds_builder.EMBEDDED:
        return str(cache.cache_dir() / "tfds")
    folder = data_dir or default_data_dir()
    if not remote.is_remote(folder):
        return os.path.expanduser(folder)
    dataset = tfds_builder.dataset_name(data.name)
    return str(buckets.opened(folder, dataset, cache.cache_dir()).folder)


def _cache_key(data: DataConfig, split: str, folder: str) -> dict | None:
    """What a decoded copy depends on; None if the dataset's files are absent."""
    files = buckets.state(folder) or decoded_cache.fingerprint(
        Path(folder, data.name.partition(":")[0].partition("/")[0])
    )
    if not files:
        return None
    if data.name == tfds_builder.EMBEDDED:  # another version may draw other images
        files += decoded_cache.fingerprint(Path(__file__).with_name("garments.py"))
    files.append(["decoding", decode.fingerprint()])
    return {
        "dataset": data.name,
        "split": split,
        "image_size": list(data.image_size) if data.image_size else None,
        "data_dir": str(Path(folder).absolute()),
        "files": files,
    }
