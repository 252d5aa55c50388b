"""Image faults: worse cameras and depth sensors, other lighting, and lossy compression."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy import ndimage

from iumad_jax.data.depth import measured
from iumad_jax.data.sample import Sample

_Pixels = UInt8[np.ndarray, "h w 3"]


class Fault(NamedTuple):
    """Fault of a photograph."""

    apply: Callable[[_Pixels, float, np.random.Generator], _Pixels]  # arguments: image, strength, rng
    mild: tuple[float, float]  # range of strengths that a detector should tolerate


def _compress(rgb: _Pixels, quality: float, _: np.random.Generator) -> _Pixels:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=round(quality))
    with Image.open(file) as image:
        return np.asarray(image)


def _add_noise(rgb: _Pixels, deviation: float, rng: np.random.Generator) -> _Pixels:
    return _to_uint8(rgb + rng.normal(0, deviation, rgb.shape))


def _blur(rgb: _Pixels, pixels: float, _: np.random.Generator) -> _Pixels:
    return _to_uint8(ndimage.gaussian_filter(rgb.astype(np.float32), (pixels, pixels, 0)))


def _expose(rgb: _Pixels, factor: float, _: np.random.Generator) -> _Pixels:
    return _to_uint8(factor * rgb)


def _to_uint8(pixels: np.ndarray) -> _Pixels:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


FAULTS = {
    "JPEG, quality": Fault(_compress, (50, 90)),
    "noise, grey levels": Fault(_add_noise, (1, 5)),  # standard deviation
    "blur, pixels": Fault(_blur, (0.5, 1)),
    "brightness, times": Fault(_expose, (0.8, 1.2)),
}
MILD_DEPTH_NOISE = 1 / 40  # largest standard deviation as a fraction of `object_height`


def degrade(sample: Sample, number: int, object_height: float) -> Sample:
    """Apply one mild fault to a sample's photograph and mild noise to its depth.

    Args:
        sample: Unaltered sample.
        number: Number of the copy, from 0; it determines the fault, its strength and the noise.
        object_height: Height above the background plane from which a pixel belongs to the object, in metres.
    """
    rng = np.random.default_rng(number)
    fault = list(FAULTS.values())[number % len(FAULTS)]
    degraded = dataclasses.replace(sample, rgb=fault.apply(sample.rgb, rng.uniform(*fault.mild), rng))
    return with_depth_noise(degraded, rng.uniform(0, MILD_DEPTH_NOISE) * object_height, rng)


def vary(sample: Sample, number: int, object_height: float, extent: tuple[float, float] = (1.0, 1.0)) -> Sample:
    """Degrade a sample as `degrade` does, and shift it by up to 3 % of its size with edge pixels repeated.

    Args:
        sample: Unaltered sample.
        number: Number of the copy, as in `degrade`.
        object_height: As in `degrade`.
        extent: Shares of the height and width in place of which 3 % are meant.
    """
    degraded, rng = degrade(sample, number, object_height), np.random.default_rng([number, 1])
    shifts = rng.uniform(-0.03, 0.03, 2) * extent

    def shifted(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        by_axis = zip(array.shape[:2], shifts, strict=True)
        return array[np.ix_(*((np.arange(size) - round(size * shift)).clip(0, size - 1) for size, shift in by_axis))]

    camera = degraded.camera
    if camera is not None and degraded.depth is not None:
        rows, columns = (round(size * shift) for size, shift in zip(degraded.depth.shape, shifts, strict=True))
        camera = dataclasses.replace(camera, cx=camera.cx + columns, cy=camera.cy + rows)
    arrays: dict[str, Any] = {name: shifted(getattr(degraded, name)) for name in ("rgb", "depth", "mask", "normals")}
    return dataclasses.replace(degraded, camera=camera, **arrays)


def with_depth_noise(sample: Sample, deviation: float, rng: np.random.Generator) -> Sample:
    """Add noise with a standard deviation in metres to a sample's depth, if it has any."""
    if sample.depth is None or sample.camera is None:
        return sample
    valid = measured(sample.depth, sample.camera)
    depth = np.where(valid, sample.depth + rng.normal(0, deviation, sample.depth.shape), np.nan)
    return dataclasses.replace(sample, depth=depth.astype(np.float32))
