"""The splits of a run: training, validation and test."""

import dataclasses
import functools

from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import Config
from cnn_jax.config.paths import is_path
from cnn_jax.config.validate import check_images, check_model
from cnn_jax.data import folders, sources


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples of a run; `validation` is None if the configuration has no such split."""

    train: sources.Examples
    validation: sources.Examples | None
    test: sources.Examples


def load_splits(config: Config, data_dir: str | None = None, download: bool = False) -> Splits:
    """Loads the splits of `config.data`.

    Raises:
      DataError: as `sources.load_examples`, and as `folders.check_training`.
    """
    load = functools.partial(sources.load_examples, data_dir=data_dir, download=download)
    if is_path(config.data.name):
        folders.check_training(config.data)
    validation = load(config.data, "validation") if sources.has_validation(config.data) else None
    return Splits(load(config.data, "train"), validation, load(config.data, "test"))


def check_splits(config: Config, splits: Splits) -> dict:
    """Checks that the configuration fits the data; returns the data's metadata for config.json.

    Raises:
      ConfigError, DataError: it does not fit.
    """
    shape, names = splits.train.image_shape, splits.train.class_names
    if len(splits.train) < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size}: must be at most the {len(splits.train)} training examples"
        )
    if config.early_stopping_epochs and splits.validation is None:
        raise ConfigError(
            f"early_stopping_epochs={config.early_stopping_epochs}: needs a validation split, as the "
            "test split chooses nothing; set data.validation_examples"
        )
    check_images(config.data, shape)
    if splits.test.image_shape != shape:
        raise DataError(f"data.test_split: images of {splits.test.image_shape}, not {shape}")
    logits = check_model(config.model, shape, len(names))
    metadata = {
        "class_names": [*names, *(f"class {i}" for i in range(len(names), logits))],
        "image_shape": shape,
        "train_examples": len(splits.train),
    }
    if is_path(config.data.name):
        metadata["data_files"] = folders.open_dataset(config.data).digest()
    return metadata
