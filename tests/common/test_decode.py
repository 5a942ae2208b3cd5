"""One decoding for records and files, against what NumPy says the pixels are."""

import functools
import io
import itertools
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from cnn_jax import models
from cnn_jax.analysis import predict
from cnn_jax.analysis.predict import read_image
from cnn_jax.common import decode
from cnn_jax.common.errors import DataError
from cnn_jax.config import DataConfig
from cnn_jax.data.sources import load_examples
from tests.data.test_sources import write_pictures
from tests.quick import make_run, unoptimised
from tests.tiny import REPOSITORY, png_file

HEIGHT, WIDTH = 8, 6
SHAPES = {channels: (HEIGHT, WIDTH, channels) for channels in (1, 3, 4)}


def noise(channels: int = 0, seed: int = 0, top: int = 255) -> np.ndarray:
    shape = (HEIGHT, WIDTH, channels) if channels else (HEIGHT, WIDTH)
    return np.random.default_rng(seed).integers(0, top, shape, np.uint16, endpoint=True)


RGB, GREY, ALPHA = noise(3).astype(np.uint8), noise(0, 1).astype(np.uint8), noise(0, 2)
ALPHA = ALPHA.astype(np.uint8)
ALPHA[:, :2], ALPHA[:, 4:] = 0, 255
RGBA = np.dstack([RGB, ALPHA])
DEEP = noise(0, 3, 65535)
DEEP_RGBA = noise(4, 4, 65535)
INDEX = noise(0, 5, 3).astype(np.uint8)
COLOURS = np.array([(200, 30, 40), (20, 180, 60), (10, 50, 220), (255, 255, 0)], np.uint8)


def encode(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def decoded(encoded: bytes, channels: int) -> np.ndarray:
    picture = decode.decode(io.BytesIO(encoded), channels)
    return decode.pixels(picture, picture.height, picture.width)


def palette() -> Image.Image:
    picture = Image.fromarray(INDEX, "P")
    picture.putpalette(COLOURS.ravel().tolist())
    return picture


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def text(name: str, value: str) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(name, value) if ":" in name else chunks.add_text(name, value)
    return chunks


def by_hand(values: np.ndarray, depth: int, kind: int, **chunks) -> bytes:
    """A PNG of the values [h, w] or [h, w, C], at `depth` bits each."""
    bits = values.reshape(len(values), -1, 1).astype(">u2").view(np.uint8)
    rows = np.packbits(np.unpackbits(bits, axis=2)[..., -depth:].reshape(len(values), -1), axis=1)
    rows = np.pad(rows, ((0, 0), (1, 0)))  # no filter
    return png_file(values.shape[1], len(values), rows.tobytes(), depth, kind, **chunks)


def interlaced() -> bytes:
    """RGB in the seven passes of Adam7."""
    first = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
    passes = [*first, (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [
        row.tobytes() for y, x, down, right in passes for row in RGB[y::down, x::right] if row.size
    ]
    return png_file(WIDTH, HEIGHT, b"".join(b"\0" + row for row in rows), 8, 2, 1)


def without_marker(jpeg: bytes, marker: int) -> bytes:
    """Leaves out one segment."""
    start = jpeg.index(bytes([0xFF, marker]))
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :]


def tiff_with(encoded: bytes, tag: int, value: int) -> bytes:
    """Another value for a tag of a little-endian TIFF file: one integer of 16 or 32 bits."""
    heads = [struct.pack("<HHI", tag, kind, 1) for kind in (3, 4)]
    (start,) = (encoded.index(head) for head in heads if head in encoded)
    return encoded[: start + 8] + struct.pack("<I", value) + encoded[start + 12 :]


def twelve_bits() -> bytes:
    """A TIFF file of DEEP >> 4, two values in three bytes."""
    bits = np.unpackbits((DEEP >> 4).astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    packed = np.packbits(bits[:, 4:]).tobytes().ljust(DEEP.nbytes)
    return tiff_with(encode(Image.frombytes("I;16", (WIDTH, HEIGHT), packed), "TIFF"), 258, 12)


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(np.full_like(GREY, value)) for value in (90, 10, 250)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def opaque(colours: np.ndarray) -> np.ndarray:
    colours = np.broadcast_to(colours if colours.ndim == 3 else colours[..., None], SHAPES[3])
    return np.dstack([colours, np.full((HEIGHT, WIDTH), 255)])


def transparent(colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    found = opaque(colours)
    found[..., 3] = np.where(where, 0, 255)
    return found


def from_inks(cmyk: np.ndarray) -> np.ndarray:
    inks = cmyk.astype(float)
    return np.rint((255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255)


# What shows the stored rows upright, by the number of EXIF's orientation; and what undoes it.
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}
STORED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}

CMYK = noise(4, 6).astype(np.uint8)
INKS = Image.fromarray(CMYK, "CMYK")
FLAT_INKS = np.broadcast_to(np.array([90, 200, 20, 60], np.uint8), (HEIGHT, WIDTH, 4)).copy()
INKED_JPEG = encode(Image.fromarray(FLAT_INKS, "CMYK"), "JPEG", quality=100)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
HIGH = DEEP_RGBA >> 8
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'

# Encoded image, and its pixels as RGBA before they are laid on white.
CASES = {
    "1-bit": (encode(GREY > 99), opaque(np.where(GREY > 99, 255, 0))),
    "grey": (encode(GREY), opaque(GREY)),
    "grey, alpha": (
        encode(Image.merge("LA", [*map(Image.fromarray, (GREY, ALPHA))])),
        np.dstack([GREY, GREY, GREY, ALPHA]),
    ),
    "palette": (encode(palette()), opaque(COLOURS[INDEX])),
    "palette, one transparent": (
        encode(palette(), transparency=1),
        transparent(COLOURS[INDEX], INDEX == 1),
    ),
    "palette, alphas": (
        encode(palette(), transparency=bytes([0, 80, 255, 160])),
        np.dstack([COLOURS[INDEX], np.array([0, 80, 255, 160])[INDEX]]),
    ),
    "colour": (encode(RGB), opaque(RGB)),
    "colour, alpha": (encode(RGBA), RGBA),
    "grey, one transparent": (
        encode(GREY, transparency=int(GREY[0, 0])),
        transparent(GREY, GREY[0, 0] == GREY),
    ),
    "colour, one transparent": (
        encode(RGB, transparency=tuple(map(int, RGB[2, 3]))),
        transparent(RGB, (RGB[2, 3] == RGB).all(-1)),
    ),
    "1 bit, one transparent": (
        by_hand(INDEX > 1, 1, 0, tRNS=b"\0\1"),
        transparent(255 * (INDEX > 1), INDEX > 1),
    ),
    "2 bits, one transparent": (
        by_hand(INDEX, 2, 0, tRNS=b"\0\2"),
        transparent(INDEX * 85, INDEX == 2),
    ),
    "4 bits, one transparent": (
        by_hand(GREY >> 4, 4, 0, tRNS=b"\0\7"),
        transparent((GREY >> 4) * 17, GREY >> 4 == 7),
    ),
    "16-bit grey": (encode(DEEP), opaque(np.rint(DEEP / 257))),
    "16-bit grey, one transparent": (
        by_hand(DEEP, 16, 0, tRNS=struct.pack(">H", DEEP[1, 1])),
        transparent(np.rint(DEEP / 257), DEEP[1, 1] == DEEP),
    ),
    "16-bit grey, PGM": (encode(DEEP, "PPM"), opaque(np.rint(DEEP / 257))),
    "16-bit grey, TIFF": (encode(DEEP, "TIFF"), opaque(np.rint(DEEP / 257))),
    "16-bit grey, TIFF, packed": (
        encode(DEEP, "TIFF", compression="tiff_lzw"),
        opaque(np.rint(DEEP / 257)),
    ),
    "16-bit grey, TIFF, big-endian": (
        encode(Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()), "TIFF"),
        opaque(np.rint(DEEP / 257)),
    ),
    "16-bit grey, TIFF, white is zero": (
        tiff_with(encode(DEEP, "TIFF"), 262, 0),
        opaque(np.rint((65535 - DEEP.astype(float)) / 257)),
    ),
    "12-bit grey, TIFF": (twelve_bits(), opaque(np.rint((DEEP >> 4) / 4095 * 255))),
    "16-bit colour": (by_hand(DEEP_RGBA[..., :3], 16, 2), opaque(HIGH[..., :3])),
    "16-bit colour, alpha": (by_hand(DEEP_RGBA, 16, 6), HIGH),
    "16-bit grey, alpha": (
        by_hand(DEEP_RGBA[..., :2], 16, 4),
        HIGH[..., [0, 0, 0, 1]],
    ),
    "16-bit colour, one transparent": (
        by_hand(DEEP_RGBA[..., :3], 16, 2, tRNS=DEEP_RGBA[0, 0, :3].astype(">u2").tobytes()),
        transparent(HIGH[..., :3], (HIGH[..., :3] == HIGH[0, 0, :3]).all(-1)),
    ),
    "interlaced": (interlaced(), opaque(RGB)),
    "inks": (encode(INKS, "TIFF"), opaque(from_inks(CMYK))),
    "inks, JPEG, inverted by Adobe": (INKED_JPEG, opaque(from_inks(FLAT_INKS))),
    "inks, JPEG, without Adobe's marker": (
        without_marker(INKED_JPEG, 0xEE),
        opaque(from_inks(FLAT_INKS)),
    ),
    "colour profile": (encode(RGB, icc_profile=SRGB), opaque(RGB)),
    "gamma": (by_hand(RGB, 8, 2, gAMA=struct.pack(">I", 100_000)), opaque(RGB)),
    "damaged EXIF": (by_hand(RGB, 8, 2, eXIf=b"garbage"), opaque(RGB)),
    "orientation 9": (encode(RGB, exif=oriented(9)), opaque(RGB)),
    "orientation in XMP, WebP": (
        encode(STORED[6](RGB), "WEBP", lossless=True, xmp=XMP),
        opaque(RGB),
    ),
    "orientation in XMP, JPEG, flat": (
        encode(STORED[6](np.full_like(RGB, 77)), "JPEG", xmp=XMP),
        opaque(np.full_like(RGB, 77)),
    ),
    **{
        f"orientation in PNG's text {name}": (
            encode(STORED[6](RGB), pnginfo=text(name, value)),
            opaque(RGB),
        )
        for name, value in [
            ("XML:com.adobe.xmp", XMP.decode()),
            ("Raw profile type exif", f"\nexif\n{40:8}\n{oriented(6).hex()}\n"),
        ]
    },
    "dots per inch": (encode(RGB, dpi=(72, 72)), opaque(RGB)),
    "orientation 6 of 16-bit grey": (
        encode(STORED[6](DEEP), exif=oriented(6)),
        opaque(np.rint(DEEP / 257)),
    ),
    "orientation 8 of a cut-out": (encode(STORED[8](RGBA), exif=oriented(8)), RGBA),
    **{
        f"{kind}, {len(options)}": (encode(RGB, kind, **options), opaque(RGB))
        for kind, options in [
            *((kind, {}) for kind in ("BMP", "PPM", "TGA", "SGI", "PCX", "QOI", "JPEG2000")),
            *(("WEBP", {"lossless": True}), ("TIFF", {"compression": "tiff_lzw"})),
        ]
    },
    **{
        f"{k}, first frame": (animation(k), opaque(GREY * 0 + 90))
        for k in ("GIF", "PNG", "TIFF", "WEBP")
    },
    **{
        f"orientation {n}, {kind} {extra}": (
            encode(STORED[n](RGB), kind, exif=oriented(n), **extra),
            opaque(RGB),
        )
        for n, (kind, extra) in itertools.product(
            UPRIGHT,
            [
                ("PNG", {}),
                ("TIFF", {}),
                ("TIFF", {"compression": "tiff_lzw"}),
                ("WEBP", {"lossless": True}),
            ],
        )
    },
}


def on_white(rgba: np.ndarray, channels: int) -> np.ndarray:
    """What a model of `channels` channels gets of RGBA."""
    if channels == 4:
        return rgba
    share = rgba[..., 3:] / 255
    rgb = np.rint(rgba[..., :3] * share + 255 * (1 - share))
    return np.rint(rgb @ [0.299, 0.587, 0.114])[..., None] if channels == 1 else rgb


@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_of_the_formula(name: str, channels: int):
    encoded, rgba = CASES[name]
    found = decoded(encoded, channels)
    assert found.shape == SHAPES[channels]
    difference = np.abs(found - on_white(rgba, channels).astype(float))
    # Luma is a sum of three products; a JPEG is not exact; nor are Pillow's inks.
    assert difference.max() <= (3 if "JPEG," in name else channels == 1 or "inks" in name)


def test_sixteen_bits_of_colour_are_at_most_one_away_from_those_of_grey():
    assert np.abs(HIGH - np.rint(DEEP_RGBA / 257)).max() == 1


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("progressive", [False, True])
def test_photographs(orientation: int, progressive: bool):
    corner = np.full((28, 28), 40, np.uint8)
    corner[:8, :20] = 220  # asymmetric, so that every turn is another picture
    options = {"exif": oriented(orientation), "quality": 95, "progressive": progressive}
    found = decoded(encode(corner, "JPEG", **options), 1)[..., 0].astype(int)
    assert np.abs(found - UPRIGHT[orientation](corner)).mean() < 3


@pytest.mark.parametrize("progressive", [False, True])
def test_a_plain_jpeg_is_as_pillow_decodes_it(progressive: bool):
    encoded = encode(RGB, "JPEG", progressive=progressive)
    np.testing.assert_array_equal(decoded(encoded, 3), np.asarray(Image.open(io.BytesIO(encoded))))


# ------------------------------------------------------------------------- records and files


@functools.cache
def written_by_pillow() -> dict[str, bytes]:
    """Noise in every mode and format that Pillow writes."""
    found: dict[str, bytes] = {}
    colour = Image.fromarray(RGBA)
    sources = [
        colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "CMYK", "YCbCr", "HSV")
    ]
    sources += [
        colour,
        colour.convert("RGB").convert("LAB"),
        colour.convert("PA"),
        colour.convert("F"),
    ]
    sources += [Image.fromarray(DEEP), Image.fromarray(DEEP.astype(np.int32)), palette()]
    for kind, picture in itertools.product(sorted(Image.SAVE), sources):
        if kind not in decode.formats() or kind == "SPIDER":  # which holds floating point alone
            continue
        if picture.mode in ("F", "I") and kind in ("TIFF", "PPM"):  # refused, see below
            continue
        try:
            found[f"{kind} {picture.mode} {len(found)}"] = encode(picture, kind)
        # Not a mode of that format, or a format that Pillow is going to drop.
        except (OSError, ValueError, KeyError, DeprecationWarning):
            continue
    return found


def all_encoded() -> dict[str, bytes]:
    jpegs = {f"JPEG {n}": encode(RGB, "JPEG", exif=oriented(n)) for n in (1, 3)}
    jpegs["JPEG progressive"] = encode(RGB, "JPEG", progressive=True)
    return {name: encoded for name, (encoded, _) in CASES.items()} | jpegs | written_by_pillow()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


DATA = DataConfig("pictures", image_size=(HEIGHT, WIDTH))


@pytest.mark.parametrize("channels", SHAPES)
def test_records_are_decoded_as_files_are(folder: Path, channels: int):
    named = all_encoded()
    kinds = {name.split()[0] for name in written_by_pillow()}
    assert {"PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "PPM", "TGA"} <= kinds
    write_pictures(folder, [*named.values()], (None, None, channels))
    examples = load_examples(DATA, "train", str(folder))
    different = []
    for i, (name, encoded) in enumerate(named.items()):
        (folder / "image").write_bytes(encoded)
        image = read_image(str(folder / "image"), SHAPES[channels])
        if not np.array_equal(image, examples.image[i]):
            different.append(name)
    assert different == []


@pytest.mark.parametrize(
    ("kind", "dtype"), [("TIFF", np.float32), ("TIFF", np.int32), ("PPM", np.float32)]
)
def test_pixels_of_unknown_range_are_refused_in_both(folder: Path, kind: str, dtype: type):
    encoded = encode(DEEP.astype(dtype), kind)
    write_pictures(folder, [encoded], SHAPES[3])
    (folder / "image").write_bytes(encoded)
    with pytest.raises(DataError, match=r"image: cannot be read .pixels of mode [FI], whose black"):
        read_image(str(folder / "image"), SHAPES[3])
    with pytest.raises(DataError, match=r"record 0: pixels of mode [FI], whose black and white"):
        load_examples(DataConfig("pictures"), "train", str(folder))


def test_a_dataset_and_its_files_get_the_same_probabilities(folder: Path):
    turned = [encode(STORED[n](RGB), "JPEG", exif=oriented(n)) for n in UPRIGHT]
    images = [*turned, *(CASES[name][0] for name in ("colour, alpha", "16-bit grey", "palette"))]
    write_pictures(folder, images, (HEIGHT, WIDTH, 3))
    (folder / "files").mkdir()
    for i, encoded in enumerate(images):
        (folder / "files" / f"{i:02d}.png").write_bytes(encoded)
    examples = load_examples(DataConfig("pictures"), "train", str(folder))
    with unoptimised():
        run = make_run(folder, models.MLP(), SHAPES[3])
        found, broken = predict.predict(run, [str(folder / "files")], folder / "out", top_k=1)
        logits = run.model.apply(run.variables, examples.image / np.float32(255), train=False)
    assert broken == []
    expected = jax.nn.softmax(logits).max(-1)
    np.testing.assert_allclose([p.probabilities[0] for p in found], expected, rtol=1e-4)


def test_an_upright_size_other_than_the_declared_one_is_refused(folder: Path):
    write_pictures(folder, [encode(RGB, exif=oriented(6))], SHAPES[3])
    with pytest.raises(DataError) as caught:
        load_examples(DataConfig("pictures"), "train", str(folder))
    assert "record 0: an image of 6x8: must be 8x6 by the dataset's features (" in str(caught.value)


# ----------------------------------------------------------------------------------- damage


def test_damage_is_an_error_or_an_image():
    """Bytes here and there turned over: no other error leaves `decode`."""
    kinds = ("PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG", "JPEG2000", "PPM", "TGA", "QOI")
    files = [e for name, e in written_by_pillow().items() if name.startswith(kinds)]
    outcomes = set()
    for encoded in files:
        for place in range(0, min(len(encoded), 700), 13):
            flipped = bytearray(encoded)
            flipped[place] ^= 0xFF
            try:
                outcomes.add(decoded(bytes(flipped), 3).dtype.name)
            except (decode.Unsuitable, decode.Damaged) as error:
                outcomes.add((type(error).__name__, len(str(error).splitlines())))
    assert outcomes == {"uint8", ("Unsuitable", 1), ("Damaged", 1)}


@pytest.mark.parametrize(
    "encoded",
    [
        b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 70, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 16, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HH3x", 65_535, 65_535) + b"," + struct.pack("<4Hxx", 0, 0, 9, 9),
        b"P6 60000 60000 255\n" + bytes(99),
        png_file(60_000, 60_000, b""),
        tiff_with(tiff_with(encode(RGB, "TIFF"), 256, 60_000), 257, 60_000),
    ],
    ids=lambda encoded: encoded[:3],
)
def test_a_decompression_bomb_of_any_format(encoded: bytes):
    with pytest.raises(decode.Unsuitable, match=r"^more than 50,000,000 pixels$"):
        decoded(encoded, 3)


def test_pillows_remarks_stay_off_the_screen():
    cut = b"II*\0\x08\0\0\0\x05\0\x12\x01"  # a block of EXIF of which Pillow would warn
    code = (
        "import io, sys; from cnn_jax.common import decode\n"
        "print(decode.decode(io.BytesIO(sys.stdin.buffer.read()), 1).size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        input=by_hand(GREY, 8, 0, eXIf=cut),
        capture_output=True,
    )
    assert (done.stdout, done.stderr) == (b"(6, 8)\n", b"")
