"""One RGB-D image, and what every reader of an on-disk format offers."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from iumad_jax.errors import UserError

# Good images to learn from, good images for thresholds, labelled images of all kinds, images of which nothing is known.
Split = Literal["train", "calibration", "test", "unlabelled"]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: the point (x, y, z) falls on column fx x/z + cx and row fy y/z + cy.

    Pixels; the centre of the first pixel is (0, 0). x points right, y down, z along the optical axis. An orthographic
    camera (a laser profiler, a telecentric lens) sees it on column fx x + cx and row fy y + cy, f in pixels per metre.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    orthographic: bool = False

    def __post_init__(self) -> None:
        given = self.fx, self.fy, self.cx, self.cy
        if not all(isinstance(one, Real) and math.isfinite(one) for one in given) or min(self.fx, self.fy) <= 0:
            raise UserError(f"the camera's fx, fy, cx and cy are {given}; give finite numbers, fx and fy above 0.")

    def scaled(self, factor: float) -> "Camera":
        """The same camera with that many times as many pixels per side."""
        fx, fy = self.fx * factor, self.fy * factor
        return replace(self, fx=fx, fy=fy, cx=(self.cx + 0.5) * factor - 0.5, cy=(self.cy + 0.5) * factor - 0.5)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as the dataset has it, nothing resized or filled in."""

    object: str
    id: str
    defect: str  # "good", or the dataset's own name; "unknown" in the unlabelled split
    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"] | None  # metres along the optical axis, NaN where missing; None: no sensor
    mask: Bool[np.ndarray, "h w"] | None  # True on the defect; None: nobody marked where it is
    anomalous: bool  # the dataset's own label; False where unknown
    camera: Camera | None  # of the depth image; None without one
    normals: Float32[np.ndarray, "h w 3"] | None = None  # the dataset's own, unit vectors towards the camera, its axes


class Reader(Protocol):
    """One per on-disk format. Opening one checks all that is cheap to check, so that no run fails late."""

    @property
    def objects(self) -> tuple[str, ...]:
        """The selected objects, in the order in which a protocol learns them."""

    @property
    def object_height(self) -> float:
        """Metres above the background plane from which a pixel is the object's."""

    @property
    def height_range(self) -> float:
        """Metres above the background plane that the `height` encoding spans."""

    @property
    def normals_window(self) -> int:
        """Pixels of the window in which normals are fitted, by the sensor's noise; see `depth.window_for`."""

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """The samples of one object and split, in a fixed order; none where the dataset has no such split.

        Names within a folder of the split are told apart as "folder/name".
        """

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """The files one sample is read from."""

    def read(self, object: str, split: Split, id: str) -> Sample:
        """One sample.

        Raises:
            UserError: one of its files is missing or unusable.
        """
