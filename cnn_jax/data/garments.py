"""The embedded dataset: garment silhouettes of Fashion-MNIST's ten classes, drawn by this file.

12,000 training and 2,000 test images of 28x28 gray pixels. They are prepared in seconds, without a
network and without TensorFlow. A garment can be anywhere in its image. A network that shares its
weights between positions needs to see it in one position; other networks need to see it in all.

An image depends only on its split and its index, and is the same on every machine. Therefore shapes
use only + - * / and square roots, which IEEE 754 rounds identically everywhere (it does not fix
sines, exponentials and the order of a sum). Shapes are filled with integer arithmetic, and the
random numbers come from Python's own generator.

A drawing is a list of layers, painted one over the other. x points right and y points down; the
garment spans about -1 to 1 in both. Some of the numbers differ from one garment to the next.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

SIZE = 28
EXAMPLES = {"train": 12_000, "test": 2_000}

# Corners of outlines are rounded to 1 / STEPS of a pixel. LINES horizontal lines cross each pixel,
# and the coverage of an outline is measured along them.
STEPS = 64
LINES = 4

Point = tuple[float, float]
Outline = list[Point]
# An outline to fill and its brightness: 1 is the fabric in full light, 0 the background.
Layer = tuple[Outline, float]
SHADE = 0.75
SEAM = 0.55


# ------------------------------------------------------------------------------------ outlines


def mirrored(half: Outline) -> Outline:
    """A symmetric outline from its right half, listed from top to bottom."""
    return half + [(-x, y) for x, y in reversed(half)]


def both_sides(outline: Outline, tone: float) -> list[Layer]:
    """The outline and its mirror image."""
    return [(outline, tone), ([(-x, y) for x, y in outline], tone)]


def curve(start: Point, bend: Point, end: Point, steps: int = 6) -> Outline:
    """A quadratic Bezier curve from `start` to `end` with the control point `bend`."""
    points = []
    for i in range(steps + 1):
        t = i / steps
        a, b, c = (1 - t) * (1 - t), 2 * t * (1 - t), t * t
        points.append(
            (a * start[0] + b * bend[0] + c * end[0], a * start[1] + b * bend[1] + c * end[1])
        )
    return points


def line(start: Point, end: Point, width: float) -> Outline:
    """A straight stroke."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    scale = width / (2 * math.sqrt(dx * dx + dy * dy))
    nx, ny = -dy * scale, dx * scale
    return [
        (start[0] + nx, start[1] + ny),
        (end[0] + nx, end[1] + ny),
        (end[0] - nx, end[1] - ny),
        (start[0] - nx, start[1] - ny),
    ]


def box(left: float, top: float, right: float, bottom: float) -> Outline:
    """An upright rectangle."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# ------------------------------------------------------------------------------------ garments


def draw_t_shirt(rng: random.Random) -> list[Layer]:
    """Short sleeves that point outwards, a round neck."""
    shoulder, hem, bottom = rng.uniform(0.5, 0.6), rng.uniform(0.48, 0.6), rng.uniform(0.7, 0.95)
    neck, depth = rng.uniform(0.2, 0.32), rng.uniform(0.15, 0.35)
    tip = (rng.uniform(0.85, 1.0), rng.uniform(-0.45, -0.2))
    sleeve = [(0.3, -0.85), (shoulder, -0.8), tip, (tip[0] - 0.25, tip[1] + 0.2), (0.4, -0.35)]
    return [
        *both_sides(sleeve, 0.92),
        (body(neck, depth, shoulder, hem, bottom), 1.0),
        *both_sides(line((shoulder, -0.75), (hem - 0.02, -0.2), 0.07), SHADE),
    ]


def draw_trouser(rng: random.Random) -> list[Layer]:
    """Two long legs from a waistband."""
    waist, hip, crotch = rng.uniform(0.3, 0.42), rng.uniform(0.42, 0.52), rng.uniform(-0.5, -0.25)
    ankle, spread = rng.uniform(0.18, 0.3), rng.uniform(0.08, 0.3)
    leg = [(0.0, crotch), (hip, crotch), (spread + ankle, 1.0), (spread, 1.0)]
    seat = mirrored([(0.0, -0.95), (waist, -0.95), (hip, crotch), (0.0, crotch + 0.05)])
    return [
        *both_sides(leg, 0.95),
        (seat, 1.0),
        (box(-waist - 0.02, -0.86, waist + 0.02, -0.78), SHADE),
        (line((0.0, -0.8), (0.0, crotch), 0.06), SHADE),
    ]


def draw_pullover(rng: random.Random) -> list[Layer]:
    """Long sleeves with cuffs, a small round neck with a rib, a ribbed hem."""
    shoulder, hem, bottom = rng.uniform(0.48, 0.58), rng.uniform(0.48, 0.6), rng.uniform(0.7, 0.92)
    neck, depth = rng.uniform(0.18, 0.28), rng.uniform(0.1, 0.18)
    return [
        *long_sleeves(rng, shoulder, cuff=SHADE),
        (body(neck + 0.08, 0.02, shoulder, hem, bottom), 1.0),
        (neckline(neck + 0.08, depth + 0.1), SHADE),
        (neckline(neck, depth), 0.0),
        (box(-hem, bottom - 0.16, hem, bottom), SHADE),
    ]


def draw_dress(rng: random.Random) -> list[Layer]:
    """A bodice on two straps, a waist, a flared skirt."""
    bust, waist = rng.uniform(0.3, 0.4), rng.uniform(0.2, 0.3)
    belt, hem = rng.uniform(-0.3, -0.05), rng.uniform(0.45, 0.8)
    strap = rng.uniform(0.15, 0.28)
    skirt = [(waist, belt), *curve((waist, belt), (waist + 0.1, 0.4), (hem, 1.0))]
    bodice = [*curve((0.0, -0.5), (strap, -0.5), (strap + 0.05, -0.65)), (bust, -0.55)]
    return [
        *both_sides(line((strap, -0.55), (strap - 0.02, -1.0), 0.12), 0.95),
        (mirrored([*bodice, *skirt, (0.0, 1.0)]), 1.0),
        (box(-waist - 0.02, belt - 0.05, waist + 0.02, belt + 0.06), rng.choice([SEAM, SHADE])),
    ]


def draw_coat(rng: random.Random) -> list[Layer]:
    """Long, with long sleeves, open from the lapels to the hem."""
    shoulder, hem, bottom = rng.uniform(0.5, 0.6), rng.uniform(0.52, 0.68), rng.uniform(0.92, 1.0)
    lapel, width = rng.uniform(-0.35, -0.1), rng.uniform(0.08, 0.14)
    return [
        *long_sleeves(rng, shoulder, cuff=0.9),
        (body(0.25, 0.05, shoulder, hem, bottom), 1.0),
        (mirrored([(0.0, -0.92), (0.2, -0.95), (0.0, lapel)]), 0.35),
        *both_sides(line((0.3, -0.9), (0.04, lapel), 0.1), SHADE),
        (line((0.0, lapel), (0.0, bottom), width), rng.uniform(0.2, 0.6)),
        *both_sides(line((0.2, 0.35), (0.42, 0.3), 0.08), SHADE),
    ]


def draw_sandal(rng: random.Random) -> list[Layer]:
    """A thin sole with its toe to the left, and straps with gaps between them."""
    heel, toe = rng.uniform(0.15, 0.6), rng.uniform(0.02, 0.1)
    top = rng.uniform(-0.55, -0.25)
    ground = 0.55
    instep = ground - heel
    sole = [
        (-1.0, ground - toe - 0.12),
        *curve((-0.7, ground - 0.14), (0.0, ground - 0.2), (0.5, instep - 0.12)),
        (0.95, instep - 0.16),
        (0.95, ground),
        (0.75, ground),
        *curve((0.68, instep + 0.06), (0.1, ground), (-0.5, ground)),
        (-0.95, ground),
    ]
    strap = rng.uniform(0.1, 0.16)
    crossing = rng.uniform(-0.2, 0.1)
    return [
        (sole, 1.0),
        (line((-0.75, ground - 0.15), (crossing, top + 0.2), strap), 0.9),
        (line((crossing - 0.3, top + 0.3), (0.15, ground - 0.25), strap), 0.9),
        (line((crossing - 0.05, top + 0.2), (0.9, instep - 0.2), strap), 0.9),
        (line((0.88, instep - 0.1), (rng.uniform(0.75, 0.95), top), strap), 0.9),
    ]


def draw_shirt(rng: random.Random) -> list[Layer]:
    """A pointed collar and a row of buttons; sleeves long or half."""
    shoulder, hem, bottom = rng.uniform(0.46, 0.56), rng.uniform(0.45, 0.58), rng.uniform(0.75, 1.0)
    point, reach = rng.uniform(0.2, 0.3), rng.choice([1.0, 1.0, 0.55])
    collar = [(0.12, -1.0), (0.27, -0.97), (point + 0.06, -0.6), (0.02, -0.72)]
    layers = long_sleeves(rng, shoulder, cuff=0.85, reach=reach)
    layers.append((body(0.22, 0.02, shoulder, hem, bottom), 1.0))
    layers.append((mirrored([(0.0, -0.95), (0.15, -0.95), (0.0, -0.68)]), 0.2))
    layers += both_sides([(x * 1.25, y + 0.07) for x, y in collar], SEAM)
    layers += both_sides(collar, 1.15)
    buttons, thread = rng.randint(4, 5), rng.uniform(0.2, 0.5)
    for i in range(buttons):
        y = -0.5 + i * (bottom + 0.35) / buttons
        layers.append((box(-0.07, y, 0.07, y + 0.13), thread))
    return layers


def draw_sneaker(rng: random.Random) -> list[Layer]:
    """Low and flat with its toe to the left: a thick sole, laces, an opening for the foot."""
    tongue, back = rng.uniform(-0.55, -0.35), rng.uniform(-0.45, -0.25)
    toe, ground = rng.uniform(0.0, 0.15), 0.5
    throat = rng.uniform(0.0, 0.2)
    upper = [
        *curve((-1.0, ground), (-1.0, toe), (-0.55, toe - 0.02)),
        (throat, tongue),
        (throat + 0.15, tongue),
        *curve((throat + 0.2, tongue + 0.3), (0.7, tongue + 0.4), (0.8, back)),
        (0.95, back),
        (0.9, ground),
    ]
    layers = [
        (upper, 0.9),
        (line((-0.98, ground + 0.02), (0.97, ground + 0.02), 0.22), rng.choice([1.15, SEAM])),
    ]
    for i in range(3):
        x, y = -0.42 + 0.17 * i, toe + 0.02 - (toe - tongue) * 0.25 * i
        layers.append((line((x, y - 0.1), (x + 0.14, y + 0.16), 0.08), SEAM))
    return layers


def draw_bag(rng: random.Random) -> list[Layer]:
    """A box or a trapezoid under a handle."""
    top, bottom = rng.uniform(-0.4, 0.0), rng.uniform(0.6, 0.85)
    upper, lower = rng.uniform(0.65, 0.9), rng.uniform(0.75, 0.95)
    handle, rise = rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.9)
    thick = rng.uniform(0.12, 0.2)
    peak = top - rise
    outer = curve((-handle, top + 0.05), (0.0, 2 * peak - top), (handle, top + 0.05), steps=8)
    inner = curve(
        (handle - thick, top + 0.05),
        (0.0, 2 * (peak + thick) - top),
        (thick - handle, top + 0.05),
        steps=8,
    )
    layers = [
        (outer + inner, 0.9),
        (mirrored([(0.0, top), (upper, top), (lower, bottom), (0.0, bottom)]), 1.0),
    ]
    if rng.random() < 0.6:
        layers.append((line((-upper, top + 0.3), (upper, top + 0.3), 0.08), SEAM))
        layers.append((box(-0.1, top + 0.22, 0.1, top + 0.42), SEAM))
    return layers


def draw_ankle_boot(rng: random.Random) -> list[Layer]:
    """A shaft over the ankle, a toe to the left, and a heel."""
    shaft, front = rng.uniform(-0.95, -0.6), rng.uniform(-0.1, 0.15)
    toe, heel = rng.uniform(0.2, 0.4), rng.uniform(0.08, 0.25)
    ground = 0.8
    boot = [
        *curve((-0.95, ground - 0.1), (-1.0, toe), (-0.55, toe - 0.05)),
        *curve((-0.45, toe - 0.08), (front, toe - 0.15), (front, -0.2)),
        (front - 0.05, shaft),
        (0.75, shaft),
        (0.7, 0.2),
        (0.8, ground - heel),
        (0.75, ground + 0.1),
        (0.3, ground + 0.1),
        (0.2, ground - heel + 0.1),
        (-0.2, ground),
        (-0.9, ground),
    ]
    return [
        (boot, 0.95),
        (line((front - 0.04, shaft + 0.06), (0.74, shaft + 0.06), 0.1), SHADE),
        (line((-0.9, ground - 0.12), (0.75, ground - heel - 0.05), 0.07), SEAM),
    ]


def body(neck: float, depth: float, shoulder: float, hem: float, bottom: float) -> Outline:
    """Front of a garment for the upper body; `neck` is half the neckline's width."""
    return mirrored(
        [
            *curve((0.0, depth - 0.95), (neck, depth - 0.95), (neck, -0.95), steps=3),
            (shoulder, -0.8),
            (shoulder - 0.02, -0.3),
            (hem, bottom),
        ]
    )


def neckline(neck: float, depth: float) -> Outline:
    """The opening of a round neck, below the shoulders."""
    return mirrored(curve((neck, -1.0), (neck, depth - 0.95), (0.0, depth - 0.95), steps=4))


def long_sleeves(
    rng: random.Random, shoulder: float, cuff: float, reach: float = 1.0
) -> list[Layer]:
    """Two sleeves that hang beside the body; `cuff` is the tone of their ends."""
    x, y = rng.uniform(0.8, 1.0), rng.uniform(0.5, 0.85)
    x, y = shoulder + 0.15 + (x - shoulder - 0.15) * reach, -0.8 + (y + 0.8) * reach
    width = rng.uniform(0.2, 0.26)
    sleeve = [(shoulder - 0.2, -0.88), (shoulder + 0.08, -0.75), (x, y), (x - width, y + 0.04)]
    sleeve.append((shoulder - 0.05, -0.25))
    end = [(x - 0.03, y - 0.16), (x, y), (x - width, y + 0.04), (x - width - 0.02, y - 0.12)]
    seam = line((shoulder, -0.7), (shoulder, -0.2), 0.06)
    return both_sides(sleeve, 0.9) + both_sides(end, cuff) + both_sides(seam, SEAM)


# In the order of Fashion-MNIST's labels, under its names.
DRAWINGS: dict[str, Callable[[random.Random], list[Layer]]] = {
    "T-shirt/top": draw_t_shirt,
    "Trouser": draw_trouser,
    "Pullover": draw_pullover,
    "Dress": draw_dress,
    "Coat": draw_coat,
    "Sandal": draw_sandal,
    "Shirt": draw_shirt,
    "Sneaker": draw_sneaker,
    "Bag": draw_bag,
    "Ankle boot": draw_ankle_boot,
}
CLASS_NAMES = tuple(DRAWINGS)


# ---------------------------------------------------------------------------------- the picture


def draw_example(split: str, index: int) -> tuple[np.ndarray, int]:
    """One example: image uint8 [28, 28] and label 0 to 9.

    Raises:
      ValueError: there is no such split, or no such index in it.
    """
    if index not in range(EXAMPLES.get(split, 0)):
        raise ValueError(f"{split}/{index}: there are train/0 to train/11999, test/0 to test/1999")
    rng = random.Random(f"garments/{split}/{index}")
    label = index % len(CLASS_NAMES)
    layers = DRAWINGS[CLASS_NAMES[label]](rng)
    fabric = weave(rng, paint(place(rng, layers)))
    return photograph(rng, fabric), label


def place(rng: random.Random, layers: list[Layer]) -> list[Layer]:
    """Rotates and scales a drawing to pixels, and shifts it to any place where it fits."""
    t = rng.uniform(-0.2, 0.2)
    # Cosine and sine of an angle up to 23 degrees; t is the tangent of half the angle.
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    width, height = rng.uniform(7.2, 10.0), rng.uniform(7.2, 10.0)

    def turn(x: float, y: float) -> Point:
        x, y = x * width, y * height
        return cosine * x - sine * y, sine * x + cosine * y

    layers = [([turn(*point) for point in outline], tone) for outline, tone in layers]
    xs, ys = zip(*[point for outline, _ in layers for point in outline], strict=True)
    dx = rng.uniform(0.5 - min(xs), SIZE - 0.5 - max(xs))
    dy = rng.uniform(0.5 - min(ys), SIZE - 0.5 - max(ys))
    return [([(x + dx, y + dy) for x, y in outline], tone) for outline, tone in layers]


def paint(layers: list[Layer]) -> np.ndarray:
    """Brightness of the fabric, float64 [28, 28], from layers in pixels."""
    canvas = np.zeros((SIZE, SIZE))
    outlines, tones = zip(*layers, strict=True)
    for tone, coverage in zip(tones, fill(outlines), strict=True):
        canvas += (tone - canvas) * coverage
    return canvas


def fill(outlines: Sequence[Outline]) -> np.ndarray:
    """How much of each pixel each outline covers: float64 [outlines, 28, 28], 0 to 1.

    The outlines, in pixels, must lie inside the image and not cross themselves.
    """
    starts = [point for outline in outlines for point in outline]
    ends = [point for outline in outlines for point in outline[1:] + outline[:1]]
    x, y = np.rint(np.array(starts).T * STEPS).astype(np.int64)
    end_x, end_y = np.rint(np.array(ends).T * STEPS).astype(np.int64)
    layer = np.repeat(np.arange(len(outlines)), [len(outline) for outline in outlines])

    # Find where edges cross the lines. An edge includes only its upper end. So a corner on a line
    # counts once if the outline crosses the line there, and twice or never if it turns back.
    line_y = np.arange(SIZE * LINES) * (STEPS // LINES) + STEPS // LINES // 2
    k, edge = np.nonzero((y <= line_y[:, None]) != (end_y <= line_y[:, None]))
    x, y, end_x, end_y, layer = (values[edge] for values in (x, y, end_x, end_y, layer))
    crossing = x + (line_y[k] - y) * (end_x - x) // (end_y - y)

    # A line enters or leaves the outline at each crossing; the edge's direction, up or down, says
    # which. A crossing changes the coverage of its pixel by the part to its right, and of all later
    # pixels by a whole one. These changes are stored as differences and summed along the rows.
    column, rest = crossing // STEPS, crossing % STEPS
    sign = np.where(end_y > y, 1, -1)
    shape = (len(outlines), SIZE, SIZE + 2)
    pixel = (layer * SIZE + k // LINES) * (SIZE + 2) + column
    change = np.bincount(pixel, sign * (STEPS - rest), minlength=math.prod(shape))
    change += np.bincount(pixel + 1, sign * rest, minlength=math.prod(shape))
    covered = np.abs(change.reshape(shape).cumsum(axis=2))
    return covered[:, :, :SIZE] / (STEPS * LINES)


def weave(rng: random.Random, fabric: np.ndarray) -> np.ndarray:
    """Puts stripes of any direction on a third of the garments."""
    if rng.random() > 1 / 3:
        return fabric
    strength, period, start = rng.uniform(0.25, 0.6), rng.uniform(2.5, 6.0), rng.random()
    across, down = rng.uniform(-1, 1), rng.uniform(-1, 1)
    scale = 1 / (period * math.sqrt(across * across + down * down))
    column, row = np.arange(SIZE), np.arange(SIZE)[:, None]
    stripes = np.abs(2 * ((across * column + down * row) * scale + start) % 2 - 1)
    return fabric * (1 - strength * stripes)


def photograph(rng: random.Random, fabric: np.ndarray) -> np.ndarray:
    """The image, uint8 [28, 28]: light from one side, a background, noise."""
    background, contrast = rng.uniform(5, 50), rng.uniform(75, 180)
    across, down = rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)
    ramp = (np.arange(SIZE) - (SIZE - 1) / 2) / (SIZE / 2)
    light = 1 + across * ramp + down * ramp[:, None]
    # The sum of four random bytes is nearly normal: mean 510, standard deviation 147.8.
    drawn = np.frombuffer(rng.randbytes(4 * SIZE * SIZE), np.uint8).reshape(4, SIZE, SIZE)
    noise = (drawn.sum(0, dtype=np.int64) - 510) / 147.8
    image = background + contrast * light * fabric + rng.uniform(4, 18) * noise
    return np.rint(image.clip(0, 255)).astype(np.uint8)


# ------------------------------------------------------------------------------------- TFDS


# TFDS has no types that would tell the checker of this argument.
class Garments(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The TFDS dataset `garments`: image uint8 [28, 28, 1] and label 0 to 9, as `fashion_mnist`.

    `Garments(data_dir=..., file_format="array_record").download_and_prepare()` writes it to a
    temporary folder and renames that when it is complete. If two processes do so at once, the
    slower one fails with a FileExistsError and does not change the other's files.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "The first drawings."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(SIZE, SIZE, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Garment silhouettes of Fashion-MNIST's ten classes, drawn by a program.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(EXAMPLES[split]):
            image, label = draw_example(split, index)
            # A Pillow image, because TFDS would import TensorFlow to encode an array. The labels
            # need no shuffle: TFDS sorts the examples by the hashes of their indices.
            yield index, {"image": Image.fromarray(image), "label": label}
