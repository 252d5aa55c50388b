"""Brings depth of another resolution, or of another camera, to the view of its photograph."""

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from iumad_jax.data.depth import backproject, project
from iumad_jax.data.sample import Alignment, Camera
from iumad_jax.errors import UserError

_EDGE = 1.05  # ratio of neighbouring depths above which a surface ends between them
_MAX_STEPS = 8  # per pixel and axis


def align(
    depth: Float32[np.ndarray, "h w"],
    camera: Camera | None,
    alignment: Alignment | Literal["resize"] | None,
    size: tuple[int, int],
    file: Path,
    rgb_file: Path,
) -> tuple[Float32[np.ndarray, "h2 w2"], Camera | None]:
    """Bring depth to the view of its photograph.

    Args:
        depth: Depth in metres, NaN where missing.
        camera: Camera estimated from a cloud; None for a depth image.
        alignment: See `DepthFormat`.
        size: Rows and columns of the photograph.
        file: File of the depth, for messages.
        rgb_file: File of the photograph, for messages.

    Returns:
        Depth and its camera, None for that of the dataset. With `resize`, the depth keeps its own resolution.

    Raises:
        UserError: If depth and photograph differ in size and are not aligned, or if they have nothing in common.
    """
    sizes = f"{file} has {depth.shape[1]}x{depth.shape[0]} pixels but {rgb_file} has {size[1]}x{size[0]}"
    if alignment is None:
        if depth.shape != size:
            raise UserError(
                f"{sizes}; save both in one size, or, before training, write align: into dataset.yaml: resize if they"
                " show one view, else the camera of the photographs and a matrix."
            )
        return depth, camera
    if alignment == "resize":
        if abs(depth.shape[0] * size[1] - depth.shape[1] * size[0]) > max(*size, *depth.shape):
            raise UserError(
                f"{sizes}, which is no view in two resolutions; replace align: resize in dataset.yaml by the camera of"
                " the photographs and a matrix."
            )
        return depth, camera
    return _warp(depth, camera or alignment.depth, alignment, size, file), alignment.rgb


def _warp(
    depth: Float32[np.ndarray, "h w"], camera: Camera, alignment: Alignment, size: tuple[int, int], file: Path
) -> Float32[np.ndarray, "h2 w2"]:
    """Project depth into the photographs' camera, with steps between pixels where that has more of them."""
    steps = int(np.ceil(1.5 * max(alignment.rgb.fx / camera.fx, alignment.rgb.fy / camera.fy)))
    steps = min(max(steps, 1), _MAX_STEPS)
    finer = camera.scaled(steps)
    points = backproject(_refined(depth, steps), finer).reshape(-1, 3)
    points = points[np.isfinite(points).all(-1)]
    matrix = np.asarray(alignment.matrix)
    warped = project(points @ matrix[:3, :3].T + matrix[:3, 3], alignment.rgb, size)
    if np.isnan(warped).all():
        raise UserError(f"{file} lies outside of its photograph; correct align in dataset.yaml.")
    return warped


def _refined(depth: Float32[np.ndarray, "h w"], steps: int) -> Float32[np.ndarray, "h2 w2"]:
    """Interpolate 1/z, which is linear on planes, between pixels of one surface, and repeat the nearest elsewhere."""
    rows, columns = ((np.arange(side * steps) + 0.5) / steps - 0.5 for side in depth.shape)
    grid = np.meshgrid(rows, columns, indexing="ij")
    nearest = ndimage.map_coordinates(depth, grid, order=0, mode="nearest")
    with np.errstate(invalid="ignore"):
        smooth = ndimage.maximum_filter(depth, 3) < _EDGE * ndimage.minimum_filter(depth, 3)  # False at missing pixels
    smooth &= ndimage.minimum_filter(np.isfinite(depth), 3)
    inverse = ndimage.map_coordinates(1 / np.where(np.isfinite(depth), depth, 1), grid, order=1, mode="nearest")
    return np.where(ndimage.map_coordinates(smooth, grid, order=0, mode="nearest"), 1 / inverse, nearest)
