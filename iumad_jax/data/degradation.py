"""Samples as they would be from a worse camera or sensor, under another lamp, or out of a compressed file."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy import ndimage

from iumad_jax.data.sample import Sample

_Pixels = UInt8[np.ndarray, "h w 3"]


class Fault(NamedTuple):
    """One way in which photographs get worse."""

    apply: Callable[[_Pixels, float, np.random.Generator], _Pixels]  # of this strength
    mild: tuple[float, float]  # between which strengths a model should stand it


def _compress(rgb: _Pixels, quality: float, _: np.random.Generator) -> _Pixels:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=round(quality))
    with Image.open(file) as image:
        return np.asarray(image)


def _add_noise(rgb: _Pixels, deviation: float, rng: np.random.Generator) -> _Pixels:
    return _rounded(rgb + rng.normal(0, deviation, rgb.shape))


def _blur(rgb: _Pixels, pixels: float, _: np.random.Generator) -> _Pixels:
    return _rounded(ndimage.gaussian_filter(rgb.astype(np.float32), (pixels, pixels, 0)))


def _expose(rgb: _Pixels, factor: float, _: np.random.Generator) -> _Pixels:
    return _rounded(factor * rgb)


def _rounded(pixels: np.ndarray) -> _Pixels:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


FAULTS = {
    "JPEG, quality": Fault(_compress, (50, 90)),
    "noise, grey levels": Fault(_add_noise, (1, 5)),  # standard deviations
    "blur, pixels": Fault(_blur, (0.5, 1)),
    "brightness, times": Fault(_expose, (0.8, 1.2)),
}
MILD_DEPTH_NOISE = 1 / 40  # of the height from which a pixel is the object's; standard deviation


def degrade(sample: Sample, number: int, object_height: float) -> Sample:
    """The sample with one mild fault in its photograph, chosen by its number, and mild noise in its depth.

    Args:
        sample: as its dataset has it.
        number: of the sample, from 0; strengths and noise depend on it as well.
        object_height: metres above the background plane from which a pixel is the object's.
    """
    rng = np.random.default_rng(number)
    fault = list(FAULTS.values())[number % len(FAULTS)]
    worse = dataclasses.replace(sample, rgb=fault.apply(sample.rgb, rng.uniform(*fault.mild), rng))
    return with_depth_noise(worse, rng.uniform(0, MILD_DEPTH_NOISE) * object_height, rng)


def vary(sample: Sample, number: int, object_height: float) -> Sample:
    """The sample with one mild fault, see `degrade`, and moved by up to 3 % of its size, its edges being repeated."""
    worse, rng = degrade(sample, number, object_height), np.random.default_rng([number, 1])
    rows, columns = (round(rng.uniform(-0.03, 0.03) * size) for size in sample.rgb.shape[:2])

    def moved(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        at = (np.arange(size) - by for size, by in zip(array.shape[:2], (rows, columns), strict=True))
        return array[np.ix_(*(one.clip(0, size - 1) for one, size in zip(at, array.shape[:2], strict=True)))]

    camera = worse.camera
    if camera is not None:
        camera = dataclasses.replace(camera, cx=camera.cx + columns, cy=camera.cy + rows)
    kept: dict[str, Any] = {name: moved(getattr(worse, name)) for name in ("rgb", "depth", "mask", "normals")}
    return dataclasses.replace(worse, camera=camera, **kept)


def with_depth_noise(sample: Sample, deviation: float, rng: np.random.Generator) -> Sample:
    """The sample with noise of a standard deviation in metres in its depth, if it has one."""
    if sample.depth is None:
        return sample
    measured = np.isfinite(sample.depth) & (sample.depth > 0)
    depth = np.where(measured, sample.depth + rng.normal(0, deviation, sample.depth.shape), np.nan)
    return dataclasses.replace(sample, depth=depth.astype(np.float32))
