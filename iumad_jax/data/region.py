"""The part of an image that the network sees, see `config.input.region`."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from iumad_jax import config as configs
from iumad_jax.data.sample import Sample
from iumad_jax.errors import UserError

WORKPIECE = "workpiece"
_MARGIN = 0.1  # around the workpiece, in its longer sides
_SPECK = 0.01  # a piece smaller than this share of the largest one is noise


class Box(NamedTuple):
    """Part of an image in shares of its width and height, which hold for photograph and depth of any resolutions."""

    left: float
    top: float
    right: float
    bottom: float

    def slices(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Return the rows and columns of the box in an array (h, w, ...), at least one of each."""
        return _pixels(self.top, self.bottom, shape[0]), _pixels(self.left, self.right, shape[1])


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def _pixels(low: float, high: float, length: int) -> slice:
    start = min(round(low * length), length - 1)
    return slice(start, max(round(high * length), start + 1))


def fixed_box(region: str, sample: Sample) -> Box:
    """Return the box that a region names in a sample; all of it if it names the workpiece.

    Raises:
        UserError: If the sample is smaller than the box.
    """
    numbers = configs.region_numbers(region)
    if numbers is None:
        return WHOLE
    if max(numbers) <= 1:
        return Box(*numbers)
    height, width = sample.rgb.shape[:2]
    left, top, right, bottom = numbers
    if right > width or bottom > height:
        raise UserError(
            f"{sample.object} {sample.id} has {width}x{height} pixels, but config.input.region is {region}; name a box"
            " within all images, or shares of their sides."
        )
    return Box(left / width, top / height, right / width, bottom / height)


def cut(sample: Sample, box: Box) -> Sample:
    """Return the part of a sample in a box, with the camera that sees it."""

    def part(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[box.slices(array.shape)]

    camera = sample.camera
    if camera is not None and sample.depth is not None:
        rows, columns = box.slices(sample.depth.shape)
        camera = dataclasses.replace(camera, cx=camera.cx - columns.start, cy=camera.cy - rows.start)
    arrays: dict[str, Any] = {name: part(getattr(sample, name)) for name in ("rgb", "depth", "mask", "normals")}
    return dataclasses.replace(sample, camera=camera, **arrays)


def workpiece_box(workpiece: Bool[np.ndarray, "h w"]) -> Box:
    """Return a square around the workpiece with a margin, within the image; the whole image if there is no workpiece.

    A square changes less than the bounding box when the workpiece turns or a defect changes its outline, and does not
    distort it.
    """
    pieces, _ = ndimage.label(workpiece, np.ones((3, 3)))
    areas = np.bincount(pieces[workpiece])
    if not len(areas):
        return WHOLE
    shown = np.isin(pieces, np.flatnonzero(areas >= _SPECK * areas.max()))
    ends = [np.flatnonzero(shown.any(axis))[[0, -1]] + [0, 1] for axis in (0, 1)]  # of columns, then of rows
    side = (1 + 2 * _MARGIN) * max(last - first for first, last in ends)
    (left, right), (top, bottom) = (
        _around((first + last) / 2, side, length) for (first, last), length in zip(ends, shown.shape[::-1], strict=True)
    )
    return Box(left, top, right, bottom)


def _around(centre: float, side: float, length: int) -> tuple[float, float]:
    """Return the ends of a side about a centre, moved into the image, in shares of the image's length."""
    side = min(side, length)
    start = min(max(centre - side / 2, 0), length - side)
    return start / length, (start + side) / length
