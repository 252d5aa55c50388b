"""Photographs and masks: the header is checked before anything is decoded."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from iumad_jax.data.formats.files import unreadable
from iumad_jax.errors import UserError

MAX_SIDE = 8192  # pixels

# Pillow's plugins are asked directly: `Image.open` would first warn of large images.
_PLUGINS: dict[str, tuple[str, tuple[bytes, ...], Any]] = {
    ".png": ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ".jpg": ("JPEG", (b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ".bmp": ("BMP", (b"BM",), BmpImagePlugin.BmpImageFile),
    ".tiff": ("TIFF", (b"II*\0", b"MM\0*"), TiffImagePlugin.TiffImageFile),
}
_PLUGINS |= {".jpeg": _PLUGINS[".jpg"], ".tif": _PLUGINS[".tiff"]}
PHOTOGRAPHS = tuple(_PLUGINS)  # endings
_KINDS = {  # by Pillow's mode
    "1": "1-bit grey",
    "L": "8-bit grey",
    "RGB": "8-bit RGB",
    "RGBA": "8-bit RGB with alpha",
    "I;16": "16-bit grey",
    "I;16B": "16-bit grey",
}
_ORIENTATION = 0x0112  # EXIF
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd EXIF data, where the pixels are as they should be


def read_image(file: Path, *kinds: str) -> np.ndarray:
    """The pixels of an image of one of some kinds: "1-bit grey", "8-bit grey", "8-bit RGB" or "16-bit grey".

    Raises:
        UserError: it cannot be read, is too large or of another kind.
    """
    name, signatures, plugin = _PLUGINS[file.suffix.lower()]
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if not start:
                raise UserError(f"{file} is empty; restore it.")
            if not start.startswith(signatures):
                raise UserError(f"{file} is not a {name} image; restore it.")
            stream.seek(0)
            with plugin(stream) as image:
                check_size(file, *image.size)
                kind = _kind(image)
                if kind not in kinds:
                    raise UserError(f"{file} is {kind}; it must be {' or '.join(kinds)}.")
                if name == "JPEG" and image.getexif().get(_ORIENTATION, 1) != 1:
                    raise UserError(f"{file} is shown turned, by its EXIF orientation; save it upright.")
                return np.array(image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, Warning) as error:  # all that Pillow may raise
        raise unreadable(file, error) from error


def read_photograph(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """An image of 8-bit RGB, or of 8-bit grey as three equal channels; an alpha channel must be opaque.

    Raises:
        UserError: see `read_image`.
    """
    image = read_image(file, "8-bit RGB", "8-bit grey", "8-bit RGB with alpha")
    if image.ndim == 2:
        return np.stack([image] * 3, axis=-1)
    if not (image[..., 3:] == 255).all():
        raise UserError(f"{file} is transparent in places; save it without an alpha channel.")
    return image[..., :3]


def read_mask(file: Path, *, two_values: bool = True) -> Bool[np.ndarray, "h w"]:
    """True where a mask is not 0.

    Raises:
        UserError: it cannot be read, or has more than one value beside 0 though it is to have two.
    """
    grey = read_image(file, "8-bit grey", "1-bit grey")
    values = np.unique(grey[grey > 0])
    if two_values and len(values) > 1:
        raise UserError(f"{file} has the values {values[:5].tolist()} beside 0; a mask has 0 and one other value.")
    return grey > 0


def check_size(file: Path, width: int, height: int) -> None:
    """Raises UserError for more pixels than anyone has."""
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{file} has {width}x{height} pixels; use at most {MAX_SIDE}x{MAX_SIDE}.")


def check_same_size(file: Path, image: np.ndarray, rgb_file: Path, rgb: np.ndarray) -> None:
    """Raises UserError unless an image has the size of its photograph."""
    if image.shape[:2] != rgb.shape[:2]:
        own, other = (f"{one.shape[1]}x{one.shape[0]}" for one in (image, rgb))
        raise UserError(f"{file} has {own} pixels but {rgb_file} {other}; a sample's images must agree.")


def _kind(image: Any) -> str:
    """What an image holds, in words; Pillow would read 16 bits of RGB as 8."""
    arguments = image.tile[0].args
    stored = arguments if isinstance(arguments, str) else arguments[0]
    if ";16" in stored and not image.mode.startswith("I"):
        return f"16-bit {image.mode}"
    return _KINDS.get(image.mode, f"of Pillow's mode {image.mode}")
