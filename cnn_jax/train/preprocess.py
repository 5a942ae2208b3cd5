"""Scaling, augmentation and test views of a batch, on the device.

The augmentation of an example is a pure function of (seed, step, its index): it depends neither on the
number of devices nor on where a run was resumed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.config import Config, DataConfig
from cnn_jax.config.validate import check_init_examples
from cnn_jax.data.examples import Examples


def normalise(image: Any, data: DataConfig) -> Any:
    """uint8 [N, H, W, C] in [0, 255] -> float32, in [0, 1] before mean and std are applied.

    Both may be arrays of JAX or of NumPy.
    """
    image = image.astype(jnp.float32) / 255
    if data.mean == (0.0,) and data.std == (1.0,):
        return image
    return (image - jnp.array(data.mean, jnp.float32)) / jnp.array(data.std, jnp.float32)


def first_images(config: Config, examples: Examples) -> list[jax.Array]:
    """The images for the model's initialisation: [] or one float32 [init_examples, H, W, C].

    Raises:
      ConfigError: the model's first parameters do not depend on images.
    """
    count = min(config.init_examples, len(examples))
    if not count:
        return []
    check_init_examples(config, examples.image_shape)
    return [normalise(examples[np.arange(count)]["image"], config.data)]


def augment(key: jax.Array, image: jax.Array, index: jax.Array, data: DataConfig) -> jax.Array:
    """Mirrors and crops each image at random as `data` says; the shape stays [N, H, W, C].

    Args:
      key: the step's key; each example's key is derived from it and the example's index.
      image: [N, H, W, C] of any type.
      index: int32 [N], the examples' positions in the dataset.
      data: `flip` and `crop_padding`.
    """
    if not data.flip and not data.crop_padding:
        return image
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k, x: _augment_one(k, x, data.flip, data.crop_padding))(keys, image)


def alternate_flip(
    key: jax.Array, image: jax.Array, index: jax.Array, epoch: jax.Array
) -> jax.Array:
    """Mirrors a random half of the images in even epochs, and the other half in odd epochs.

    Independent flips show a quarter of the images the same way in three epochs in a row.
    Alternating flips show each image both ways in any two epochs in a row (arXiv 2404.00498).

    Args:
      key: the run's key, the same in every epoch.
      image: [N, H, W, C] of any type.
      index: int32 [N], the examples' positions in the dataset.
      epoch: int32 [N], counted from 0.
    """
    first = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(index)
    mirrored = first ^ (epoch % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)


def test_views(image: jax.Array, augmentation: str) -> tuple[jax.Array, tuple[float, ...]]:
    """The views of images [N, H, W, C] that `test_time_augmentation` asks for, and their weights.

    Returns:
      [V, N, H, W, C], where the first view is the unchanged images, and V weights whose sum is 1.
    """
    views = [image]
    weights: tuple[float, ...] = (1.0,)
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
