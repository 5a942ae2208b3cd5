"""The splits of a run: what it trains on, chooses by, is judged by."""

import dataclasses
import functools

from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import Config
from cnn_jax.config.validate import check_images, check_model
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


def check_splits(config: Config, splits: Splits) -> dict:
    """What config.json says of the data, after checking that the configuration fits it.

    Raises:
      ConfigError, DataError: it does not.
    """
    shape, names = splits.train.image_shape, splits.train.class_names
    if len(splits.train) < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size}: must be at most the {len(splits.train)} training examples"
        )
    check_images(config.data, shape)
    if splits.test.image_shape != shape:
        raise DataError(f"data.test_split: images of {splits.test.image_shape}, not {shape}")
    logits = check_model(config.model, shape, len(names))
    return {
        "class_names": [*names, *(f"class {i}" for i in range(len(names), logits))],
        "image_shape": shape,
        "train_examples": len(splits.train),
    }
