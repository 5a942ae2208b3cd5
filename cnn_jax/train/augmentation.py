"""Training images as the model sees them: augmented, normalised and mixed, on the device.

What happens to an example is a pure function of (seed, step, its index), and with mixing of the
example before it in the batch. It depends neither on the number of devices nor on where a run was
resumed. Every kind of augmentation has random numbers of its own, so that one more kind does not
change the others.

Sources:
  flip, crop_padding, alternating_flip: `preprocess`.
  rotation: `jax.scipy.ndimage.map_coordinates`.
  colour_jitter: the factors of torchvision's ColorJitter, the arithmetic of Pillow's ImageEnhance.
  trivial_augment: TrivialAugment, wide, of arXiv 2103.10158; what enters is mirrored, not black.
  erasing: random erasing with random pixels, arXiv 1708.04896; bounds as in torchvision.
  mixup: arXiv 1710.09412. cutmix: arXiv 1905.04899. Both draw a share for each example.

dm-pix 0.4.5 and augmax 0.4.1 have of these only rotation and colour. dm-pix interpolates between
channels too and needs chex; augmax adds to the brightness instead of scaling it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from cnn_jax.config import DataConfig
from cnn_jax.train.preprocess import alternate_flip, augment, normalise

Batch = dict[str, jax.Array]

# Folded into the step's key. No dataset is so large that it is an example's index.
_STREAM = 2**31 - 1


def augmented(
    run_key: jax.Array, key: jax.Array, batch: Batch, data: DataConfig, axis_name: str | None = None
) -> Batch:
    """The batch as the model sees it in training.

    Args:
      run_key: the run's key, for `alternating_flip`.
      key: the step's key; each example's keys are derived from it and the example's index.
      batch: image uint8 [N, H, W, C], label int32 [N], index int32 [N]; epoch int32 [N] for
        `alternating_flip`.
      data: the augmentations, mean and std.
      axis_name: the pmap axis over which the batch is split, None under jit.

    Returns:
      `batch` with image float32 [N, H, W, C], normalised. With `mixup` or `cutmix` its label is that
      of the larger part of each image, other_label int32 [N] that of the rest, and label_share
      float32 [N], from 0.5 to 1, the size of the larger part.
    """
    image = augment(key, batch["image"], batch["index"], data)
    if data.alternating_flip:
        image = alternate_flip(run_key, image, batch["index"], batch["epoch"])
    key = jax.random.fold_in(key, _STREAM)
    changes = [
        (data.rotation, functools.partial(_rotate, degrees=data.rotation)),
        (data.erasing, functools.partial(_erase, probability=data.erasing)),
    ]
    for number, (wanted, change) in enumerate(changes):
        if wanted:
            keys = _keys(key, number, batch["index"])
            image = jax.vmap(change)(keys, image.astype(jnp.float32))
    return batch | {"image": normalise(image, data)}


def _keys(key: jax.Array, number: int, index: jax.Array) -> jax.Array:
    """A key for each example, for the augmentation of this number."""
    key = jax.random.fold_in(key, number)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


# Each of the functions below takes one image float32 [H, W, C] in [0, 255] and returns another.


def _rotate(key: jax.Array, image: jax.Array, degrees: float) -> jax.Array:
    """Turned about its centre by an angle drawn from -degrees to degrees."""
    return _turned(image, jax.random.uniform(key, minval=-degrees, maxval=degrees))


def _turned(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turned counter-clockwise about its centre."""
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _warped(image, ((cos, sin), (-sin, cos)))


def _warped(image: jax.Array, matrix: tuple, shift: tuple = (0, 0)) -> jax.Array:
    """Interpolated bilinearly; beyond its border the image is continued by its mirror image.

    Args:
      image: the image.
      matrix: [2, 2]; the pixel (row, column), counted from the centre, is taken from the place
        matrix @ (row, column) + shift.
      shift: in pixels.
    """
    height, width, _ = image.shape
    centre = (height - 1) / 2, (width - 1) / 2
    row = jnp.arange(height)[:, None] - centre[0]
    column = jnp.arange(width)[None, :] - centre[1]
    # Not a matmul, which a GPU may compute with 10 bits.
    places = [
        by_row * row + by_column * column + offset + middle
        for (by_row, by_column), offset, middle in zip(matrix, shift, centre, strict=True)
    ]
    interpolate = functools.partial(map_coordinates, coordinates=places, order=1, mode="mirror")
    return jax.vmap(interpolate, in_axes=-1, out_axes=-1)(image)


def _erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """With this probability, a rectangle of 2 to 33 % of it is filled with random pixels."""
    box_key, noise_key = jax.random.split(key)
    # One call draws all five: each call takes half a second to compile.
    area, log_ratio, place_y, place_x, chance = jax.random.uniform(box_key, (5,))
    height, width, _ = image.shape
    area = (0.02 + (0.33 - 0.02) * area) * height * width
    ratio = jnp.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * log_ratio)
    rows = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, height)
    columns = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, width)
    top = jnp.floor(place_y * (height - rows + 1))
    left = jnp.floor(place_x * (width - columns + 1))
    # Four pixels of a random word, as random numbers are most of the work.
    words = jax.random.bits(noise_key, (math.ceil(image.size / 4),))
    pixels = jax.lax.bitcast_convert_type(words, jnp.uint8).ravel()[: image.size]
    noise = pixels.reshape(image.shape).astype(jnp.float32)
    inside = _box(image, top, left, top + rows, left + columns)
    return jnp.where((chance < probability) & inside, noise, image)


def _box(
    image: jax.Array, top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array
) -> jax.Array:
    """Which pixels are in the rectangle: bool [H, W, 1]."""
    row, column = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
    return ((row >= top) & (row < bottom) & (column >= left) & (column < right))[:, :, None]
