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
from collections.abc import Callable
from typing import Any

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
    changes: list[tuple[Any, Callable]] = [
        (data.rotation, functools.partial(_rotate, degrees=data.rotation)),
        (data.trivial_augment, _trivial_augment),
        (data.colour_jitter, functools.partial(_jitter, strength=data.colour_jitter)),
        (data.erasing, functools.partial(_erase, probability=data.erasing)),
    ]
    for number, (wanted, change) in enumerate(changes):
        if wanted:
            keys = _keys(key, number, batch["index"])
            image = jax.vmap(change)(keys, image.astype(jnp.float32))
    batch = batch | {"image": normalise(image, data)}
    if data.mixup or data.cutmix:
        batch |= _mixed(_keys(key, len(changes), batch["index"]), batch, data, axis_name)
    return batch


def _keys(key: jax.Array, number: int, index: jax.Array) -> jax.Array:
    """A key for each example, for the augmentation of this number."""
    key = jax.random.fold_in(key, number)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _mixed(keys: jax.Array, batch: Batch, data: DataConfig, axis_name: str | None) -> Batch:
    """Each image mixed with the one before it in the whole batch, and their labels and shares."""
    image, label = batch["image"], batch["label"]
    weight = jax.vmap(functools.partial(_weights, data=data))(keys, image)
    share = weight.mean((1, 2, 3))
    image = weight * image + (1 - weight) * _previous(image, axis_name)
    others = _previous(label, axis_name)
    larger = share >= 0.5
    return {
        "image": image,
        "label": jnp.where(larger, label, others),
        "other_label": jnp.where(larger, others, label),
        "label_share": jnp.maximum(share, 1 - share),
    }


def _weights(key: jax.Array, image: jax.Array, data: DataConfig) -> jax.Array:
    """The weight of each pixel of an image that is mixed with another: float32 [H, W, 1].

    With both alphas, either kind of mixing has a chance of one half.
    """
    share_key, place_key = jax.random.split(key)
    row, column, chance = jax.random.uniform(place_key, (3,))
    cut = (chance < 0.5) if data.mixup and data.cutmix else bool(data.cutmix)
    alpha = jnp.where(cut, data.cutmix, data.mixup)
    share = jax.random.beta(share_key, alpha, alpha)
    height, width, _ = image.shape
    rows, columns = (jnp.floor(side * jnp.sqrt(1 - share)) for side in (height, width))
    top = jnp.floor(row * height) - rows // 2
    left = jnp.floor(column * width) - columns // 2
    box = _box(image, top, left, top + rows, left + columns)
    return jnp.where(cut, 1.0 - box, jnp.full_like(box, share, jnp.float32))


def _previous(array: jax.Array, axis_name: str | None) -> jax.Array:
    """The example before each in the batch, before the first one the last; under pmap as under jit."""
    if axis_name is None:
        return jnp.roll(array, 1, axis=0)
    count = jax.lax.axis_size(axis_name)
    ring = [(device, (device + 1) % count) for device in range(count)]
    return jnp.concatenate([jax.lax.ppermute(array[-1:], axis_name, ring), array[:-1]])


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


def _trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """One of fourteen changes at one of 31 strengths, each as likely as the others."""
    kind_key, level_key, sign_key = jax.random.split(key, 3)
    kind = jax.random.randint(kind_key, (), 0, 14)
    level = jax.random.randint(level_key, (), 0, 31) / 30
    return _trivially_changed(image, kind, level, jax.random.rademacher(sign_key, (), jnp.float32))


def _trivially_changed(
    image: jax.Array, kind: jax.Array, level: jax.Array, sign: jax.Array
) -> jax.Array:
    """Change number `kind`, 0 to 13, at strength `level`, 0 to 1, in the direction `sign`."""
    # The vmap over a batch computes all kinds, so the first five share one interpolation.
    shear_x, shear_y, x, y, angle = (
        jnp.where(kind == number, sign * level * largest, 0)
        for number, largest in enumerate((0.99, 0.99, 32, 32, math.radians(135)))
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    image = _warped(image, ((cos, sin + shear_y), (shear_x - sin, cos)), (y, x))
    factor, grey = 1 + sign * level * 0.99, _grey(image)
    changes = [
        lambda: image,
        lambda: _blended(image, 0, factor),  # brightness
        lambda: _blended(image, grey, factor),  # saturation
        lambda: _blended(image, grey.mean(), factor),  # contrast
        lambda: _blended(image, _smoothed(image), factor),  # sharpness
        lambda: _posterised(image, jnp.round(6 * level)),
        lambda: jnp.where(image >= 255 * (1 - level), 255 - image, image),  # solarisation
        lambda: _stretched(image),
        lambda: jax.vmap(_equalised, in_axes=-1, out_axes=-1)(image),
    ]
    # The last of the fourteen kinds changes nothing, as those that were done above.
    return jax.lax.switch(jnp.where(kind > 12, 0, jnp.maximum(kind - 4, 0)), changes)


def _jitter(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation, each times a factor from 1 - strength to 1 + strength."""
    factors = jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength)
    image = _blended(image, 0, factors[0])
    image = _blended(image, _grey(image).mean(), factors[1])
    return _blended(image, _grey(image), factors[2])


def _blended(image: jax.Array, other: jax.Array | int, factor: jax.Array) -> jax.Array:
    """`other` at factor 0, the image at factor 1, and beyond."""
    return jnp.clip(other + factor * (image - other), 0, 255)


def _grey(image: jax.Array) -> jax.Array:
    """The brightness of each pixel, [H, W, 1]: by ITU-R 601-2 of RGB, of others the mean."""
    if image.shape[-1] != 3:
        return image.mean(-1, keepdims=True)
    return (image * jnp.array([0.299, 0.587, 0.114])).sum(-1, keepdims=True)


def _smoothed(image: jax.Array) -> jax.Array:
    """Each pixel with its eight neighbours, weights 5 and 1; the border stays as it is."""
    height, width, _ = image.shape
    parts = [image[i : i + height - 2, j : j + width - 2] for i in range(3) for j in range(3)]
    inner = (sum(parts) + 4 * image[1:-1, 1:-1]) / 13
    return image.at[1:-1, 1:-1].set(inner)


def _posterised(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Without the lowest `bits` of the eight bits of each value."""
    step = jnp.exp2(bits)
    return jnp.floor(image / step) * step


def _stretched(image: jax.Array) -> jax.Array:
    """Each channel stretched to the range from 0 to 255; one of a single value stays."""
    low, high = image.min((0, 1)), image.max((0, 1))
    scale = 255 / jnp.where(high > low, high - low, 255)
    return jnp.where(high > low, (image - low) * scale, image)


def _equalised(channel: jax.Array) -> jax.Array:
    """A channel [H, W] whose histogram is made flat, as Pillow does it."""
    value = jnp.round(channel).astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[value].add(1)
    below = jnp.cumsum(counts) - counts
    step = (value.size - counts[value.max()]) // 255
    table = (below + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(table, 255)[value].astype(jnp.float32), channel)


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
