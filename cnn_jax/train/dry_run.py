"""A short run that tests whether an experiment works."""

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.common.errors import ConfigError
from cnn_jax.config import Config
from cnn_jax.config.paths import resolve
from cnn_jax.data.splits import load_splits
from cnn_jax.train import optim, parallel
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.loop import train

log = logging.getLogger(__name__)


def dry_run(
    config: Config,
    data_dir: str | None = None,
    download: bool = False,
    init_from: str | None = None,
) -> list[dict]:
    """Trains, evaluates, saves and restores two batches in a temporary workdir.

    Raises:
      ConfigError: this is one of several processes, which cannot share that workdir.
      The errors of `train`.
    """
    if parallel.is_one_of_several():
        raise ConfigError("--dry_run: takes one process; leave out --coordinator")
    config = resolve(config)
    splits = load_splits(config, data_dir, download)
    few: dict[str, Any] = {
        name: examples.take(np.arange(min(len(examples), 2 * config.batch_size)))
        for name, examples in splits.by_name().items()
    }
    splits = dataclasses.replace(splits, **few)
    config = dataclasses.replace(optim.with_constant_rate(config), epochs=1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = train(config, Path(scratch), splits=splits, init_from=init_from)
        run = Checkpoints(Path(scratch)).newest()
        assert run is not None, "train has saved it"
        log.info("dry run: two batches trained, evaluated, saved and restored (step %d)", run.step)
    return lines
