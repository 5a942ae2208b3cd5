"""The order of the examples, and batches of them on the host.

The order of an epoch is a pure function of (seed, epoch): it depends neither on the number of devices
nor on where a run was resumed.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data.balance import balanced_order, labels
from cnn_jax.data.examples import Examples, in_order


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
    steps = range(start, len(order) // batch_size)
    batches = [order[step * batch_size : (step + 1) * batch_size][own] for step in steps]
    for index, batch in zip(batches, in_order(examples, batches), strict=True):
        yield batch | {"index": index.astype(np.int32), "epoch": epochs}


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
    starts = range(0, len(examples), batch_size)
    places = np.arange(batch_size)[slice(None) if rows is None else rows]
    batches = (np.minimum(start + places, len(examples) - 1) for start in starts)
    for start, batch in zip(starts, in_order(examples, batches), strict=True):
        yield batch | {"mask": (start + places < len(examples)).astype(np.float32)}
