"""Draws contact sheets: several images of an object in one picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_dilation

from iumad_jax.report.figures import HOLE, TRUTH
from iumad_jax.runtime.storage import write_whole

_SIDE = 160  # side of a panel, pixels
_COLUMNS = 3  # images per row
_DPI = 100
_HEAD, _LABEL = 0.5, 0.25  # inches


class Panels:
    """Four panels of one image: RGB, height, encoded depth, and RGB with the defect outlined."""

    def __init__(self, label: str, arrays: Mapping[str, np.ndarray], masked: bool) -> None:
        """Draw the panels; missing ones stay white.

        Args:
            label: Title of the panels.
            arrays: Arrays of `data.prepared.processing`.
            masked: Whether the defect is annotated.
        """
        rgb, height = arrays["thumbnail"], arrays["height"]
        panels = [rgb, np.full_like(rgb, 255), np.full_like(rgb, 255), np.full_like(rgb, 255)]
        self.label, valid = label, np.isfinite(height)
        if valid.any():
            workpiece = arrays["workpiece"] & valid  # parts cut off by the image may be higher
            top = max(float(np.percentile(height[workpiece if workpiece.any() else valid], 99)), 1e-6)
            self.label += f", height to {1000 * top:.0f} mm"
            panels[1] = (colormaps["viridis"](np.where(valid, height, 0) / top)[..., :3] * 255).astype(np.uint8)
            panels[1][~valid] = _colour(HOLE)
        if "images_depth" in arrays:
            encoded = Image.fromarray(arrays["images_depth"].clip(0, 255).astype(np.uint8))
            panels[2] = np.asarray(encoded.resize(rgb.shape[1::-1]))
            panels[2] = np.where(valid[..., None], panels[2], _colour(HOLE))
        if masked:
            inside = arrays["mask"]
            panels[3] = np.where((binary_dilation(inside) & ~inside)[..., None], _colour(TRUTH), rgb)
        self.pixels: UInt8[np.ndarray, "m 4m 3"] = np.concatenate(panels, axis=1)


def save(path: Path, title: str, images: Sequence[Panels]) -> None:
    """Save the panels of all images as one JPEG.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    rows = -(-len(images) // _COLUMNS)
    width, height = _COLUMNS * 4 * _SIDE / _DPI, _HEAD + rows * (_SIDE / _DPI + _LABEL)
    figure = Figure((width, height), dpi=_DPI)
    figure.suptitle(title, x=0.005, y=1 - 0.1 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    for index, image in enumerate(images):
        row, column = divmod(index, _COLUMNS)
        bottom = height - _HEAD - (row + 1) * (_SIDE / _DPI + _LABEL)
        box = (column / _COLUMNS, bottom / height, 0.99 / _COLUMNS, _SIDE / _DPI / height)
        axes = figure.add_axes(box)
        axes.imshow(image.pixels, aspect="auto")
        axes.set_axis_off()
        axes.set_title(image.label, fontsize=9, loc="left", pad=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="jpg", pil_kwargs={"quality": 85, "subsampling": 0})
    write_whole(path, picture.getvalue())


def _colour(name: str) -> UInt8[np.ndarray, "3"]:
    return np.frombuffer(bytes.fromhex(name[1:]), np.uint8)
