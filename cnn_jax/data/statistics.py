"""The mean and deviation of a split's pixels, and images that occur in two splits."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.schema import AUTO
from cnn_jax.data import balance
from cnn_jax.data.examples import Examples, chunks

Place = tuple[str, int]  # a split, and the index of an example in it

DIGITS = 4


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
