"""Decodes images to pixels, in the same way for training, evaluation and prediction."""

import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, PngImagePlugin

from cnn_jax.common.errors import DataError

# Compared with the image's header before decoding.
MAX_PIXELS = 50_000_000
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BACKGROUND = "white"
# Pillow recognises these formats but cannot decode them; for EPS it would start another program.
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Metadata that changes pixels, by Pillow's names in PNG, JPEG, WebP and AVIF.
OBEYED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "transparency"}
# The operation that makes the stored image upright, by EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[k] for k in (5, 6, 7, 8)}
GREY_MODES = ("1", "L", "LA", "La")
# The distance of neighbouring greys of 2 or 4 bits after Pillow has converted them to 8 bits.
GREY_STEPS = {"L;2": 85, "L;4": 17}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF and one of its values

# Hides warnings about metadata that is not read here. catch_warnings is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unsuitable(ValueError):
    """The input is not an image, or an image that `decode` refuses; the text says why."""


class Damaged(ValueError):
    """The image cannot be decoded completely; the text is Pillow's reason."""


def decode(file: BinaryIO, channels: int) -> Image.Image:
    """Decodes an image to 8 bits per channel, by one rule for files and for records of datasets.

    - Format: any that Pillow decodes, except `NOT_DECODED`; recognised by content. The first frame
      of an animation, the first of several pages.
    - Orientation: from EXIF (in PNG, JPEG, TIFF, WebP, AVIF). A damaged EXIF block is ignored.
    - Depth: 1 bit becomes 0 and 255. Grey of 16 bits is divided by 257 and rounded to the nearest
      (257 is odd, so there are no ties); 12 bits likewise. For colour with 16 bits per channel,
      Pillow keeps the high byte, which differs from that by at most 1. Integers of 32 bits and
      floating point are refused: their values of black and white are not known.
    - Palette: its colours.
    - Colour: RGB as stored. Colour profiles and gamma are ignored, as in TensorFlow, PyTorch and
      OpenCV. CMYK becomes R = (255 - C) * (255 - K) / 255, and so on; CMYK values in a JPEG are
      taken as inverted, as Adobe writes them.
    - Transparency: for 1 and 3 channels, the image is laid on white, as web pages and viewers show
      it. For 4 channels it is kept, and an image without transparency is opaque.
    - Grey from colour, for 1 channel: Pillow's L, 0.299 R + 0.587 G + 0.114 B, rounded.

    Args:
      file: one encoded image, from its first byte; in binary mode, with seek.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Returns:
      A loaded image of mode L, RGB or RGBA, upright, in its original size.

    Raises:
      Unsuitable: it is not an image, has more than MAX_PIXELS, or pixels of unknown range.
      Damaged: it is truncated or broken.
    """
    try:
        picture = _open(file)
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        tiles = picture.tile  # load() replaces it
        picture.load()
        if picture.mode == MODES[channels] and picture.info.keys().isdisjoint(OBEYED):
            return picture  # most images of datasets
        turn = _turn(picture)
        decoded = _to_channels(_to_eight_bits(picture, _raw_mode(tiles)), channels)
        return decoded if turn is None else decoded.transpose(turn)
    except Unsuitable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unsuitable(f"more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unsuitable("not an image of a format that Pillow decodes") from None
    except Exception as error:  # Pillow raises many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(reason) from error


def decode_file(path: str | Path, channels: int) -> Image.Image:
    """`decode` for a file.

    Raises:
      DataError: it cannot be opened or decoded; names it.
    """
    try:
        with open(path, "rb") as file:
            return decode(file, channels)
    except (Unsuitable, Damaged) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def header(file: BinaryIO) -> tuple[int, int, bool]:
    """(height, width) of the upright image, and whether it is grey, without decoding it.

    Grey means stored as grey, with or without transparency. A palette counts as colour.

    Raises:
      Unsuitable: it is not an image.
    """
    try:
        picture = _open(file)
        # For the EXIF block of a PNG without one, Pillow would decode the pixels.
        known = picture.format != "PNG" or "exif" in picture.info
        width, height = picture.size
        if known and _turn(picture) in SIDEWAYS:
            width, height = height, width
        return height, width, picture.mode in GREY_MODES or picture.mode.startswith("I")
    except Exception as error:  # as in `decode`
        raise Unsuitable("not an image of a format that Pillow decodes") from error


def pixels(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The result of `decode` as uint8 [height, width, C]; resized bilinearly if necessary."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, -1)


@functools.cache
def fingerprint() -> str:
    """What pixels depend on besides the encoded image: this file's content, Pillow's version."""
    return f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()} Pillow {PIL.__version__}"


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are decoded."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@functools.cache
def suffixes() -> frozenset[str]:
    """The file name extensions of these formats, in lower case and with the dot."""
    decoded = {*formats(), "MPO"}  # Pillow opens MPO as JPEG
    return frozenset(s for s, name in Image.registered_extensions().items() if name in decoded)


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """The image, with only its header read."""
    start = file.read(4)
    file.seek(0)
    # Image.open does the same for these two, but takes 12 to 25% longer for small images.
    if start == b"\x89PNG":
        return PngImagePlugin.PngImageFile(file)
    if start.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(file)
    return Image.open(file, formats=formats())


def _raw_mode(tiles: Sequence[tuple]) -> str | None:
    """The format of the pixels in the file, in Pillow's terms; None if unknown."""
    arguments = tiles[0][3] if tiles else None
    first = arguments[0] if arguments and isinstance(arguments, tuple) else arguments
    return first if isinstance(first, str) else None


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """EXIF's orientation, as an operation. exif_transpose rewrites EXIF, and fails if it is damaged."""
    try:
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types for a damaged block
        return None


def _to_eight_bits(picture: Image.Image, stored_as: str | None) -> Image.Image:
    """Scales grey of more than 8 bits, and the one transparent value of a PNG without alpha."""
    key = picture.info.get("transparency")
    if picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM"):
        return _scaled(picture, 4095 if stored_as == "I;12" else 65535, key)
    if picture.mode[0] in "IF":
        raise Unsuitable(
            f"pixels of mode {picture.mode}, whose black and white are not known; save it with 8 or "
            "16 bits a channel"
        )
    if key is not None and stored_as in GREY_STEPS:
        picture.info["transparency"] = key * GREY_STEPS[stored_as]
    elif key is not None and stored_as == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    return picture


def _scaled(picture: Image.Image, white: int, key: int | None) -> Image.Image:
    """Grey from 0 to `white` as L, or as LA if the value `key` is transparent."""
    value = np.asarray(picture).astype(np.uint32)
    grey = ((value * 255 + white // 2) // white).astype(np.uint8)
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    scaled = Image.fromarray(grey)
    if key is not None:
        scaled.putalpha(Image.fromarray(np.where(value == key, 0, 255).astype(np.uint8)))
    return scaled


def _to_channels(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # palette to L directly rounds differently
    if channels != 4 and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGB", picture.size, BACKGROUND)
        page.paste(picture, mask=picture.getchannel("A"))
        picture = page
    if channels == 1 and picture.mode not in ("1", "L"):
        picture = picture.convert("RGB")
    return picture.convert(MODES[channels])
