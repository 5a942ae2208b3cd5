"""The order of the examples, batches for training and evaluation, scaling and augmentation.

The order of an epoch is a pure function of (seed, epoch), the augmentation of an example one of
(seed, step, its index): neither depends on the number of devices or on where a run was resumed.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.config import DataConfig
from cnn_jax.data.prefetch import look_ahead
from cnn_jax.data.sources import Examples, InMemory


def epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the `total` examples: int64 [total]."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(total)


def training_batches(
    examples: Examples, order: np.ndarray, batch_size: int, start: int = 0, epoch: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one epoch from its `start`-th on; an incomplete last one is left out.

    Yields:
      image uint8 [batch_size, H, W, C], label int32 [batch_size], index int32 [batch_size]: the
      examples' places in the dataset, epoch int32 [batch_size].
    """
    epochs = np.full(batch_size, epoch, np.int32)

    def made() -> Iterator[dict[str, np.ndarray]]:
        for step in range(start, len(order) // batch_size):
            index = order[step * batch_size : (step + 1) * batch_size]
            yield examples[index] | {"index": index.astype(np.int32), "epoch": epochs}

    return _ahead(examples, made())


def evaluation_batches(examples: Examples, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order; the last batch is filled up with examples whose mask is 0.

    Yields:
      image uint8 [batch_size, H, W, C], label int32 [batch_size], mask float32 [batch_size].
    """

    def made() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(examples), batch_size):
            index = np.arange(start, start + batch_size)
            mask = (index < len(examples)).astype(np.float32)
            yield examples[np.minimum(index, len(examples) - 1)] | {"mask": mask}

    return _ahead(examples, made())


def _ahead(examples: Examples, batches: Iterator[dict]) -> Iterator[dict]:
    """Batches that must be read and decoded are prepared while the one before is computed."""
    return batches if isinstance(examples, InMemory) else look_ahead(batches)


def normalise(image: jax.Array, data: DataConfig) -> jax.Array:
    """uint8 [N, H, W, C] in [0, 255] -> float32, in [0, 1] before mean and std are applied."""
    image = image.astype(jnp.float32) / 255
    if data.mean == (0.0,) and data.std == (1.0,):
        return image
    return (image - jnp.array(data.mean, jnp.float32)) / jnp.array(data.std, jnp.float32)


def augment(key: jax.Array, image: jax.Array, index: jax.Array, data: DataConfig) -> jax.Array:
    """Mirrors and crops each image at random as `data` asks; the shape stays [N, H, W, C].

    Args:
      key: the step's key; an example's own is derived from it and its index.
      image: [N, H, W, C] of any type.
      index: int32 [N], the examples' places in the dataset.
      data: `flip` and `crop_padding`.
    """
    if not data.flip and not data.crop_padding:
        return image
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k, x: _augment_one(k, x, data.flip, data.crop_padding))(keys, image)


def alternate_flip(
    key: jax.Array, image: jax.Array, index: jax.Array, epoch: jax.Array
) -> jax.Array:
    """Mirrors half of the images in even epochs, at random, and the other half in odd ones.

    Flips drawn anew each epoch show a quarter of the images the same way three times in a row; these
    show each image both ways in any two epochs (arXiv 2404.00498).

    Args:
      key: the run's key, the same in every epoch.
      image: [N, H, W, C] of any type.
      index: int32 [N], the examples' places in the dataset.
      epoch: int32 [N], counted from 0.
    """
    first = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(index)
    mirrored = first ^ (epoch % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)


def test_views(image: jax.Array, augmentation: str) -> tuple[jax.Array, tuple[float, ...]]:
    """The views of images [N, H, W, C] that `test_time_augmentation` asks for, and their weights.

    Returns:
      [V, N, H, W, C], of which the first are the images themselves, and V weights whose sum is 1.
    """
    views, weights = [image], (1.0,)
    if augmentation == "mirror_shift":
        border = ((0, 0), (1, 1), (1, 1), (0, 0))
        padded = jnp.pad(image, border, mode="reflect")
        views += [padded[:, :-2, :-2], padded[:, 2:, 2:]]
        weights = (0.5, 0.25, 0.25)
    if augmentation != "none":
        views += [view[:, :, ::-1] for view in views]
        weights = tuple(weight / 2 for weight in weights) * 2
    return jnp.stack(views), weights


def _augment_one(key: jax.Array, image: jax.Array, flip: bool, padding: int) -> jax.Array:
    flip_key, row_key, column_key = jax.random.split(key, 3)
    if flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if padding:
        border = ((padding, padding), (padding, padding), (0, 0))
        row = jax.random.randint(row_key, (), 0, 2 * padding + 1)
        column = jax.random.randint(column_key, (), 0, 2 * padding + 1)
        padded = jnp.pad(image, border, mode="reflect")
        image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
    return image
