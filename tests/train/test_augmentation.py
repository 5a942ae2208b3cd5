"""Every augmentation against Pillow, SciPy or NumPy, and the same on every device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cnn_jax.config import Config, DataConfig
from cnn_jax.train import augmentation, parallel
from cnn_jax.train.step import training_loss
from tests.networks import Linear
from tests.quick import quick_jit, unoptimised

DATA = DataConfig("tiny")
COUNT = 64


def make_batch(shape=(14, 15, 3), low=0, high=256):
    random = np.random.default_rng(3)
    image = random.integers(low, high, (COUNT, *shape), dtype=np.uint8)
    return {
        "image": image,
        "label": random.integers(0, 10, COUNT).astype(np.int32),
        "index": random.permutation(500)[:COUNT].astype(np.int32),
        "epoch": np.zeros(COUNT, np.int32),
    }


def function(**fields):
    data = dataclasses.replace(DATA, **fields)
    run_key, key = jax.random.key(1), jax.random.key(2)

    def augmented(batch, axis_name=None):
        return augmentation.augmented(run_key, key, batch, data, axis_name)

    return augmented


def augmented(batch, **fields):
    """The batch as the model sees it, its pixels in [0, 255]."""
    found = jax.tree.map(np.asarray, dict(quick_jit(function(**fields))(batch)))
    assert found["image"].dtype == np.float32
    assert found["image"].shape == batch["image"].shape
    return found | {"image": found["image"] * 255}


# ------------------------------------------------------------------------------ TrivialAugment


def moved(image, matrix, shift=(0, 0)):
    """SciPy's affine transformation about the centre, of every channel."""
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - np.array(matrix) @ centre + shift
    options = {"matrix": matrix, "offset": offset, "order": 1, "mode": "mirror"}
    channels = np.moveaxis(image.astype(np.float64), -1, 0)
    return np.stack([scipy.ndimage.affine_transform(c, **options) for c in channels], -1)


def turned(image, degrees):
    options = {"axes": (0, 1), "reshape": False, "order": 1, "mode": "mirror"}
    return scipy.ndimage.rotate(image.astype(np.float64), degrees, **options)


def by_pillow(change):
    def changed(image, level):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return np.asarray(change(picture, level), np.float64).reshape(image.shape)

    return changed


def enhanced(kind):
    return by_pillow(lambda picture, level: kind(picture).enhance(1 + 0.99 * level))


# By number: the name, the reference at a level from -1 to 1, the largest difference in grey levels:
# Pillow rounds at each stage, to the nearest or down.
KINDS = [
    ("shear x", lambda image, level: moved(image, [[1, 0], [0.99 * level, 1]]), 0.01),
    ("shear y", lambda image, level: moved(image, [[1, 0.99 * level], [0, 1]]), 0.01),
    ("translate x", lambda image, level: moved(image, np.eye(2), (0, 32 * level)), 0.01),
    ("translate y", lambda image, level: moved(image, np.eye(2), (32 * level, 0)), 0.01),
    ("rotate", lambda image, level: turned(image, 135 * level), 0.01),
    ("brightness", enhanced(ImageEnhance.Brightness), 1),
    ("saturation", enhanced(ImageEnhance.Color), 2),
    ("contrast", enhanced(ImageEnhance.Contrast), 2),
    ("sharpness", enhanced(ImageEnhance.Sharpness), 2),
    (
        "posterise",
        by_pillow(lambda picture, level: ImageOps.posterize(picture, 8 - round(6 * abs(level)))),
        0,
    ),
    (
        "solarise",
        by_pillow(lambda picture, level: ImageOps.solarize(picture, 255 * (1 - abs(level)))),
        0,
    ),
    ("autocontrast", by_pillow(lambda picture, level: ImageOps.autocontrast(picture)), 1),
    ("equalise", by_pillow(lambda picture, level: ImageOps.equalize(picture)), 0),
    ("identity", lambda image, level: image, 0),
]


def photograph(channels):
    """Smooth, with few of the 256 values, as Pillow equalises no image of equally many of each."""
    noise = np.random.default_rng(4).integers(20, 200, (40, 36, channels), dtype=np.uint8)
    parts = [Image.fromarray(noise[..., c]).filter(ImageFilter.BLUR) for c in range(channels)]
    return np.stack([np.asarray(part) for part in parts], -1)


@pytest.fixture(scope="module")
def trivially_changed():
    return {channels: quick_jit(augmentation._trivially_changed) for channels in (1, 3)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind[0] for kind in KINDS])
def test_the_kinds_of_trivial_augment(trivially_changed, number, channels):
    name, reference, tolerance = KINDS[number]
    image = photograph(channels)
    for level in (-1, -0.3, 0.0, 0.5, 1):
        run = trivially_changed[channels]
        found = run(image.astype(np.float32), number, np.float32(abs(level)), np.sign(level))
        grey = name == "saturation" and channels == 1
        expected = image if grey else reference(image, level)
        np.testing.assert_allclose(found, expected, atol=tolerance + 1e-3, err_msg=f"{level}")


def test_trivial_augment_draws_every_kind_alike():
    image = np.tile(photograph(3)[:12, :12], (COUNT * 8, 1, 1, 1))
    keys = jax.random.split(jax.random.key(0), len(image))
    run = quick_jit(jax.vmap(augmentation._trivial_augment))
    drawn = run(keys, image.astype(np.float32))
    same = np.isclose(drawn, image, atol=1e-3).all((1, 2, 3)).mean()
    assert 1 / 14 < same < 4 / 14  # identity, and strengths that change nothing
    assert len({one.tobytes() for one in np.asarray(drawn)}) > 150


# ---------------------------------------------------------------- rotation, colour and erasing


def test_rotation_is_scipys_by_angles_up_to_the_given_one():
    row = np.arange(15)[:, None, None] - 7.0
    ramp = np.broadcast_to(127 + 8 * row, (15, 15, 3)).astype(np.uint8)
    batch = make_batch((15, 15, 3)) | {"image": np.tile(ramp, (COUNT, 1, 1, 1))}
    found = augmented(batch, rotation=40.0)["image"]
    # The interpolation of a plane is exact, and the centre is far from the border.
    slopes = found[:, 7, 8, 0] - found[:, 7, 6, 0], found[:, 8, 7, 0] - found[:, 6, 7, 0]
    angles = np.rad2deg(np.arctan2(*slopes))
    assert -40 <= angles.min() < -25 < 25 < angles.max() <= 40
    for image, angle in zip(found[:8], angles, strict=False):
        np.testing.assert_allclose(image, turned(ramp, angle), atol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_is_pillows_by_three_factors(channels):
    batch = make_batch((14, 15, channels), 90, 130)
    found = augmented(batch, colour_jitter=0.3)["image"]
    weights = [0.299, 0.587, 0.114] if channels == 3 else [1.0]
    factors = []
    for before, after in zip(batch["image"].astype(np.float64), found, strict=True):
        grey = [image @ weights for image in (before, after)]
        brightness = grey[1].mean() / grey[0].mean()
        contrast = grey[1].std() / grey[0].std() / brightness
        pairs = zip((before, after), grey, strict=True)
        colour = [np.std(image - g[..., None]) for image, g in pairs]
        saturation = colour[1] / colour[0] / brightness / contrast if channels == 3 else 1.0
        factors.append((brightness, contrast, saturation))
        picture = Image.fromarray(before.astype(np.uint8).squeeze())
        for kind, factor in zip(("Brightness", "Contrast", "Color"), factors[-1], strict=True):
            picture = getattr(ImageEnhance, kind)(picture).enhance(factor)
        expected = np.asarray(picture, np.float64).reshape(after.shape)
        np.testing.assert_allclose(after, expected, atol=4)  # it rounds down, three times
    drawn = np.array(factors)[:, : 3 if channels == 3 else 2]
    low, high = drawn.min(0), drawn.max(0)
    assert ((low > 0.699) & (low < 0.76)).all()
    assert ((high < 1.301) & (high > 1.24)).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(drawn.shape[1])).max() < 0.4


def rectangle(inside):
    """The height and width of the rectangle of true pixels; fails if they are not one."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    whole = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert whole.all()
    return whole.shape


def test_erasing_fills_one_rectangle_of_some_images():
    batch = make_batch((20, 20, 3), 0, 1)
    found = augmented(batch, erasing=0.5)["image"]
    erased = (found != 0).any((1, 2, 3))
    assert 0.3 < erased.mean() < 0.7
    sizes = np.array([rectangle(image.any(-1)) for image in found[erased]])
    areas = sizes.prod(1) / 400
    assert 0.01 < areas.min() < 0.1 < 0.2 < areas.max() < 0.38
    ratios = sizes[:, 0] / sizes[:, 1]
    assert 0.25 < ratios.min() < 0.6 < 1.6 < ratios.max() < 4
    values = found[found != 0]
    assert 120 < values.mean() < 136
    assert values.max() == 255
    assert not augmented(batch, erasing=1e-9)["image"].any()


# ------------------------------------------------------------------------------------ mixing


def unmixed(batch, found):
    """For each image, whether the example itself has the larger part, and the two in that order."""
    image, label = batch["image"].astype(np.float64), batch["label"]
    before, label_before = np.roll(image, 1, 0), np.roll(label, 1)
    for i, share in enumerate(found["label_share"]):
        pairs = [(image[i], before[i]), (before[i], image[i])]
        labels = [(label[i], label_before[i]), (label_before[i], label[i])]
        yield i, float(share), pairs, labels


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_averages_images_with_the_ones_before_them(alpha):
    batch = make_batch()
    found = augmented(batch, mixup=alpha)
    turns = []
    for i, share, pairs, labels in unmixed(batch, found):
        errors = [np.abs(share * a + (1 - share) * b - found["image"][i]).max() for a, b in pairs]
        turns.append(np.argmin(errors))
        assert min(errors) < 0.01
        assert (found["label"][i], found["other_label"][i]) == labels[turns[-1]]
    # The larger of Beta(alpha, alpha) and its rest: E|x - 1/2| by its density.
    grid = (np.arange(100_000) + 0.5) / 100_000
    density = (grid * (1 - grid)) ** (alpha - 1)
    mean = (np.maximum(grid, 1 - grid) * density).sum() / density.sum()
    assert abs(found["label_share"].mean() - mean) < 0.07
    assert found["label_share"].min() >= 0.5
    assert 0.25 < np.mean(turns) < 0.75


def test_cutmix_cuts_rectangles_from_the_images_before():
    batch = make_batch((24, 24, 3))
    found = augmented(batch, cutmix=1.0)
    for i, share, _, labels in unmixed(batch, found):
        own = np.isclose(found["image"][i], batch["image"][i], atol=0.01).all(-1)
        other = np.isclose(found["image"][i], np.roll(batch["image"], 1, 0)[i], atol=0.01).all(-1)
        assert (own | other).all()
        if not own.all():
            rectangle(~own)
        turn = int(own.mean() < 0.5)
        np.testing.assert_allclose(share, max(own.mean(), 1 - own.mean()), atol=1e-5)
        if share > 0.5:
            assert (found["label"][i], found["other_label"][i]) == labels[turn]
    assert found["label_share"].min() < 0.6 < 0.95 < found["label_share"].max()


def test_with_both_half_of_the_images_are_cut():
    batch = make_batch((24, 24, 3))
    found = augmented(batch, mixup=1.0, cutmix=1.0)["image"]
    parts = [batch["image"], np.roll(batch["image"], 1, 0)]
    whole = np.any([np.isclose(found, part, atol=0.01) for part in parts], 0).mean((1, 2, 3)) > 0.9
    assert 0.3 < whole.mean() < 0.7


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, tuple(0.2 * i for i in range(10))])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_of_two_labels_with_weights(mixed, weights, smoothing):
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (20, 10)).astype(np.float32)
    label, other = random.integers(0, 10, (2, 20)).astype(np.int32)
    share = random.uniform(0.5, 1, 20).astype(np.float32) if mixed else np.ones(20)
    batch = {"label": label}
    if mixed:
        batch |= {"other_label": other, "label_share": share}
    config = Config(Linear(), DATA, class_weights=weights, label_smoothing=smoothing)
    scores = logits.astype(np.float64)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    smooth = np.eye(10) * (1 - smoothing) + smoothing / 10
    weight = np.array(weights or np.ones(10))
    target = (share * weight[label])[:, None] * smooth[label]
    target += ((1 - share) * weight[other])[:, None] * smooth[other]
    expected = -(target * log_p).sum() / 20
    loss = training_loss(logits, batch, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert loss.dtype == np.float32


# --------------------------------------------------------------------------- the same everywhere

EVERYTHING = {
    "flip": True,
    "crop_padding": 2,
    "rotation": 20.0,
    "trivial_augment": True,
    "colour_jitter": 0.4,
    "erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "mean": (0.4,),
    "std": (0.2,),
}


def test_the_same_on_four_devices_under_jit_and_pmap():
    batch, augmented = make_batch(), function(**EVERYTHING)
    expected = quick_jit(augmented)(batch)
    mesh = parallel.make_mesh(4)
    split = {k: v.reshape(4, -1, *v.shape[1:]) for k, v in batch.items()}
    with unoptimised():
        mapped = jax.pmap(functools.partial(augmented, axis_name="data"), axis_name="data")(split)
    runs = {
        "four devices": quick_jit(augmented)(parallel.shard(batch, mesh)),
        "pmap": {k: np.asarray(v).reshape(-1, *v.shape[2:]) for k, v in mapped.items()},
    }
    for name, found in runs.items():
        assert found.keys() == expected.keys()
        for part, value in found.items():
            np.testing.assert_allclose(
                value, expected[part], rtol=1e-5, atol=1e-4, err_msg=f"{name}: {part}"
            )


def test_an_example_is_changed_by_its_index_and_the_step_alone():
    fields = EVERYTHING | {"mixup": 0.0, "cutmix": 0.0}
    batch, augmented = make_batch(), quick_jit(function(**fields))
    whole = np.asarray(augmented(batch)["image"])
    order = np.random.default_rng(6).permutation(COUNT)
    turned = np.asarray(augmented({k: v[order] for k, v in batch.items()})["image"])
    np.testing.assert_array_equal(turned, whole[order])
    moved = np.asarray(augmented(batch | {"index": batch["index"] + 1})["image"])
    assert (moved != whole).any((1, 2, 3)).all()
