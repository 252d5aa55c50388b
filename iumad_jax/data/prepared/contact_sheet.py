"""What a dataset looks like to those who prepare it: some images of an object in one picture."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure

from iumad_jax.data import transforms
from iumad_jax.report.figures import HOLE, TRUTH
from iumad_jax.runtime.storage import write_whole

_SIDE = 160  # pixels of a panel
_COLUMNS = 3  # images side by side
_DPI = 100
_HEAD, _LABEL = 0.5, 0.25  # inches


class Panels:
    """One image as four panels side by side: RGB, height, normals, and RGB with the defect outlined."""

    def __init__(
        self,
        label: str,
        rgb: UInt8[np.ndarray, "h w 3"],
        height: Float32[np.ndarray, "h w"] | None,
        normals: Float32[np.ndarray, "h w 3"] | None,
        mask: Bool[np.ndarray, "h w"] | None,
        top: float,
    ) -> None:
        """Height in metres, NaN where depth is missing, in colours from 0 to `top`; None: not known."""
        small = transforms.resize_image(rgb, _SIDE)
        panels = [small, np.full_like(small, 255), np.full_like(small, 255), small.copy()]
        self.label = label
        if height is not None and normals is not None:
            self.label += f", height to {1000 * top:.0f} mm"
            nearest = transforms.resize_nearest(height, _SIDE)
            valid = np.isfinite(nearest)
            panels[1] = (colormaps["viridis"](np.where(valid, nearest, 0) / top)[..., :3] * 255).astype(np.uint8)
            panels[2] = np.clip((transforms.resize_image(normals, _SIDE) + 1) * 127.5, 0, 255).astype(np.uint8)
            panels[1][~valid] = panels[2][~valid] = _colour(HOLE)
        if mask is None:
            panels[3][:] = 255
        else:
            inside = transforms.resize_mask(mask, _SIDE)
            around = np.zeros_like(inside)
            for axis in (0, 1):
                for step in (-1, 1):
                    around |= np.roll(inside, step, axis)
            panels[3][around & ~inside] = _colour(TRUTH)
        self.pixels: UInt8[np.ndarray, "s 4s 3"] = np.concatenate(panels, axis=1)


def save(path: Path, title: str, images: Sequence[Panels]) -> None:
    """Save a JPEG with all images.

    Raises:
        UserError: the disk is full or the folder not writable.
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


def _colour(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(name[1:]))
