"""The order of the examples, and batches of them on the host.

The order of an epoch is a pure function of (seed, epoch): it depends neither on the number of devices
nor on where a run was resumed.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data.balance import balanced_order, labels
from cnn_jax.data.prefetch import look_ahead
from cnn_jax.data.sources import Examples, InMemory


def epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the `total` examples: int64 [total]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(total)


def make_order(config: Config, examples: Examples) -> Callable[[int], np.ndarray]:
    """A function of the epoch that gives its order: int64 [N], indices of the training examples."""
    if config.data.balanced:
        label = labels(examples)
        return lambda epoch: balanced_order(config.seed, epoch, label)
    return functools.partial(epoch_order, config.seed, total=len(examples))


def training_batches(
    examples: Examples,
    order: np.ndarray,
    batch_size: int,
    start: int = 0,
    epoch: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one epoch, from batch `start` on; an incomplete last batch is dropped.

    Args:
      examples: of training.
      order: of the epoch.
      batch_size: of the whole batch.
      start: the first batch.
      epoch: its number.
      rows: the rows of each batch that are read and decoded; None for all, n = batch_size.

    Yields:
      image uint8 [n, H, W, C], label int32 [n], index int32 [n]: the examples' indices in the
      dataset, epoch int32 [n].
    """
    own = slice(None) if rows is None else rows
    epochs = np.full(batch_size, epoch, np.int32)[own]

    def made() -> Iterator[dict[str, np.ndarray]]:
        for step in range(start, len(order) // batch_size):
            index = order[step * batch_size : (step + 1) * batch_size][own]
            yield examples[index] | {"index": index.astype(np.int32), "epoch": epochs}

    return _ahead(examples, made())


def evaluation_batches(
    examples: Examples, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order; the last batch is padded with examples whose mask is 0.

    Args:
      examples: a split.
      batch_size: of the whole batch.
      rows: as in `training_batches`.

    Yields:
      image uint8 [n, H, W, C], label int32 [n], mask float32 [n].
    """
    own = slice(None) if rows is None else rows

    def made() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(examples), batch_size):
            index = np.arange(start, start + batch_size)[own]
            mask = (index < len(examples)).astype(np.float32)
            yield examples[np.minimum(index, len(examples) - 1)] | {"mask": mask}

    return _ahead(examples, made())


def _ahead(examples: Examples, batches: Iterator[dict]) -> Iterator[dict]:
    """Prefetches the batches if their examples must be read and decoded."""
    return batches if isinstance(examples, InMemory) else look_ahead(batches)
