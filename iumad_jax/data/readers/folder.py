"""Reader of custom objects in folders, with optional settings in dataset.yaml."""

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iumad_jax.data import depth
from iumad_jax.data.formats.depth_files import UNITS
from iumad_jax.data.formats.files import abbreviate, opening, read_yaml, select
from iumad_jax.data.formats.images import used_bits
from iumad_jax.data.readers.arrangements import Named, list_object, object_folders
from iumad_jax.data.readers.layout import Item, read_item
from iumad_jax.data.sample import Alignment, Camera, DepthFormat, Sample, Split
from iumad_jax.errors import UserError, tell_once

SETTINGS = "dataset.yaml"

_CAMERA = ("fx", "fy", "cx", "cy")
_LENGTHS = ("object_height", "height_range")
_DEFAULTS = {"object_height": 0.005, "height_range": 0.1, "normals_window": 3}  # metres, metres, pixels
_STEEPEST = 10  # largest range of heights per longer side of a height map; a larger one means a wrong unit or pitch


class Folder:
    """Reader of `<root>/<object>/{train,val,test}/{good,<defect>}/{rgb,depth,mask}/<id>.*` and other `arrangements`.

    `val`, `test` and whole `depth` and `mask` folders are optional, and `rgb` beside `depth`; images without labels
    belong in `<object>/unlabelled/{rgb,depth}`. RGB: see `images.read_photograph`. Depth: see `depth_files.read_depth`.
    Masks: 0 where good. All images of one id must have one size, but for depth with `align`.

    `<root>/dataset.yaml` may have these keys:
        unit: Unit of depth: m, cm, mm, um, or metres per level; required for integers, else metres by default.
        missing: List of the values, in this unit, of pixels without a measurement, besides 0 and those that are not
            finite; by default such constants are looked for.
        kind: depth, or height if larger is higher, as in the height maps of laser profilers, which also need `pitch`.
        pitch: Millimetres per pixel in x and y of height maps, which have no camera.
        align: resize, if depth and photographs show one view in two resolutions; or, if they have two cameras, `camera`
            (fx, fy, cx, cy of photographs) and `matrix` (4 x 4, from the depth camera's coordinates, metres).
        camera: fx, fy, cx, cy of depth images in pixels; unorganised clouds are projected into it. By default the focal
            length is the image's width, which keeps planes flat but changes lengths along them.
        bits: Bits that photographs of 16 bits per channel use; by default the fewest of 8, 10, 12, 14 and 16 that hold
            the first object's training images.
        object_height: Height above the background plane, in metres, from which a pixel belongs to the object (0.005;
            for height maps 1/100 of their longer side).
        height_range: Height in metres that the `height` encoding spans (0.1; for height maps 1/5 of their longer side).
        normal, abnormal, masks: Folders within each object that hold its good images, its anomalous images (one folder
            per defect) and their masks; by default the names of folders tell.
        normals_window: Window of the normals in pixels; by default the result of `depth.choose_window` for the first
            object, so that objects that come later do not change it.

    Args:
        root: Folder with one subfolder per object.
        objects: "all", names separated by commas, or a sequence of names, in the order of learning.
        needs_depth: Whether to refuse images without depth.
        needs_rgb: Whether to refuse depth without photographs.
        trusted: Folders that links may lead into, besides the root.

    Raises:
        UserError: If a folder or file is missing or empty or leads elsewhere, if the settings or an object's
            first training image are unusable, or if an object is unknown.
    """

    def __init__(
        self,
        root: str | Path,
        objects: str | Sequence[str] = "all",
        needs_depth: bool = False,
        needs_rgb: bool = False,
        trusted: Sequence[Path] = (),
    ) -> None:
        self.root = Path(root)
        self._items: dict[tuple[str, Split], dict[str, Item]] = {}
        within = (self.root, *trusted)
        by_name = object_folders(self.root, trusted)
        self.objects = select(objects, tuple(by_name))
        with opening(self.root):
            file = self.root / SETTINGS
            if not file.exists() and (other := file.with_suffix(".yml")).exists():
                file = other
            self._settings_files = (file,) if file.exists() else ()
            self._settings = _check_settings(file, read_yaml(file) if file.exists() else {})
            heights = self._settings.get("kind") == "height"
            self.depth_format = DepthFormat(
                self._settings.get("unit"), self._settings.get("missing"), heights, self._settings.get("align")
            )
            for name in self.objects:
                needed = ("rgb",) * needs_rgb + ("depth",) * needs_depth
                found = list_object(by_name[name], within, needed, self._settings.get("named"))
                self._items |= {(name, split): items for split, items in found.items()}
        first_items = self._items[self.objects[0], "train"].values()
        self._bits: int | None = self._settings.get("bits") or used_bits([x.rgb for x in first_items if x.rgb])
        # The first training images reveal mistakes common to all images.
        first, *_ = [self.read(name, "train", self.ids(name, "train")[0]) for name in self.objects]
        defaults = self._defaults(first)
        self.object_height, self.height_range, self.normals_window = (
            self._settings.get(key, value) for key, value in defaults.items()
        )

    def __repr__(self) -> str:
        return f"Folder({str(self.root)!r})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the ids of one object and split, sorted by name; test images by defect first."""
        return tuple(self._items.get((object, split), ()))

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files of RGB, depth, mask and settings that exist."""
        return self._items[object, split][id].files + self._settings_files

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample.

        Raises:
            UserError: If one of its files is unusable or they contradict each other.
        """
        file = self.root / SETTINGS
        correct = f"set the unit in {file}, for example unit: mm"
        if "unit" in self._settings:
            correct = f"correct the unit in {file}"
        return read_item(
            object,
            id,
            self._items[object, split][id],
            self.depth_format,
            remedy=f"{correct} (kind: height if larger is higher)",
            camera=self._settings.get("camera"),
            bits=self._bits,
        )

    def _defaults(self, sample: Sample) -> dict[str, Any]:
        """Derive settings from a training image, and ask about depth that looks like heights."""
        if sample.depth is None or sample.camera is None:
            return _DEFAULTS
        settings = _DEFAULTS | {"normals_window": depth.choose_window(sample.depth, sample.camera)}
        file, yaml = self._items[sample.object, "train"][sample.id].depth, self.root / SETTINGS
        if self.depth_format.heights:
            side = max(sample.depth.shape[0] / sample.camera.fy, sample.depth.shape[1] / sample.camera.fx)
            low, high = np.nanquantile(sample.depth, [0.05, 0.95])
            if high - low > _STEEPEST * side:
                raise UserError(
                    f"{file} spans heights of {high - low:.2g} m on {side:.2g} m; correct unit or pitch in {yaml}."
                )
            settings |= {"object_height": side / 100, "height_range": side / 5}
        elif "kind" not in self._settings and not sample.camera.orthographic and depth.seems_heights(sample.depth):
            tell_once(
                self.root,
                f"{file}: the border is nearer than the middle; if this is a height map, write kind: height and pitch:"
                f" [x, y] (millimetres per pixel) into {yaml}, else kind: depth.",
            )
        return settings


def _check_settings(file: Path, content: dict[Any, Any]) -> dict[str, Any]:
    """Check the content of dataset.yaml and convert it: unit in metres, a `Camera`."""
    keys = ("unit", "missing", "kind", "pitch", "align", "camera", "bits", *_LENGTHS, "normals_window", *Named._fields)
    for key in content:
        if key not in keys:
            raise UserError(f"{file} has the unknown key {abbreviate(key)}; use {', '.join(keys)}.")
    settings: dict[str, Any] = {key: _check_number(file, key, content[key]) for key in _LENGTHS if key in content}
    if "unit" in content:
        unit = content["unit"]
        settings["unit"] = UNITS.get(str(unit).lower()) or _check_number(file, "unit", unit)
    if "missing" in content:
        missing = content["missing"]
        values = missing if isinstance(missing, list) else [missing]
        settings["missing"] = tuple(_check_number(file, "missing", value, above=-math.inf) for value in values)
    kind, pitch = content.get("kind", "depth"), content.get("pitch")
    if kind not in ("depth", "height"):
        raise UserError(f"{file} has {abbreviate(kind)} as kind; use depth or height.")
    if kind == "height":
        if "unit" not in content or "camera" in content or not isinstance(pitch, list) or len(pitch) != 2:
            raise UserError(
                f"{file} has kind: height, which needs unit and pitch: [x, y] in millimetres per pixel, and no camera."
            )
        x, y = (_check_number(file, "pitch", value) / 1000 for value in pitch)
        settings["camera"] = Camera(1 / x, 1 / y, 0, 0, orthographic=True, heights=True)
    elif pitch is not None:
        raise UserError(f"{file} has pitch but not kind: height; add it, or remove pitch.")
    if "kind" in content:
        settings["kind"] = kind
    if "camera" in content:
        settings["camera"] = _check_camera(file, content["camera"])
    if "align" in content:
        settings["align"] = _check_alignment(file, content["align"], settings.get("camera"))
    if "bits" in content:
        bits = content["bits"]
        if bits not in range(8, 17) or isinstance(bits, bool):
            raise UserError(f"{file} has {abbreviate(bits)} as bits; use 8 to 16, the bits of the camera.")
        settings["bits"] = bits
    if named := {key: _check_paths(file, key, content[key]) for key in Named._fields if key in content}:
        if "normal" not in named or len(named.get("masks", " ")) != 1:
            raise UserError(f"{file} names folders but not one of normal images and at most one of masks; correct it.")
        settings["named"] = Named(named["normal"], named.get("abnormal", ()), *named.get("masks", ()))
    if "normals_window" in content:
        window = content["normals_window"]
        if window not in range(3, 100, 2) or isinstance(window, bool):
            raise UserError(f"{file} has {abbreviate(window)} as normals_window; use an odd number from 3 to 99.")
        settings["normals_window"] = window
    return settings


def _check_paths(file: Path, key: str, value: Any) -> tuple[str, ...]:
    """Check the paths of folders within an object, one or a list."""
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path.strip() and path.isprintable() for path in paths):
        raise UserError(f"{file} has {abbreviate(value)} as {key}; use the name of a folder in each object, or a list.")
    return tuple(paths)


def _check_camera(file: Path, camera: Any) -> Camera:
    if not isinstance(camera, dict) or set(camera) != set(_CAMERA):
        raise UserError(f"{file} has {abbreviate(camera)} as camera; use {', '.join(_CAMERA)} in pixels.")
    focal = [_check_number(file, f"camera: {key}", camera[key]) for key in ("fx", "fy")]
    centre = [_check_number(file, f"camera: {key}", camera[key], above=-math.inf) for key in ("cx", "cy")]
    return Camera(focal[0], focal[1], centre[0], centre[1])


def _check_alignment(file: Path, align: Any, depth_camera: Camera | None) -> Alignment | Literal["resize"]:
    if align == "resize":
        return "resize"
    matrix = align.get("matrix") if isinstance(align, dict) and set(align) == {"camera", "matrix"} else None
    if not isinstance(matrix, list) or [isinstance(row, list) and len(row) for row in matrix] != [4] * 4:
        raise UserError(f"{file} has {abbreviate(align)} as align; use resize, or camera and a 4 x 4 matrix.")
    if depth_camera is None or depth_camera.orthographic:
        raise UserError(f"{file} has align with a matrix, which needs the camera of depth images; add camera.")
    rows = tuple(tuple(_check_number(file, "align: matrix", x, above=-math.inf) for x in row) for row in matrix)
    rotation = np.array(rows)[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-2) or rows[3] != (0, 0, 0, 1):
        raise UserError(f"{file} has a matrix that does not rotate and move; use that from depth to photographs.")
    return Alignment(depth_camera, _check_camera(file, align["camera"]), rows)


def _check_number(file: Path, key: str, value: Any, above: float = 0) -> float:
    if isinstance(value, str):  # YAML takes 1e-6 for a word
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < sys.float_info.max:
        number = "a finite number" if above == -math.inf else f"a number above {above}"
        expected = f"{', '.join(UNITS)} or metres per level" if key == "unit" else number
        raise UserError(f"{file} has {abbreviate(value)} as {key}; use {expected}.")
    return float(value)
