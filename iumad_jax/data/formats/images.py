"""Reads photographs and masks; headers are checked before anything is decoded."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from iumad_jax.data.formats.files import read_error
from iumad_jax.errors import UserError

MAX_SIDE = 8192  # pixels

# Format name, file signatures and Pillow plugin; `Image.open` would warn of large images before they are refused.
_PLUGINS: dict[str, tuple[str, tuple[bytes, ...], Any]] = {
    ".png": ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ".jpg": ("JPEG", (b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ".bmp": ("BMP", (b"BM",), BmpImagePlugin.BmpImageFile),
    ".tiff": ("TIFF", (b"II*\0", b"MM\0*"), TiffImagePlugin.TiffImageFile),
}
_PLUGINS |= {".jpeg": _PLUGINS[".jpg"], ".tif": _PLUGINS[".tiff"]}
PHOTOGRAPHS = tuple(_PLUGINS)  # file suffixes
_KINDS = {  # by Pillow's mode
    "1": "1-bit grey",
    "L": "8-bit grey",
    "RGB": "8-bit RGB",
    "RGBA": "8-bit RGB with alpha",
    "I;16": "16-bit grey",
    "I;16B": "16-bit grey",
}
_ORIENTATION = 0x0112  # EXIF
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd EXIF data does not affect the pixels


def read_image(file: Path, *kinds: str) -> np.ndarray:
    """Read the pixels of an image.

    Args:
        file: A PNG, JPEG, BMP or TIFF.
        kinds: Accepted pixel formats, such as "1-bit grey", "8-bit grey", "8-bit RGB" or "16-bit grey".

    Raises:
        UserError: If the image cannot be read, is too large or has another pixel format.
    """
    name, signatures, plugin = _PLUGINS[file.suffix.lower()]
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if not start:
                raise UserError(f"{file} is empty; replace it.")
            if not start.startswith(signatures):
                raise UserError(f"{file} is not a {name} image; replace it.")
            stream.seek(0)
            with plugin(stream) as image:
                check_size(file, *image.size)
                kind = _kind(image)
                if kind not in kinds:
                    raise UserError(f"{file} is {kind}; save it as {' or '.join(kinds)}.")
                if name == "JPEG" and image.getexif().get(_ORIENTATION, 1) != 1:
                    raise UserError(f"{file} is rotated by its EXIF orientation; save it upright.")
                return np.array(image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, Warning) as error:  # raised by Pillow
        raise read_error(file, error) from error


def read_photograph(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Read an 8-bit RGB or grey image as RGB; an alpha channel must be opaque.

    Raises:
        UserError: If the image cannot be read, is too large, is transparent or has another pixel format.
    """
    image = read_image(file, "8-bit RGB", "8-bit grey", "8-bit RGB with alpha")
    if image.ndim == 2:
        return np.stack([image] * 3, axis=-1)
    if not (image[..., 3:] == 255).all():
        raise UserError(f"{file} is transparent in places; save it without an alpha channel.")
    return image[..., :3]


def read_mask(file: Path, *, two_values: bool = True) -> Bool[np.ndarray, "h w"]:
    """Read a mask, which is True where the file is not 0.

    Args:
        file: An image of 8-bit or 1-bit grey.
        two_values: Whether all values other than 0 must be equal.

    Raises:
        UserError: If the mask cannot be read or has several values besides 0 although `two_values` is set.
    """
    grey = read_image(file, "8-bit grey", "1-bit grey")
    values = np.unique(grey[grey > 0])
    if two_values and len(values) > 1:
        raise UserError(f"{file} has the values {values[:5].tolist()} besides 0; use 0 and one other value.")
    return grey > 0


def check_size(file: Path, width: int, height: int) -> None:
    """Raise UserError if an image is larger than MAX_SIDE."""
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{file} has {width}x{height} pixels; use at most {MAX_SIDE}x{MAX_SIDE}.")


def check_same_size(file: Path, image: np.ndarray, rgb_file: Path, rgb: np.ndarray) -> None:
    """Raise UserError unless an image has the size of its photograph."""
    if image.shape[:2] != rgb.shape[:2]:
        size, rgb_size = (f"{array.shape[1]}x{array.shape[0]}" for array in (image, rgb))
        raise UserError(f"{file} has {size} pixels but {rgb_file} has {rgb_size}; save both in one size.")


def _kind(image: Any) -> str:
    """Describe the pixel format; only the raw mode reveals 16-bit RGB, which Pillow would read as 8-bit."""
    arguments = image.tile[0].args
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    if ";16" in raw_mode and not image.mode.startswith("I"):
        return f"16-bit {image.mode}"
    return _KINDS.get(image.mode, f"an image of Pillow's mode {image.mode}")
