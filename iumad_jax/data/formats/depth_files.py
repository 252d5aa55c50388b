"""Depth images and organised point clouds: from any of their formats to metres, with NaN where missing.

Missing are zeros, NaN, infinities and what lies within 0.1 mm or beyond 20 m: sensors write them, or their largest
number, where they saw nothing (REP 118 of ROS). The header is checked before anything is decoded.
"""

import logging
import zlib
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Float, Float32

from iumad_jax.data.formats.clouds import read_pcd, read_ply
from iumad_jax.data.formats.files import unreadable
from iumad_jax.data.formats.images import check_size, read_image
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError

DEPTH_IMAGES = (".png", ".tiff", ".tif", ".npy", ".ply", ".pcd")  # endings

_NEAREST, _FARTHEST = 0.005, 20.0  # metres: a median beyond is given in another unit
_TOUCHING = 1e-4  # metres
_PARALLAX = 0.01  # of an image's longer side: how far a cloud's points may lie beside their pixels' rays
_ROUNDS, _POINTS = 4, 20_000  # of the camera's robust fit
logging.getLogger("tifffile").disabled = True  # what it says of damaged files is told in one sentence here
_TIFF_PLAIN, _TIFF_DEFLATE = (1,), (8, 32946)  # compressions


class WrongUnit(UserError):
    """Depth is not in the unit that it is said to be in."""


def read_depth(
    file: Path, unit: float | None, size: tuple[int, int], remedy: str
) -> tuple[Float32[np.ndarray, "h w"], Camera | None]:
    """A depth image, or the depth of an organised cloud, in metres, and the camera that a cloud implies.

    Args:
        file: a 16-bit grey PNG; a TIFF or .npy with one channel (depth) or three (x, y and z); a PLY or PCD cloud.
        unit: metres per unit of the file; None: nobody said.
        size: rows and columns of the photograph, by which a cloud in a PLY file that does not tell is organised.
        remedy: what to do about a wrong unit.

    Raises:
        UserError: it cannot be read, is no depth, or its unit is missing or wrong.
    """
    try:
        values = _decode(file, size)
    except UserError:
        raise
    except Exception as error:  # the decoders raise whatever a damaged file leads to
        raise unreadable(file, error) from error
    if unit is None:
        if values.dtype.kind in "iu":
            raise WrongUnit(f"{file} holds whole numbers of an unknown unit; {remedy}.")
        unit = 1.0
    with np.errstate(over="ignore", invalid="ignore"):  # of what is missing
        metres = values.astype(np.float32) * np.float32(unit)
    depth = metres if metres.ndim == 2 else metres[..., 2]
    depth = np.where(np.isfinite(depth) & (depth != 0), depth, np.float32(np.nan))
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth; restore it.")
    check_distance(depth, file, remedy)
    depth[(depth < _TOUCHING) | (depth > _FARTHEST)] = np.nan
    return depth, None if metres.ndim == 2 else find_camera(np.dstack([metres[..., :2], depth]), file)


def check_distance(depth: Float[np.ndarray, "h w"], file: Path, remedy: str) -> None:
    """Raises UserError unless a depth image with some valid pixels can be the distance to an object in metres."""
    nearest, median = np.nanmin(depth), np.nanmedian(depth)
    if nearest < 0:
        raise UserError(f"{file} has a depth of {nearest:.3g} m; depth is the distance from the sensor, above 0.")
    if median > _FARTHEST:
        raise WrongUnit(f"{file} has a median depth of {median:.4g} m, as if millimetres were called metres; {remedy}.")
    if median < _NEAREST:
        raise WrongUnit(f"{file} has a median depth of {median:.2g} m, as if metres were called millimetres; {remedy}.")


def find_camera(cloud: Float32[np.ndarray, "h w 3"], file: Path) -> Camera:
    """The pinhole or orthographic camera whose pixels' rays an organised cloud (NaN: missing) lies on.

    Columns are linear in x/z (x for an orthographic camera) and rows in y/z (y): robust least squares, leaving out what
    is off by more than three robust standard deviations. The camera that fits better is taken. A lens that is not
    corrected bends the rays: 95 of 100 points may be off by up to 1 % of the image's longer side. Heights change by
    that times the plane's slope, the same in all images.

    Raises:
        UserError: neither fits.
    """
    rows, columns = np.nonzero(np.isfinite(cloud).all(-1))
    step = -(-len(rows) // _POINTS) or 1
    rows, columns = rows[::step], columns[::step]
    if len(np.unique(rows)) < 3 or len(np.unique(columns)) < 3:
        raise UserError(f"{file} has too few valid points to tell how the sensor sees; restore it.")
    x, y, z = cloud[rows, columns].T.astype(np.float64)
    found = []
    for orthographic in (False, True):
        distance = 1 if orthographic else z
        (fx, cx), (fy, cy) = _line(x / distance, columns), _line(y / distance, rows)
        off = np.hypot(fx * x / distance + cx - columns, fy * y / distance + cy - rows)
        # The axes of a cloud may point left or up; ours do not.
        found.append((np.quantile(off, 0.95), Camera(abs(fx), abs(fy), cx, cy, orthographic)))
    error, camera = min(found, key=lambda one: one[0])
    if not error <= _PARALLAX * max(cloud.shape) or camera.fx == 0 or camera.fy == 0:
        raise UserError(
            f"{file} has points {error:.1f} pixels beside the rays of the best pinhole or orthographic camera; it must"
            " be an organised cloud as the sensor saw it, neither turned nor flattened."
        )
    return camera


def _line(x: np.ndarray, pixel: np.ndarray) -> tuple[float, float]:
    """Slope and offset of pixel = slope x + offset, from the points on the line alone."""
    kept = np.ones(len(x), bool)
    for _ in range(_ROUNDS):
        design = np.stack([x[kept], np.ones(kept.sum())], axis=-1)
        slope, offset = np.linalg.lstsq(design, pixel[kept])[0]
        off = np.abs(slope * x + offset - pixel)
        kept = off <= 3 * 1.4826 * np.median(off) + 1e-6
    return float(slope), float(offset)


def _decode(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Numbers in two dimensions, or in three with x, y and z last."""
    match file.suffix.lower():
        case ".png":
            return read_image(file, "16-bit grey")
        case ".npy":
            array = np.lib.format.open_memmap(file, mode="r")  # np.load leaves open what looks like a zip file
            _check_array(file, array.shape, array.dtype)
            return np.array(array)
        case ".ply":
            return read_ply(file, size)
        case ".pcd":
            return read_pcd(file)
        case _:
            return _read_tiff(file)


def _read_tiff(file: Path) -> np.ndarray:
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if tiff.pages.is_multipage:
            raise UserError(f"{file} has several pages; give one.")
        _check_array(file, page.shape, page.dtype)
        if page.compression not in _TIFF_PLAIN + _TIFF_DEFLATE:
            name = tifffile.COMPRESSION(page.compression).name
            raise UserError(f"{file} is compressed by {name}; save it without compression.")
        if page.compression in _TIFF_DEFLATE:
            _check_inflated(file, page)
        return page.asarray()


def _check_inflated(file: Path, page: tifffile.TiffPage) -> None:
    """Raises UserError for compressed parts that would grow beyond the whole image."""
    with file.open("rb") as stream:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            stream.seek(offset)
            inflater = zlib.decompressobj()
            inflater.decompress(stream.read(count), page.nbytes)
            if inflater.unconsumed_tail:
                raise UserError(f"{file} inflates to more than its size; restore it.")


def _check_array(file: Path, shape: tuple[int, ...], dtype: np.dtype | None) -> None:
    """Raises UserError unless an array is of numbers and small enough; its shape is judged later."""
    if dtype is None or dtype.kind not in "iuf":
        raise UserError(f"{file} holds {dtype}; give numbers.")
    if len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (3,)):
        raise UserError(f"{file} has the shape {shape}; give (rows, columns), or (rows, columns, 3) for x, y and z.")
    check_size(file, shape[1], shape[0])
