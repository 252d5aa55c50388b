"""Reader of custom objects in folders, with optional settings in dataset.yaml."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iumad_jax.data import depth
from iumad_jax.data.formats.files import abbreviate, opening, read_yaml, select
from iumad_jax.data.formats.images import used_bits
from iumad_jax.data.readers.arrangements import Named, list_object, object_folders
from iumad_jax.data.readers.layout import Item, read_item
from iumad_jax.data.sample import Camera, Sample, Split
from iumad_jax.errors import UserError

SETTINGS = "dataset.yaml"

_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_CAMERA = ("fx", "fy", "cx", "cy")
_LENGTHS = {"object_height": 0.005, "height_range": 0.1}  # defaults, metres


class Folder:
    """Reader of `<root>/<object>/{train,val,test}/{good,<defect>}/{rgb,depth,mask}/<id>.*` and other `arrangements`.

    `val`, `test` and whole `depth` and `mask` folders are optional; images without labels belong in
    `<object>/unlabelled/{rgb,depth}`. RGB: see `images.read_photograph`. Depth: see `depth_files.read_depth`. Masks: 0
    where good. All images of one id must have one size.

    `<root>/dataset.yaml` may have these keys:
        unit: Unit of depth: m, cm, mm, or metres per level; required for integers, else metres by default.
        camera: fx, fy, cx, cy of depth images in pixels. By default the focal length is the image's width, which keeps
            planes flat but changes lengths along them.
        bits: Bits that photographs of 16 bits per channel use; by default the fewest of 8, 10, 12, 14 and 16 that hold
            the first object's training images.
        object_height: Height above the background plane, in metres, from which a pixel belongs to the object (0.005).
        height_range: Height in metres that the `height` encoding spans (0.1).
        normal, abnormal, masks: Folders within each object that hold its good images, its anomalous images (one folder
            per defect) and their masks; by default the names of folders tell.
        normals_window: Window of the normals in pixels; by default the result of `depth.choose_window` for the first
            object, so that objects that come later do not change it.

    Args:
        root: Folder with one subfolder per object.
        objects: "all", names separated by commas, or a sequence of names, in the order of learning.
        needs_depth: Whether to refuse images without depth.

    Raises:
        UserError: If a folder or file is missing or empty or leads out of the root, if the settings or an object's
            first training image are unusable, or if an object is unknown.
    """

    def __init__(self, root: str | Path, objects: str | Sequence[str] = "all", needs_depth: bool = False) -> None:
        self.root = Path(root)
        self._items: dict[tuple[str, Split], dict[str, Item]] = {}
        by_name = object_folders(self.root)
        self.objects = select(objects, tuple(by_name))
        with opening(self.root):
            file = self.root / SETTINGS
            self._settings_files = (file,) if file.exists() else ()
            self._settings = _check_settings(file, read_yaml(file) if file.exists() else {})
            for name in self.objects:
                found = list_object(
                    by_name[name], self.root, ("depth",) if needs_depth else (), self._settings.get("named")
                )
                self._items |= {(name, split): items for split, items in found.items()}
        self._bits: int | None = self._settings.get("bits") or used_bits(
            [item.rgb for item in self._items[self.objects[0], "train"].values()]
        )
        self.object_height: float = self._settings["object_height"]
        self.height_range: float = self._settings["height_range"]
        first, *_ = [self._window(name) for name in self.objects]
        self.normals_window: int = self._settings.get("normals_window") or first

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
        return read_item(
            object,
            id,
            self._items[object, split][id],
            unit=self._settings.get("unit"),
            remedy=f"set the unit in {self.root / SETTINGS}, for example unit: mm",
            camera=self._settings.get("camera"),
            bits=self._bits,
        )

    def _window(self, name: str) -> int:
        """Choose the window of normals for the first training image, which reveals mistakes common to all images."""
        sample = self.read(name, "train", self.ids(name, "train")[0])
        if sample.depth is None or sample.camera is None:
            return 3
        return depth.choose_window(sample.depth, sample.camera)


def _check_settings(file: Path, content: dict[Any, Any]) -> dict[str, Any]:
    """Check the content of dataset.yaml and convert it: unit in metres, a `Camera`, lengths with defaults."""
    keys = ("unit", "camera", "bits", *_LENGTHS, "normals_window", *Named._fields)
    for key in content:
        if key not in keys:
            raise UserError(f"{file} has the unknown key {abbreviate(key)}; use {', '.join(keys)}.")
    settings: dict[str, Any] = {
        key: _check_number(file, key, content.get(key, value)) for key, value in _LENGTHS.items()
    }
    if "unit" in content:
        unit = content["unit"]
        settings["unit"] = (
            _UNITS[unit] if isinstance(unit, str) and unit in _UNITS else _check_number(file, "unit", unit)
        )
    if "camera" in content:
        camera = content["camera"]
        if not isinstance(camera, dict) or set(camera) != set(_CAMERA):
            raise UserError(f"{file} has {abbreviate(camera)} as camera; use {', '.join(_CAMERA)} in pixels.")
        focal = [_check_number(file, f"camera: {key}", camera[key]) for key in ("fx", "fy")]
        centre = [_check_number(file, f"camera: {key}", camera[key], above=-math.inf) for key in ("cx", "cy")]
        settings["camera"] = Camera(focal[0], focal[1], centre[0], centre[1])
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


def _check_number(file: Path, key: str, value: Any, above: float = 0) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < sys.float_info.max:
        expected = f"{', '.join(_UNITS)} or metres per level" if key == "unit" else f"a number above {above}"
        raise UserError(f"{file} has {abbreviate(value)} as {key}; use {expected}.")
    return float(value)
