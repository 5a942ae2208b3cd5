"""Kernels and the confusion matrix as images, with NumPy alone.

TensorBoard gets them while a run trains, where importing a plotting library would cost a second;
the report draws its kernels and feature maps with the same functions.
"""

import numpy as np

# Colours, RGB, at equal distances: told apart with any colour vision, and in grey by their lightness.
DIVERGING = ((12, 84, 140), (120, 178, 214), (246, 246, 244), (236, 160, 102), (168, 66, 0))
SEQUENTIAL = ((0, 32, 77), (65, 77, 107), (124, 123, 120), (187, 174, 108), (255, 234, 70))
PAPER = ((246, 248, 250), (140, 186, 219), (0, 90, 148), (0, 40, 82))

MOST_KERNELS = 64


def colour(values: np.ndarray, anchors: tuple) -> np.ndarray:
    """Values in [0, 1], of any shape, as uint8 [..., 3]: between the colours of `anchors`."""
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, places, levels) for levels in zip(*anchors, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def tiles(images: np.ndarray, columns: int, side: int) -> np.ndarray:
    """Images in rows of `columns`, scaled without smoothing, with transparent gaps between them.

    Args:
      images: uint8 [N, h, w, 3].
      columns: how many there are in a row; what is left of the last row stays transparent.
      side: to which the longer side of each is scaled, in pixels.

    Returns:
      uint8 [H, W, 4], red, green, blue and opacity.
    """
    count, *size = images.shape[:3]
    height, width = (max(1, side * length // max(size)) for length in size)
    images = images[:, np.arange(height) * size[0] // height]
    images = images[:, :, np.arange(width) * size[1] // width]
    rows, gap = -(-count // columns), max(1, side // 16)
    picture = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width, :3] = image
        picture[top : top + height, left : left + width, 3] = 255
    return picture


def draw_kernels(kernel: np.ndarray, side: int = 48) -> np.ndarray:
    """The first filters of a kernel [h, w, C, filters], a tile of `side` pixels each: uint8 [H, W, 4].

    Three channels are shown as red, green and blue around grey, one (or the mean of several) from
    blue, negative, over white to orange, positive.
    """
    shown = np.moveaxis(kernel[..., :MOST_KERNELS], -1, 0)  # [N, h, w, C]
    if shown.shape[-1] != 3:
        shown = shown.mean(-1)
    # A few extreme weights would leave all others pale.
    limit = np.quantile(np.abs(shown), 0.995) or 1.0
    scaled = np.clip(shown / limit, -1, 1) / 2 + 0.5
    images = colour(scaled, DIVERGING) if scaled.ndim == 3 else (scaled * 255).astype(np.uint8)
    return tiles(images, min(8, len(images)), side)


def draw_confusion(confusion: np.ndarray) -> np.ndarray:
    """Counts [classes, classes], rows by label, as the share of each row: uint8 [H, W, 3]."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    zoom = max(1, 320 // len(confusion))
    return colour(share, PAPER).repeat(zoom, 0).repeat(zoom, 1)
