"""The splits of a run: training, validation and test."""

import dataclasses
import functools
import logging

from cnn_jax import PROGRAM
from cnn_jax.common.errors import ConfigError, DataError
from cnn_jax.config import Config
from cnn_jax.config.paths import is_path
from cnn_jax.config.validate import check_images, check_model
from cnn_jax.data import folders, sources, statistics
from cnn_jax.data.examples import Examples, InMemory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples of a run.

    Attributes:
      train: for training.
      validation: chooses the best checkpoint; None if the configuration has no such split.
      test: is evaluated.
      data_files: the hash of a user's own images; empty for other datasets.
    """

    train: Examples
    validation: Examples | None
    test: Examples
    data_files: str = ""

    @functools.cached_property
    def fingerprints(self) -> dict[str, dict[str, int | str]]:
        """`statistics.fingerprint` of each split."""
        return {name: statistics.fingerprint(found) for name, found in self.by_name().items()}

    def by_name(self) -> dict[str, Examples]:
        """The splits that there are."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in found.items() if examples is not None}


def load_splits(config: Config, data_dir: str | None = None, download: bool = False) -> Splits:
    """Loads the splits of `config.data`.

    Raises:
      DataError: as `sources.load_examples`, and as `folders.check_training`.
    """
    data, dataset, data_files = config.data, None, ""
    if is_path(data.name):
        dataset = folders.open_dataset(data)
        data_files = dataset.digest()
        folders.check_training(data, dataset)
    load = functools.partial(
        sources.load_examples, data, data_dir=data_dir, download=download, dataset=dataset
    )
    validation = load("validation") if sources.has_validation(data, dataset) else None
    splits = Splits(load("train"), validation, load("test"), data_files)
    if dataset:
        _warn_of_twins(splits, dataset)
    return splits


def _warn_of_twins(splits: Splits, dataset: folders.Dataset) -> None:
    """Warns of images that are in two splits; of those that are decoded on demand, of equal files."""
    loaded = splits.by_name()
    if all(isinstance(examples, InMemory) for examples in loaded.values()):
        equal = "pixels"
        across = [pair for pair in statistics.twins(loaded) if pair[0][0] != pair[1][0]]
    else:
        equal, across = "files", statistics.equal_files(dataset, loaded)
    if across:
        (split, index), (other, twin) = across[0]
        log.warning(
            "warning: %d images are in two splits (equal %s; first: %s in %s, %s in %s), which "
            "makes the accuracy too high; %s data %s lists them",
            len(across),
            equal,
            loaded[split].files[index],
            split,
            loaded[other].files[twin],
            other,
            PROGRAM,
            dataset.name,
        )


def check_splits(config: Config, splits: Splits) -> dict:
    """Checks that the configuration fits the data; returns the data's metadata for config.json.

    Raises:
      ConfigError, DataError: it does not fit.
    """
    shape, names = splits.train.image_shape, splits.train.class_names
    if len(splits.train) < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size}: must be at most the {len(splits.train)} training "
            f"examples; add --set batch_size={len(splits.train)}, or less"
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
    weights = config.class_weights
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"class_weights={list(weights)}: must be one number for each of the {len(names)} classes"
        )
    metadata = {
        "class_names": [*names, *(f"class {i}" for i in range(len(names), logits))],
        "image_shape": shape,
        "train_examples": len(splits.train),
        "fingerprints": splits.fingerprints,
    }
    if splits.data_files:
        metadata["data_files"] = splits.data_files
    return metadata
