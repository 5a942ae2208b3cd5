"""Datasets that are the user's own images: when data.name is a path, and which one."""

import dataclasses
import os
import re

from cnn_jax.common import decode, files
from cnn_jax.common.errors import ConfigError
from cnn_jax.config.schema import Config, DataConfig

TABLES = (".csv", ".tsv", ".jsonl")
_WRITTEN_AS_PATH = re.compile(r"(/|~|\.\.?(/|$)).*", re.DOTALL)


def is_path(name: str) -> bool:
    """Whether a `data.name` that `resolved` has returned is a path: these alone begin with a slash."""
    return name.startswith("/")


def resolved(data: DataConfig) -> DataConfig:
    """`data` with the whole path in `name` if that is a path, so that it holds in any folder.

    A name is a path if it begins with /, ./, ../ or ~, ends in .csv, .tsv or .jsonl, or is that of a
    folder that holds images. All others are names of TFDS's datasets.
    """
    name = data.name
    written = _WRITTEN_AS_PATH.fullmatch(name) or name.lower().endswith(TABLES)
    if is_path(name) or not (written or _holds_images(name)):
        return data
    return dataclasses.replace(data, name=os.path.abspath(files.user_path(name)))


def resolve(config: Config) -> Config:
    """`config` with its data `resolved`.

    Raises:
      ConfigError: data.test_fraction is set, which has an effect on a user's own images alone.
    """
    data = resolved(config.data)
    if not is_path(data.name) and data.test_fraction:
        raise ConfigError(
            f"data.test_fraction={data.test_fraction}: is for your own images; data.name={data.name} "
            "is none of their folders or tables"
        )
    return config if data is config.data else dataclasses.replace(config, data=data)


def _holds_images(folder: str) -> bool:
    return os.path.isdir(folder) and any(
        os.path.splitext(name)[1].lower() in decode.suffixes() and not files.is_left_out(name)
        for _, _, names in os.walk(folder)
        for name in names
    )
