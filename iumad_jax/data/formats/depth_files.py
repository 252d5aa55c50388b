"""Reads depth images and organised point clouds of several formats as metres, with NaN where depth is missing.

Sensors write a 0, NaN, an infinity or a depth below 0.1 mm or above 20 m for pixels without a measurement (REP 118 of
ROS), or the largest number of their type, a negative number or some other constant, which the user is told. Headers are
checked before anything is decoded.
"""

import logging
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import Bool, Float, Float32, Float64
from PIL import TiffImagePlugin

from iumad_jax.data.depth import project
from iumad_jax.data.formats import retry
from iumad_jax.data.formats.clouds import read_pcd, read_ply
from iumad_jax.data.formats.files import read_error
from iumad_jax.data.formats.images import check_size, read_image, upright
from iumad_jax.data.sample import Camera, DepthFormat
from iumad_jax.errors import UserError, tell_once

DEPTH_IMAGES = (".png", ".tiff", ".tif", ".npy", ".ply", ".pcd", ".pgm", ".exr")  # file suffixes

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "um": 1e-6}  # in metres

_MIN_MEDIAN = 0.005  # metres; a smaller median depth means a wrong unit
_MIN_DEPTH, _MAX_DEPTH = 1e-4, 20.0  # metres; depths outside count as missing; a larger median means a wrong unit
_NAMES: dict[float, str] = {0: "metres", -2: "centimetres", -3: "millimetres", -6: "micrometres"}  # 10**key metres
_MAX_ERROR = 0.01  # largest distance of points from the rays of their pixels over the image's longer side
_MAX_NEGATIVE = 0.05  # a larger share of negative depths does not mean missing pixels but another axis, as do
_NEAR_ZERO = 0.1  # positive ones below this share of their median
_SATURATED = {"999", "9999", "99999", "999999", "1023", "2047", "4095", "8191", "16383", "32767", "65534", "65535"}
_ROUNDS, _MAX_POINTS = 4, 20_000  # for the robust fit of the camera
logging.getLogger("tifffile").disabled = True  # damaged files raise a UserError instead of its log lines
_ORIENTATION_TAG = 0x0112
_TIFF_PLAIN, _TIFF_DEFLATE, _TIFF_PILLOW = (1,), (8, 32946), (5, 32773)  # compression codes; the last LZW, PackBits
_FLOATING_POINT, _PILLOW_MODES = 3, ("I;16", "I;16B", "I", "F")  # predictor, modes of a single exact channel
_PGM = re.compile(rb"P5(?:\s+#[^\n]*\n|\s)+(\d+)(?:\s+#[^\n]*\n|\s)+(\d+)(?:\s+#[^\n]*\n|\s)+(\d+)\s")


class WrongUnit(UserError):
    """A missing or wrong unit of depth."""


def read_depth(
    file: Path, format_: DepthFormat, size: tuple[int, int] | None, remedy: str, camera: Camera | None = None
) -> tuple[Float32[np.ndarray, "h w"], Camera | None]:
    """Read depth in metres from a depth image or an organised cloud.

    Args:
        file: A 16-bit grey PNG; a TIFF or .npy with one channel (depth) or three (x, y and z); a PLY or PCD cloud.
        format_: What the file's numbers mean.
        size: Rows and columns of the photograph, used for PLY clouds whose header lacks them; None without photograph.
        remedy: Advice on a missing or wrong unit, the end of the error message.
        camera: Camera into whose image of `size` the points of unorganised clouds are projected.

    Returns:
        Depth or heights (h, w), NaN where missing, and the camera estimated from a cloud, None for a depth image.

    Raises:
        UserError: If the file cannot be read, holds no depth, or its unit is missing or wrong.
    """
    try:
        values = retry.after_system_error(_decode, file, size)
    except UserError:
        raise
    except Exception as error:  # damaged files make the decoders raise errors of any type
        raise read_error(file, error) from error
    if format_.unit is None and values.dtype.kind in "iu":
        raise WrongUnit(f"{file} holds integers of an unknown unit; {remedy}.")
    with np.errstate(over="ignore", invalid="ignore"):  # missing values may be huge or NaN
        metres = values.astype(np.float32) * np.float32(format_.unit or 1)
        depth, levels = (metres, values) if values.ndim == 2 else (metres[..., 2], values[..., 2])
        depth = np.where(_measured(levels, file, format_) & np.isfinite(depth), depth, np.float32(np.nan))
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth; replace it.")
    if format_.heights:
        depth[np.abs(depth) > _MAX_DEPTH] = np.nan
    else:
        check_distance(depth, file, remedy, format_.unit)
        depth[(depth < _MIN_DEPTH) | (depth > _MAX_DEPTH)] = np.nan
    if metres.ndim == 2:
        return depth, None
    return _of_cloud(np.dstack([metres[..., :2], depth]), file, format_, size, camera)


def _of_cloud(
    cloud: Float32[np.ndarray, "h w 3"],
    file: Path,
    format_: DepthFormat,
    size: tuple[int, int] | None,
    camera: Camera | None,
) -> tuple[Float32[np.ndarray, "h2 w2"], Camera]:
    """Return the depth of a cloud and its camera; for the arguments see `read_depth`.

    The camera of an organised cloud is estimated. Other clouds, of one row or in no order, are projected.
    """
    if len(cloud) > 1:
        try:
            fitted = fit_camera(cloud, file)
            if format_.heights and not fitted.orthographic:
                raise UserError(f"{file} is no height map: its points lie on a camera's rays; remove kind: height.")
            return cloud[..., 2], replace(fitted, heights=format_.heights)
        except UserError:
            if camera is None or format_.heights:
                raise
    if size is None or camera is None or format_.heights:
        raise UserError(
            f"{file} is not organised: it has {cloud[..., 2].size} points in no rows and columns; save it with them, or"
            " give the camera of its depth images, into which the points are then projected."
        )
    depth = project(cloud.reshape(-1, 3), camera, size)
    if np.isnan(depth).all():
        raise UserError(f"{file} has no point in the camera's image; correct the camera.")
    return depth, camera


def _measured(levels: np.ndarray, file: Path, format_: DepthFormat) -> Bool[np.ndarray, "h w"]:
    """Find the pixels that hold a measurement; other numbers than 0, NaN and infinities are told once.

    In height maps, only counts from 0 have 0 where nothing was measured.

    Raises:
        UserError: If many depths are negative.
    """
    named = np.asarray(format_.missing or (), levels.dtype if levels.dtype.kind == "f" else np.float64)
    valid = np.isfinite(levels) & ~np.isin(levels, named)
    if not format_.heights or levels.dtype.kind == "u":
        valid &= levels != 0

    def leave_out(pixels: np.ndarray, what: str) -> None:
        if (share := (valid & pixels).mean()) > 0:
            sentence = f"{file}: {share:.2%} of its pixels hold {what}, which no sensor measures; they count as missing"
            tell_once(("missing", what), f"{sentence} (dataset.yaml may list such values, or none, as missing: []).")
            np.logical_and(valid, ~pixels, out=valid)

    if levels.dtype.kind in "iu":
        for limit in np.iinfo(levels.dtype).max, np.iinfo(levels.dtype).min:
            leave_out(levels == limit, f"{limit}")
    negative = levels[valid & (levels < 0)]
    if len(negative) and not format_.heights:
        lowest = f"{negative.min():g}"
        positive = levels[valid & (levels > 0)]
        crosses_zero = len(positive) == 0 or positive.min() < _NEAR_ZERO * np.median(positive)
        if crosses_zero or (len(negative) > _MAX_NEGATIVE * valid.sum() and np.ptp(negative)):
            raise UserError(
                f"{file} has a depth of {lowest}; depth must be the distance from the sensor, above 0 (if larger is"
                " higher, write kind: height into dataset.yaml)."
            )
        leave_out(levels < 0, lowest)
    if format_.missing is None:
        for value in _constants_apart(levels[valid].astype(np.float64), format_.heights):
            leave_out(levels == value, f"{value:g}")
    return valid


def _constants_apart(levels: Float64[np.ndarray, " n"], heights: bool) -> Iterator[float]:
    """Find repeated values, at most three at either end, that are too far from all other levels to be measured.

    Such depths are more than twice their neighbour, and differ from it by ten times the range of the others, or are
    known as the largest number of some sensor, in any decimal unit. Heights have no scale but their range: theirs
    differ by ten times it, or twice if known, at the lower end, too.
    """
    for end in (np.max, np.min) if heights else (np.max,):
        for _ in range(3):
            value = end(levels) if len(levels) else 0
            others = levels[levels != value]
            if not 0 < len(others) < len(levels) - 1:
                break
            neighbour = end(others)
            digits = f"{value:.6g}".partition("e")[0].replace(".", "").strip("0")
            known = digits in _SATURATED and value > neighbour
            gap, span = abs(value - neighbour), np.ptp(others)
            if heights:
                apart = span > 0 and gap > (2 if known else 10) * span
            else:
                apart = value > 2 * neighbour and (known or gap > 10 * span)
            if not apart:
                break
            yield value
            levels = others


def check_distance(depth: Float[np.ndarray, "h w"], file: Path, remedy: str, unit: float | None = None) -> None:
    """Raise UserError unless the valid pixels of a depth image are plausible distances in metres.

    Args:
        depth: Depth in metres, NaN where missing.
        file: File of the image.
        remedy: Advice on a wrong unit, the end of the error message.
        unit: Metres per unit with which the file was read; None for metres.
    """
    nearest, median = np.nanmin(depth), float(np.nanmedian(depth))
    if nearest < 0:
        raise UserError(f"{file} has a depth of {nearest:.3g} m; depth must be the distance from the sensor, above 0.")
    if not _MIN_MEDIAN <= median <= _MAX_DEPTH:
        magnitude = math.log10(max(median, float(np.finfo(np.float32).tiny)))
        exponent = 3 * round(magnitude / 3)  # most units differ by thousands
        if not -1 <= magnitude - exponent <= 1:
            exponent = round(magnitude)  # to be about a metre
        read, true = (_NAMES.get(round(math.log10(unit or 1) - difference, 6)) for difference in (0, exponent))
        size = "large" if exponent > 0 else "small"
        wrong = (
            f"{true} were read as {read}" if read and true else f"the unit were {10 ** abs(exponent)} times too {size}"
        )
        raise WrongUnit(f"{file} has a median depth of {median:.4g} m, as if {wrong}; {remedy}.")


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


def _decode(file: Path, size: tuple[int, int] | None) -> np.ndarray:
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
        case ".pgm":
            return _read_pgm(file)
        case ".exr":
            return _read_exr(file)
        case _:
            return _read_tiff(file)


def _read_tiff(file: Path) -> np.ndarray:
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if tiff.pages.is_multipage:
            raise UserError(f"{file} has several pages; save a single page.")
        _check_array(file, page.shape, page.dtype)
        if len(page.shape) == 2 and (page.compression in _TIFF_PILLOW or page.predictor == _FLOATING_POINT):
            with file.open("rb") as stream, TiffImagePlugin.TiffImageFile(stream) as image:
                check_size(file, *image.size)
                if image.mode in _PILLOW_MODES:
                    return np.array(image)
        if page.compression not in _TIFF_PLAIN + _TIFF_DEFLATE or page.predictor == _FLOATING_POINT:
            name = tifffile.COMPRESSION(page.compression).name
            raise UserError(f"{file} is compressed by {name}; save it without compression.")
        if page.compression in _TIFF_DEFLATE:
            _check_inflated(file, page)
        return upright(page.asarray(), page.tags.valueof(_ORIENTATION_TAG, default=1))


def _read_pgm(file: Path) -> np.ndarray:
    content = file.read_bytes()
    header = _PGM.match(content[:4096])
    if not header or not 255 < int(header[3]) < 65536:
        raise UserError(f"{file} is no binary PGM of 16 bits; save it as such, or as PNG.")
    width, height, _ = map(int, header.groups())
    check_size(file, width, height)
    _check_array(file, (height, width), np.dtype(np.uint16))
    return np.frombuffer(content, ">u2", height * width, header.end()).reshape(height, width).astype(np.uint16)


def _read_exr(file: Path) -> np.ndarray:
    try:
        import OpenEXR
    except ImportError as error:
        raise UserError(f"{file} needs OpenEXR; install iumad-jax[exr], or save it as TIFF.") from error
    with file.open("rb") as stream:
        if stream.read(4) != b"v/1\x01":
            raise UserError(f"{file} is not an EXR image; replace it.")
    low, high = OpenEXR.File(str(file), header_only=True).header()["dataWindow"]
    check_size(file, *(int(side) + 1 for side in high - low))
    channels = OpenEXR.File(str(file), separate_channels=True).channels()
    first, *others = (channel.pixels for channel in channels.values())
    if not all(np.array_equal(first, other, equal_nan=True) for other in others):
        raise UserError(f"{file} has the channels {', '.join(channels)}, which differ; save depth alone.")
    _check_array(file, first.shape, first.dtype)
    return first


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
