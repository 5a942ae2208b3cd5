"""The splits of a run: what it trains on, chooses by, is judged by."""

import dataclasses
import functools

from cnn_jax.config import Config
from cnn_jax.data import sources


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples of a run; `validation` is None where the configuration carves none."""

    train: sources.Examples
    validation: sources.Examples | None
    test: sources.Examples


def load_splits(config: Config, data_dir: str | None = None, download: bool = False) -> Splits:
    """Loads the splits of `config.data`.

    Raises:
      DataError: as `sources.load_examples`.
    """
    load = functools.partial(sources.load_examples, data_dir=data_dir, download=download)
    validation = load(config.data, "validation") if config.data.validation_examples else None
    return Splits(load(config.data, "train"), validation, load(config.data, "test"))
