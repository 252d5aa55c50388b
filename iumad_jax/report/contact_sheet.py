"""Draws contact sheets: several images of an object in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_dilation

from iumad_jax.report import figures
from iumad_jax.report.figures import HOLE, TRUTH

_SIDE = 160  # side of a panel, pixels
_COLUMNS = 12  # panels per row
_DPI = 100
_HEAD, _LABEL = 0.5, 0.25  # inches


class Panels(NamedTuple):
    """Pictures of one image side by side, with a title."""

    label: str
    pixels: UInt8[np.ndarray, "m m*panels 3"]


def describe(label: str, arrays: Mapping[str, np.ndarray], masked: bool) -> Panels:
    """Draw four panels of one image: RGB, height, encoded depth, and RGB with the defect outlined.

    Args:
        label: Title of the panels.
        arrays: Arrays of `data.prepared.processing`; missing ones leave their panels white.
        masked: Whether the defect is annotated.
    """
    rgb, height = arrays["thumbnail"], arrays["height"]
    panels = [rgb, np.full_like(rgb, 255), np.full_like(rgb, 255), np.full_like(rgb, 255)]
    valid = np.isfinite(height)
    if valid.any():
        workpiece = arrays["workpiece"] & valid  # parts cut off by the image may be higher
        top = max(float(np.percentile(height[workpiece if workpiece.any() else valid], 99)), 1e-6)
        label += f", height to {1000 * top:.0f} mm"
        panels[1] = (colormaps["viridis"](np.where(valid, height, 0) / top)[..., :3] * 255).astype(np.uint8)
        panels[1][~valid] = _colour(HOLE)
    if "images_depth" in arrays:
        encoded = Image.fromarray(arrays["images_depth"].clip(0, 255).astype(np.uint8))
        panels[2] = np.asarray(encoded.resize(rgb.shape[1::-1]))
        panels[2] = np.where(valid[..., None], panels[2], _colour(HOLE))
    if masked:
        inside = arrays["mask"]
        panels[3] = np.where((binary_dilation(inside) & ~inside)[..., None], _colour(TRUTH), rgb)
    return Panels(label, np.concatenate(panels, axis=1))


def save(path: Path, title: str, images: Sequence[Panels]) -> None:
    """Save the panels of all images as one JPEG.

    Args:
        path: A .jpg in an existing folder.
        title: Title of the picture.
        images: Panels of each image, equally many.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    side, length, _ = images[0].pixels.shape
    panels = length // side
    columns = _COLUMNS // panels
    rows = -(-len(images) // columns)
    width, height = columns * panels * _SIDE / _DPI, _HEAD + rows * (_SIDE / _DPI + _LABEL)
    figure = Figure((width, height), dpi=_DPI)
    figure.suptitle(title, x=0.005, y=1 - 0.1 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        bottom = height - _HEAD - (row + 1) * (_SIDE / _DPI + _LABEL)
        box = (column / columns, bottom / height, 0.99 / columns, _SIDE / _DPI / height)
        axes = figure.add_axes(box)
        axes.imshow(image.pixels, aspect="auto")
        axes.set_axis_off()
        axes.set_title(image.label, fontsize=9, loc="left", pad=3)
    figures.save(path, figure, quality=85, subsampling=0)


def _colour(name: str) -> UInt8[np.ndarray, "3"]:
    return np.frombuffer(bytes.fromhex(name[1:]), np.uint8)
