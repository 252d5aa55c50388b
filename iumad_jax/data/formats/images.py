"""Reads photographs and masks by their content; headers are checked before anything is decoded.

All images are turned as their EXIF orientation says.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from scipy import ndimage

from iumad_jax.data.formats.files import read_error, tell
from iumad_jax.errors import UserError

MAX_SIDE = 8192  # pixels
PHOTOGRAPHS = (".png", ".jpg", ".jpeg", ".bmp", ".tiff", ".tif", ".webp")  # file suffixes

# First bytes and Pillow plugin by format; `Image.open` would warn of large images before they are refused.
_FORMATS: dict[str, tuple[re.Pattern[bytes], Any]] = {
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "BMP": (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    "TIFF": (re.compile(rb"II\*\0|MM\0\*"), TiffImagePlugin.TiffImageFile),
    "WebP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
}
_KINDS = {  # by Pillow's mode
    "1": "1-bit grey",
    "L": "8-bit grey",
    "LA": "8-bit grey with alpha",
    "P": "8-bit palette colours",
    "RGB": "8-bit RGB",
    "RGBX": "8-bit RGB",
    "RGBA": "8-bit RGB with alpha",
    "YCbCr": "8-bit RGB",
    "CMYK": "8-bit CMYK",
    "I;16": "16-bit grey",
    "I;16B": "16-bit grey",
    "I": "32-bit grey",
    "F": "32-bit grey",
}
_DEEP_KINDS = {"RGB": "16-bit RGB", "RGBA": "16-bit RGB with alpha"}  # Pillow would read these as 8-bit
_PHOTOGRAPHIC = (
    *("8-bit RGB", "8-bit grey", "8-bit RGB with alpha", "8-bit grey with alpha", "8-bit palette colours"),
    *("8-bit CMYK", "16-bit grey", *_DEEP_KINDS.values()),
)
_CONVERTED = {"LA": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}  # modes
_OTHER_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}  # N is L on little-endian machines
_DEPTHS = (8, 10, 12, 14, 16)  # bits per channel of sensors
_SOFT_VALUES = 16  # a mask with more values has soft edges; one with fewer may have a value per defect
_BAND_ROWS = 256  # rows that are copied at once; a copy of a large photograph at once would triple its memory
_BITS_TAG, _ORIENTATION_TAG, _PLANES_TAG = 0x0102, 0x0112, 0x011C  # of TIFF; EXIF has the same orientation
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF data does not affect the pixels


def read_image(file: Path, *kinds: str) -> np.ndarray:
    """Read the pixels of an image, upright: rows, columns and, unless grey, three or four channels.

    Args:
        file: A PNG, JPEG, BMP, TIFF or WebP, whatever its suffix.
        kinds: Accepted pixel formats, such as "1-bit grey", "8-bit grey", "8-bit RGB" or "16-bit grey".

    Raises:
        UserError: If the image cannot be read, is too large, has several pages or has another pixel format.
    """
    with _opened(file) as (stream, plugin, image):
        kind = _kind(image)
        if kind not in kinds:
            raise UserError(f"{file} is {kind}; save it as {' or '.join(kinds[:2])}.")
        pixels = _decode(image)
        if (
            kind in _DEEP_KINDS.values()
        ):  # Pillow keeps the higher bytes; those called higher in the other order are lower
            stream.seek(0)
            with plugin(stream) as again:
                again.tile = [tile._replace(args=_other_bytes(tile.args)) for tile in again.tile]
                pixels = pixels * np.uint16(256) + _decode(again)
        return pixels


def read_photograph(file: Path, bits: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image of 8 or 16 bits per channel as 8-bit RGB; an alpha channel must be opaque.

    Args:
        file: Grey or RGB with or without alpha, a palette or CMYK.
        bits: Bits that an image of 16 bits per channel uses, counted from the lowest.

    Raises:
        UserError: If the image cannot be read, is too large or transparent, has another pixel format, or uses more than
            `bits`.
    """
    image = np.atleast_3d(read_image(file, *_PHOTOGRAPHIC))
    if not (image[..., 3:] == np.iinfo(image.dtype).max).all():
        raise UserError(f"{file} is transparent in places; save it without an alpha channel.")
    rgb = image[..., :3]
    if rgb.dtype == np.uint16:
        rgb = _to_8_bits(file, rgb, bits)
    return rgb if rgb.shape[2] == 3 else np.repeat(rgb, 3, axis=2)


def used_bits(files: Sequence[Path]) -> int | None:
    """Return the bits that all photographs together use, which is told; None if the first one, if any, has 8 bits each.

    Raises:
        UserError: If an image cannot be read.
    """
    if not files:
        return None
    with _opened(files[0]) as (_, _, image):
        if not _kind(image).startswith("16-bit"):
            return None
    highest = max(int(np.atleast_3d(read_image(file, *_PHOTOGRAPHIC))[..., :3].max()) for file in files)
    bits = next(bits for bits in _DEPTHS if highest < 1 << bits)
    tell(f"photographs of 16 bits use {bits} of them, scaled to 8; bits in dataset.yaml sets another number", files[0])
    return bits


def read_mask(file: Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask, which is True where any channel of the file is not 0.

    Soft edges, of JPEGs, of many values, or one pixel wide around the largest value, are cut at half of it. Masks of
    other values are taken to have one per defect. Both are told.

    Args:
        file: An image of any kind; transparent pixels are not marked.

    Raises:
        UserError: If the mask cannot be read.
    """
    image = np.atleast_3d(read_image(file, *("8-bit grey", "1-bit grey"), *_KINDS.values(), *_DEEP_KINDS.values()))
    level = image[..., :3].max(axis=-1) * (image[..., 3:] != 0).all(axis=-1)
    mask = level > 0
    values = np.unique(level[mask])
    with file.open("rb") as stream:
        soft = len(values) > _SOFT_VALUES or (len(values) > 1 and _format(file, stream) == "JPEG")
    if soft or (len(values) > 1 and _only_edges(level)):
        tell("masks with soft edges are cut at half of their largest value", file)
        mask = level > values[-1] / 2
    elif len(values) > 1:
        tell("masks have several values, of which all but 0 mark a defect", file)
    if mask.mean() > 0.5:
        tell("masks mark more than half of the image; what is not 0 must be the defect", file)
    return mask


def _only_edges(level: np.ndarray) -> bool:
    """Whether every pixel between 0 and the largest value touches one of it, as when shapes are drawn without steps."""
    largest = level == level.max()
    return not (~ndimage.binary_dilation(largest, np.ones((3, 3))) & (level > 0)).any()


def check_size(file: Path, width: int, height: int) -> None:
    """Raise UserError if an image is larger than MAX_SIDE."""
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{file} has {width}x{height} pixels; use at most {MAX_SIDE}x{MAX_SIDE}.")


def check_same_size(file: Path, image: np.ndarray, rgb_file: Path, rgb: np.ndarray) -> None:
    """Raise UserError unless an image has the size of its photograph."""
    if image.shape[:2] != rgb.shape[:2]:
        size, rgb_size = (f"{array.shape[1]}x{array.shape[0]}" for array in (image, rgb))
        raise UserError(f"{file} has {size} pixels but {rgb_file} has {rgb_size}; save both in one size.")


def check_mask_size(file: Path, mask: np.ndarray, rgb_file: Path, rgb: np.ndarray) -> None:
    """Raise UserError unless a mask has the size of its photograph; say how to resize one of the same shape."""
    (rows, columns), (height, width) = mask.shape, rgb.shape[:2]
    if (rows, columns) != (height, width) and abs(rows * width - columns * height) <= max(height, width):
        command = f"from PIL import Image; Image.open(f := {str(file)!r}).resize(({width}, {height}), 0).save(f)"
        raise UserError(
            f'{file} has {columns}x{rows} pixels but {rgb_file} has {width}x{height}; resize it: python -c "{command}".'
        )
    check_same_size(file, mask, rgb_file, rgb)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (h w ...) as an EXIF or TIFF orientation says, 1 to 8; other values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, Any, Any]]:
    """Open an image and check its header; yield its stream, plugin and image."""
    try:
        with file.open("rb") as stream:
            plugin = _FORMATS[_format(file, stream)][1]
            with plugin(stream) as image:
                check_size(file, *image.size)
                if getattr(image, "is_animated", False):
                    raise UserError(f"{file} has several pages; save the page to be used as a file of its own.")
                yield stream, plugin, image
    except Image.DecompressionBombError as error:  # a WebP, whose header Pillow checks by itself
        raise UserError(f"{file} has too many pixels; use at most {MAX_SIDE}x{MAX_SIDE}.") from error
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, Warning) as error:  # raised by Pillow
        if "pixel mode" in str(error):
            raise UserError(f"{file} holds floats or an uncommon kind of pixels; save it as 8-bit RGB.") from error
        raise read_error(file, error) from error


def _format(file: Path, stream: BinaryIO) -> str:
    start = stream.read(12)
    stream.seek(0)
    if not start:
        raise UserError(f"{file} is empty; replace it.")
    for name, (pattern, _) in _FORMATS.items():
        if pattern.match(start):
            return name
    raise UserError(f"{file} is not a {', '.join(_FORMATS)} image; convert or replace it.")


def _kind(image: Any) -> str:
    """Describe the pixel format; only the raw mode or the tags of a TIFF reveal 16-bit colours."""
    arguments = image.tile[0].args if image.tile else ""
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    tags = getattr(image, "tag_v2", {})
    if image.mode in _DEEP_KINDS and max(tags.get(_BITS_TAG, (8,))) > 8 and tags.get(_PLANES_TAG) == 2:
        return "16-bit RGB in planes"
    if ";16" in raw_mode and not image.mode.startswith("I"):
        return "16-bit grey with alpha" if raw_mode.startswith("LA") else _DEEP_KINDS.get(image.mode, "16-bit CMYK")
    return _KINDS.get(image.mode, "of an uncommon kind")


def _decode(image: Any) -> np.ndarray:
    image.load()
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)  # 1 for a TIFF, which Pillow turns by itself
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in _CONVERTED:
        image = image.convert(_CONVERTED[image.mode])
    width, height = image.size
    sides = (width, height) if orientation in (5, 6, 7, 8) else (height, width)
    one = np.asarray(image.crop((0, 0, 1, 1)))
    pixels = np.empty((*sides, *one.shape[2:]), one.dtype.newbyteorder("="))
    as_stored = upright(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # 6 and 8 undo each other
    for top in range(0, height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, height)
        as_stored[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _other_bytes(arguments: Any) -> Any:
    """Name the other byte order in the raw mode of a tile."""
    raw_mode, *others = (arguments,) if isinstance(arguments, str) else arguments
    changed = raw_mode[:-4] + _OTHER_BYTES[raw_mode[-4:]]
    return (changed, *others) if others else changed


def _to_8_bits(file: Path, rgb: np.ndarray, bits: int | None) -> np.ndarray:
    """Scale levels of which 2^bits - 1 is the largest to 0..255."""
    if bits is None:
        raise UserError(
            f"{file} has 16 bits per channel; save it as 8-bit, or, before training, set bits in dataset.yaml, such as"
            " bits: 12."
        )
    top = (1 << bits) - 1
    if rgb.max() > top:
        raise UserError(
            f"{file} has the level {rgb.max()}, which {bits} bits cannot hold; before training, set bits in"
            " dataset.yaml."
        )
    return ((rgb.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
