"""Reads depth images and organised point clouds of several formats as metres, with NaN where depth is missing.

Zeros, NaN, infinities and depths below 0.1 mm or above 20 m count as missing: sensors write such values, or their
largest number, for pixels without a measurement (REP 118 of ROS). Headers are checked before anything is decoded.
"""

import logging
import zlib
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Float, Float32

from iumad_jax.data.formats.clouds import read_pcd, read_ply
from iumad_jax.data.formats.files import read_error
from iumad_jax.data.formats.images import check_size, read_image, upright
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError

DEPTH_IMAGES = (".png", ".tiff", ".tif", ".npy", ".ply", ".pcd")  # file suffixes

_MIN_MEDIAN = 0.005  # metres; a smaller median depth means a wrong unit
_MIN_DEPTH, _MAX_DEPTH = 1e-4, 20.0  # metres; depths outside count as missing; a larger median means a wrong unit
_MAX_ERROR = 0.01  # largest distance of points from the rays of their pixels over the image's longer side
_ROUNDS, _MAX_POINTS = 4, 20_000  # for the robust fit of the camera
logging.getLogger("tifffile").disabled = True  # damaged files raise a UserError instead of its log lines
_ORIENTATION_TAG = 0x0112
_TIFF_PLAIN, _TIFF_DEFLATE = (1,), (8, 32946)  # compression codes


class WrongUnit(UserError):
    """A missing or wrong unit of depth."""


def read_depth(
    file: Path, unit: float | None, size: tuple[int, int], remedy: str
) -> tuple[Float32[np.ndarray, "h w"], Camera | None]:
    """Read depth in metres from a depth image or an organised cloud.

    Args:
        file: A 16-bit grey PNG; a TIFF or .npy with one channel (depth) or three (x, y and z); a PLY or PCD cloud.
        unit: Metres per unit of the file; if None, floats are read as metres and integers are refused.
        size: Rows and columns of the photograph, used for PLY clouds whose header lacks them.
        remedy: Advice on a missing or wrong unit, the end of the error message.

    Returns:
        Depth (h, w), NaN where missing, and the camera estimated from a cloud, None for a depth image.

    Raises:
        UserError: If the file cannot be read, holds no depth, or its unit is missing or wrong.
    """
    try:
        values = _decode(file, size)
    except UserError:
        raise
    except Exception as error:  # damaged files make the decoders raise errors of any type
        raise read_error(file, error) from error
    if unit is None:
        if values.dtype.kind in "iu":
            raise WrongUnit(f"{file} holds integers of an unknown unit; {remedy}.")
        unit = 1.0
    with np.errstate(over="ignore", invalid="ignore"):  # missing values may be huge or NaN
        metres = values.astype(np.float32) * np.float32(unit)
    depth = metres if metres.ndim == 2 else metres[..., 2]
    depth = np.where(np.isfinite(depth) & (depth != 0), depth, np.float32(np.nan))
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth; replace it.")
    check_distance(depth, file, remedy)
    depth[(depth < _MIN_DEPTH) | (depth > _MAX_DEPTH)] = np.nan
    return depth, None if metres.ndim == 2 else fit_camera(np.dstack([metres[..., :2], depth]), file)


def check_distance(depth: Float[np.ndarray, "h w"], file: Path, remedy: str) -> None:
    """Raise UserError unless the valid pixels of a depth image are plausible distances in metres."""
    nearest, median = np.nanmin(depth), np.nanmedian(depth)
    if nearest < 0:
        raise UserError(f"{file} has a depth of {nearest:.3g} m; depth must be the distance from the sensor, above 0.")
    if median > _MAX_DEPTH:
        raise WrongUnit(
            f"{file} has a median depth of {median:.4g} m, as if millimetres were read as metres; {remedy}."
        )
    if median < _MIN_MEDIAN:
        raise WrongUnit(
            f"{file} has a median depth of {median:.2g} m, as if metres were read as millimetres; {remedy}."
        )


def fit_camera(cloud: Float32[np.ndarray, "h w 3"], file: Path) -> Camera:
    """Estimate the pinhole or orthographic camera that took an organised cloud, NaN where missing.

    Columns are linear in x/z (x for an orthographic camera) and rows in y/z (y). Robust least squares fits both,
    rejecting points off by more than three robust standard deviations; the camera with the smaller error is returned.
    Since uncorrected lenses bend the rays, 95 % of the points may be off by up to 1 % of the image's longer side.
    Heights then change by this error times the plane's slope, equally in all images.

    Raises:
        UserError: If neither camera fits.
    """
    rows, columns = np.nonzero(np.isfinite(cloud).all(-1))
    step = -(-len(rows) // _MAX_POINTS) or 1
    rows, columns = rows[::step], columns[::step]
    if len(np.unique(rows)) < 3 or len(np.unique(columns)) < 3:
        raise UserError(f"{file} has too few valid points to estimate the camera; replace it.")
    x, y, z = cloud[rows, columns].T.astype(np.float64)
    fits = []
    for orthographic in (False, True):
        distance = 1 if orthographic else z
        (fx, cx), (fy, cy) = _fit_line(x / distance, columns), _fit_line(y / distance, rows)
        errors = np.hypot(fx * x / distance + cx - columns, fy * y / distance + cy - rows)
        # The axes of a cloud may point left or up; those of a `Camera` point right and down.
        fits.append((np.quantile(errors, 0.95), Camera(abs(fx), abs(fy), cx, cy, orthographic)))
    error, camera = min(fits, key=lambda fit: fit[0])
    if not error <= _MAX_ERROR * max(cloud.shape) or camera.fx == 0 or camera.fy == 0:
        raise UserError(
            f"{file} has points {error:.1f} pixels beside the rays of the best pinhole or orthographic camera; save"
            " an organised cloud as the sensor measured it, neither rotated nor flattened."
        )
    return camera


def _fit_line(x: np.ndarray, pixel: np.ndarray) -> tuple[float, float]:
    """Fit slope and offset of pixel = slope x + offset, rejecting outliers."""
    inliers = np.ones(len(x), bool)
    for _ in range(_ROUNDS):
        design = np.stack([x[inliers], np.ones(inliers.sum())], axis=-1)
        slope, offset = np.linalg.lstsq(design, pixel[inliers])[0]
        errors = np.abs(slope * x + offset - pixel)
        inliers = errors <= 3 * 1.4826 * np.median(errors) + 1e-6
    return float(slope), float(offset)


def _decode(file: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode a file to numbers of shape (h, w), or (h, w, 3) for x, y and z."""
    match file.suffix.lower():
        case ".png":
            return read_image(file, "16-bit grey")
        case ".npy":
            # np.load would not close a file that looks like a zip archive.
            array = np.lib.format.open_memmap(file, mode="r")
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
            raise UserError(f"{file} has several pages; save a single page.")
        _check_array(file, page.shape, page.dtype)
        if page.compression not in _TIFF_PLAIN + _TIFF_DEFLATE:
            name = tifffile.COMPRESSION(page.compression).name
            raise UserError(f"{file} is compressed by {name}; save it without compression.")
        if page.compression in _TIFF_DEFLATE:
            _check_inflated(file, page)
        return upright(page.asarray(), page.tags.valueof(_ORIENTATION_TAG, default=1))


def _check_inflated(file: Path, page: tifffile.TiffPage) -> None:
    """Raise UserError if a compressed strip or tile inflates beyond the size of the whole image."""
    with file.open("rb") as stream:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            stream.seek(offset)
            inflater = zlib.decompressobj()
            inflater.decompress(stream.read(count), page.nbytes)
            if inflater.unconsumed_tail:
                raise UserError(f"{file} inflates to more than its size; replace it.")


def _check_array(file: Path, shape: tuple[int, ...], dtype: np.dtype | None) -> None:
    """Raise UserError unless an array holds numbers, has a valid shape and is small enough."""
    if dtype is None or dtype.kind not in "iuf":
        raise UserError(f"{file} holds {dtype}; save integers or floats.")
    if len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (3,)):
        raise UserError(f"{file} has the shape {shape}; save (rows, columns), or (rows, columns, 3) for x, y and z.")
    check_size(file, shape[1], shape[0])
