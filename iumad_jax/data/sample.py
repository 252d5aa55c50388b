"""RGB-D samples, their cameras and the interface of dataset readers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from iumad_jax.errors import UserError

# In this order: good training images, good images that set thresholds, good and anomalous images with labels, images
# without labels.
Split = Literal["train", "calibration", "test", "unlabelled"]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, which projects the point (x, y, z) to column fx x/z + cx and row fy y/z + cy.

    fx, fy, cx and cy are in pixels; the centre of the first pixel is (0, 0). x points right, y down, z along the
    optical axis. An orthographic camera (a laser profiler, a telecentric lens) projects the point to
    column fx x + cx and row fy y + cy, with fx and fy in pixels per metre. The origin of its z is arbitrary, and if it
    measures heights, its depth images hold -z.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    orthographic: bool = False
    heights: bool = False

    def __post_init__(self) -> None:
        numbers = self.fx, self.fy, self.cx, self.cy
        if not all(isinstance(x, Real) and math.isfinite(x) for x in numbers) or min(self.fx, self.fy) <= 0:
            raise UserError(f"the camera's fx, fy, cx and cy are {numbers}; use finite numbers, fx and fy above 0.")

    def scaled(self, factor: float) -> "Camera":
        """Return the camera of the image resized by a factor per side."""
        fx, fy = self.fx * factor, self.fy * factor
        return replace(self, fx=fx, fy=fy, cx=(self.cx + 0.5) * factor - 0.5, cy=(self.cy + 0.5) * factor - 0.5)


@dataclass(frozen=True)
class Alignment:
    """How depth that is not aligned with its photograph pixel by pixel is related to it.

    Attributes:
        depth: Camera of depth images.
        rgb: Camera of photographs.
        matrix: Rows of the 4 x 4 matrix from coordinates of the depth camera to those of the photographs', in metres.
    """

    depth: Camera
    rgb: Camera
    matrix: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class DepthFormat:
    """What the numbers in depth files mean.

    Attributes:
        unit: Metres per unit; None reads floats as metres and refuses integers.
        missing: Values, in the file's unit, of pixels without a measurement, besides those that never are one (see
            `depth_files.read_depth`); None looks for them.
        heights: Whether larger is higher, as laser profilers write it, and not farther from the sensor.
        align: How depth comes to the view of its photograph: None if both are aligned pixel by pixel, "resize" if only
            their resolutions differ.
    """

    unit: float | None = None
    missing: tuple[float, ...] | None = None
    heights: bool = False
    align: Alignment | Literal["resize"] | None = None

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> "DepthFormat":
        """Return the format that `Store.describe` recorded as JSON."""
        missing, align = fields["missing"], fields["align"]
        if isinstance(align, Mapping):
            cameras = {name: Camera(**align[name]) for name in ("depth", "rgb")}
            align = Alignment(**cameras, matrix=tuple(map(tuple, align["matrix"])))
        return cls(**{**fields, "missing": None if missing is None else tuple(missing), "align": align})


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as stored in the dataset, neither resized nor filled in.

    Depth may have another resolution than the photograph if both show the same view.
    """

    object: str
    id: str
    defect: str  # "good", or the dataset's name for the defect; "unknown" in the unlabelled split
    rgb: UInt8[np.ndarray, "h w 3"]  # without a photograph, `depth.picture`
    depth: Float32[np.ndarray, "hd wd"] | None  # metres along the optical axis (or heights), NaN where missing
    mask: Bool[np.ndarray, "h w"] | None  # True on the defect; None where not annotated
    anomalous: bool  # the dataset's label; False where unknown
    camera: Camera | None  # camera of the depth image; None without depth
    normals: Float32[np.ndarray, "hd wd 3"] | None = None  # the dataset's unit normals towards the camera, in its axes
    bits: int | None = None  # that the photograph's file uses of 16, scaled to 8; None if it has 8


class Reader(Protocol):
    """Reader of one dataset layout. Opening it makes every cheap check, so that runs fail early."""

    @property
    def objects(self) -> tuple[str, ...]:
        """Selected objects, in the order in which a protocol learns them."""

    @property
    def object_height(self) -> float:
        """Height above the background plane, in metres, from which a pixel belongs to the object."""

    @property
    def height_range(self) -> float:
        """Height above the background plane, in metres, that the `height` encoding spans."""

    @property
    def normals_window(self) -> int:
        """Side of the window that normals are fitted in, pixels; chosen by sensor noise, see `depth.choose_window`."""

    @property
    def depth_format(self) -> DepthFormat:
        """What the numbers in depth files mean, remembered for files to predict."""

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the sample ids of one object and split, in a fixed order; empty if the dataset lacks the split.

        Ids of samples in subfolders of the split are "folder/name".
        """

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files that a sample is read from, that of RGB first."""

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample.

        Raises:
            UserError: If one of its files is missing or unusable.
        """
