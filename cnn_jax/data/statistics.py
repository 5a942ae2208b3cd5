"""The mean and deviation of a split's pixels, its fingerprint, and images that are in two splits."""

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.schema import AUTO
from cnn_jax.data import balance, folders
from cnn_jax.data.examples import Examples, InMemory, chunks

Place = tuple[str, int]  # a split, and the index of an example in it

DIGITS = 4
# Examples of a split that its fingerprint looks at. Reading a whole large dataset is slow.
SAMPLE = 256


def in_numbers(config: Config, examples: Examples) -> Config:
    """`config` with numbers for what the training `examples` decide.

    These are a data.mean or data.std of "auto", and class weights that are "balanced".

    Raises:
      ConfigError: a channel has the same value everywhere, so that its deviation is 0.
    """
    config = balance.with_class_weights(config, examples)
    data = config.data
    if AUTO not in (data.mean, data.std):
        return config
    mean, std = mean_and_deviation(examples)
    if data.std == AUTO and min(std) <= 0:
        raise ConfigError(
            f"data.std=auto: is {', '.join(map(str, std))} in the training images; give numbers"
        )
    found: dict[str, Any] = {"mean": mean, "std": std}
    numbers = {name: value for name, value in found.items() if getattr(data, name) == AUTO}
    return dataclasses.replace(config, data=dataclasses.replace(data, **numbers))


def mean_and_deviation(examples: Examples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel's pixels in [0, 1], rounded to four digits after the point.

    Exact before the rounding, as it counts the 256 values: the same on every machine.
    """
    counts = np.zeros((examples.image_shape[2], 256), np.int64)
    for batch in chunks(examples):
        image = batch["image"]
        for channel, count in enumerate(counts):
            count += np.bincount(image[..., channel].ravel(), minlength=256)
    values = np.arange(256)
    mean, std = [], []
    for count in counts:
        total, first, second = (int((count * values**power).sum()) for power in (0, 1, 2))
        mean.append(round(first / total / 255, DIGITS))
        std.append(round((total * second - first**2) ** 0.5 / total / 255, DIGITS))
    return tuple(mean), tuple(std)


def twins(splits: Mapping[str, Examples]) -> list[tuple[Place, Place]]:
    """Images with equal pixels, as the network gets them: of each, its first place and another.

    Args:
      splits: by name. A split before another one has the first place.
    """
    first: dict[bytes, Place] = {}
    found = []
    for name, examples in splits.items():
        place = 0
        for batch in chunks(examples):
            for image in batch["image"]:
                pixels = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
                if (before := first.setdefault(pixels, (name, place))) != (name, place):
                    found.append((before, (name, place)))
                place += 1
    return found


def equal_files(
    dataset: folders.Dataset, splits: Mapping[str, Examples]
) -> list[tuple[Place, Place]]:
    """Of `dataset`, files with equal bytes in two splits: of each, its first place and another.

    Decodes nothing. Reads only files as long as one of another split.
    """
    size = {image.file: image.size for image in dataset.images}
    holders: defaultdict[int, set[str]] = defaultdict(set)
    for name, examples in splits.items():
        for file in examples.files:
            holders[size[file]].add(name)
    first: dict[bytes, Place] = {}
    found = []
    for name, examples in splits.items():
        for place, file in enumerate(examples.files):
            if len(holders[size[file]]) < 2 or size[file] < 0:
                continue
            with open(os.path.join(dataset.root, file), "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").digest()
            before = first.setdefault(content, (name, place))
            if before[0] != name:
                found.append((before, (name, place)))
    return found


def fingerprint(examples: Examples) -> dict[str, int | str]:
    """The number of examples, and hashes of the pixels and the labels of `SAMPLE` of them.

    Of examples that are in memory also a hash of all.
    """
    places = np.linspace(0, len(examples) - 1, SAMPLE).astype(int)
    batch = examples[places]
    found: dict[str, int | str] = {
        "examples": len(examples),
        "pixels": _sum(batch["image"]),
        "labels": _sum(batch["label"]),
    }
    if isinstance(examples, InMemory):
        found["all"] = _sum(examples.image, examples.label)
    return found


def _sum(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]
