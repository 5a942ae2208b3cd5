"""Test images made harder: corruptions as in CIFAR-10-C, shifts and rotations.

The kinds are those of Hendrycks and Dietterich (2019) that can be stated in a line. The formulas and
strengths are our own, so the numbers cannot be compared with the published ones. Lengths are shares of
the image's height, so that a strength means the same for every size.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
import scipy.ndimage
from PIL import Image

from cnn_jax.data.examples import Altered

STRENGTHS = (1, 2, 3, 4, 5)
SHIFTS = (-8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8)
ROTATIONS = (-45, -30, -20, -10, 0, 10, 20, 30, 45)


@dataclasses.dataclass(frozen=True)
class Changed(Altered):
    """Examples whose images are changed when they are read.

    Attributes:
      kind: of the change, a key of CORRUPTIONS, "shift" or "rotation".
      amount: its strength, pixels to the right, or degrees.
    """

    kind: str
    amount: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.examples.class_names

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.examples[indices]
        # An example's noise depends on its index, not on the size of the batches.
        image = [
            change(one, self.kind, self.amount, int(i))
            for one, i in zip(batch["image"], indices, strict=True)
        ]
        return batch | {"image": np.stack(image)}


def change(image: np.ndarray, kind: str, amount: int, seed: int = 0) -> np.ndarray:
    """One image, uint8 [H, W, C], changed; its noise is a function of `seed`."""
    if kind == "shift":
        return _moved(image, scipy.ndimage.shift, (0, amount, 0), order=0)
    if kind == "rotation":
        options = {"axes": (1, 0), "reshape": False, "order": 1}
        return _moved(image, scipy.ndimage.rotate, amount, **options)
    function, strengths = CORRUPTIONS[kind]
    random = np.random.default_rng([amount, seed])
    changed = function(image / 255, strengths[amount - 1], random)
    return (np.clip(changed, 0, 1) * 255).round().astype(np.uint8)


def _moved(image: np.ndarray, move: Callable, amount: object, **options: object) -> np.ndarray:
    """Moves the image; what comes in from outside has the median of its border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    moved = np.stack(
        [
            move(channel[..., None] * 1.0, amount, cval=outside, **options)[..., 0]
            for channel, outside in zip(
                np.moveaxis(image, -1, 0), np.median(border, 0), strict=True
            )
        ],
        -1,
    )
    return moved.round().astype(np.uint8)


def _gaussian_noise(image: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    return image + random.normal(0, deviation, image.shape)


def _shot_noise(image: np.ndarray, photons: float, random: np.random.Generator) -> np.ndarray:
    return random.poisson(image * photons) / photons


def _impulse_noise(image: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    hit = random.random(image.shape) < share
    return np.where(hit, random.integers(0, 2, image.shape), image)


def _gaussian_blur(image: np.ndarray, width: float, _: np.random.Generator) -> np.ndarray:
    sigma = width * len(image)
    return scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _motion_blur(image: np.ndarray, length: float, _: np.random.Generator) -> np.ndarray:
    pixels = max(2, round(length * len(image)))
    return scipy.ndimage.uniform_filter1d(image, pixels, axis=1, mode="nearest")


def _fog(image: np.ndarray, amount: float, random: np.random.Generator) -> np.ndarray:
    # Noise of a wide blur, as clouds are, laid over the image in white.
    height, width, _ = image.shape
    cloud = scipy.ndimage.gaussian_filter(random.random((height, width)), height / 6, mode="wrap")
    cloud = (cloud - cloud.min()) / max(np.ptp(cloud), 1e-9)
    cover = amount * (0.5 + 0.5 * cloud[..., None])
    return image * (1 - cover) + cover


def _brightness(image: np.ndarray, amount: float, _: np.random.Generator) -> np.ndarray:
    return image + amount


def _contrast(image: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * factor + mean


def _pixelate(image: np.ndarray, share: float, _: np.random.Generator) -> np.ndarray:
    height, width, _channels = image.shape
    small = max(1, round(height * share)), max(1, round(width * share))
    rows, columns = (np.arange(n) * s // n for n, s in zip((height, width), small, strict=True))
    sums, counts = np.zeros((*small, image.shape[2])), np.zeros((*small, 1))
    place = np.ix_(rows, columns)
    np.add.at(sums, place, image)
    np.add.at(counts, place, 1)
    return (sums / counts)[place]


def _jpeg(image: np.ndarray, quality: int, _: np.random.Generator) -> np.ndarray:
    pixels = (image * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(
        file, "JPEG", quality=quality
    )
    decoded = np.asarray(Image.open(file))
    return decoded.reshape(image.shape) / 255


# The function, and its second argument at each of the STRENGTHS.
CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),  # standard deviation
    "shot_noise": (_shot_noise, (100, 50, 25, 12, 5)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.1, 0.17)),  # share of the values
    "gaussian_blur": (_gaussian_blur, (0.015, 0.025, 0.035, 0.05, 0.07)),  # standard deviation
    "motion_blur": (_motion_blur, (0.08, 0.12, 0.16, 0.22, 0.3)),  # length
    "fog": (_fog, (0.15, 0.3, 0.45, 0.6, 0.75)),  # cover where the cloud is thickest
    "brightness": (_brightness, (0.08, 0.16, 0.24, 0.32, 0.4)),  # added
    "contrast": (_contrast, (0.75, 0.5, 0.35, 0.2, 0.1)),  # factor
    "pixelate": (_pixelate, (0.9, 0.7, 0.5, 0.35, 0.25)),  # share of the height that is left
    "jpeg": (_jpeg, (60, 35, 20, 12, 7)),  # quality
}


def of_kind(corruptions: bool, shifts: bool) -> list[tuple[str, int]]:
    """The changes that are asked for: (kind, amount)."""
    found = [(kind, n) for kind in CORRUPTIONS for n in STRENGTHS] if corruptions else []
    if shifts:
        found += [("shift", n) for n in SHIFTS if n] + [("rotation", n) for n in ROTATIONS if n]
    return found
