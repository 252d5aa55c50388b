"""Samples as they would be from a somewhat worse camera, under another lamp or out of a compressed file."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy import ndimage

from iumad_jax.data.sample import Sample

# The range of each fault's strength.
_JPEG_QUALITY = 50, 90
_NOISE = 1.0, 5.0  # grey levels, standard deviation
_BLUR = 0.5, 1.0  # pixels, standard deviation
_EXPOSURE = 0.8, 1.2
_DEPTH_NOISE = 0, 1 / 40  # of the height from which a pixel is the object's, standard deviation

_Pixels = UInt8[np.ndarray, "h w 3"]


def _compressed(rgb: _Pixels, rng: np.random.Generator) -> _Pixels:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=round(rng.uniform(*_JPEG_QUALITY)))
    with Image.open(file) as image:
        return np.asarray(image)


def _noisy(rgb: _Pixels, rng: np.random.Generator) -> _Pixels:
    return _rounded(rgb + rng.normal(0, rng.uniform(*_NOISE), rgb.shape))


def _blurred(rgb: _Pixels, rng: np.random.Generator) -> _Pixels:
    width = rng.uniform(*_BLUR)
    return _rounded(ndimage.gaussian_filter(rgb.astype(np.float32), (width, width, 0)))


def _exposed(rgb: _Pixels, rng: np.random.Generator) -> _Pixels:
    return _rounded(rgb * rng.uniform(*_EXPOSURE))


def _rounded(pixels: np.ndarray) -> _Pixels:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


FAULTS: tuple[Callable[[_Pixels, np.random.Generator], _Pixels], ...] = (_compressed, _noisy, _blurred, _exposed)


def degrade(sample: Sample, number: int, object_height: float) -> Sample:
    """The sample with one of `FAULTS` in its photograph, which its number chooses, and noise in its depth.

    Args:
        sample: as its dataset has it.
        number: of the sample, from 0; strength and noise depend on it as well.
        object_height: metres above the background plane from which a pixel is the object's.
    """
    rng = np.random.default_rng(number)
    rgb, depth = FAULTS[number % len(FAULTS)](sample.rgb, rng), sample.depth
    if depth is not None:
        noise = rng.normal(0, rng.uniform(*_DEPTH_NOISE) * object_height, depth.shape)
        depth = np.where(np.isfinite(depth) & (depth > 0), depth + noise, np.nan).astype(np.float32)
    return dataclasses.replace(sample, rgb=rgb, depth=depth)
