"""One's own objects, in folders."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iumad_jax.data import depth
from iumad_jax.data.formats.depth_files import DEPTH_IMAGES
from iumad_jax.data.formats.files import folders, opening, read_yaml, select, shown
from iumad_jax.data.formats.images import PHOTOGRAPHS
from iumad_jax.data.readers.layout import Item, good_items, items_of, labelled_items, read_item
from iumad_jax.data.sample import Camera, Sample, Split
from iumad_jax.errors import UserError

SETTINGS = "dataset.yaml"

_KINDS = {"rgb": PHOTOGRAPHS, "depth": DEPTH_IMAGES, "mask": PHOTOGRAPHS}
_UNLABELLED = {"rgb": PHOTOGRAPHS, "depth": DEPTH_IMAGES}
_SPLITS = ("train", "val", "test", "unlabelled")
_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
_CAMERA = ("fx", "fy", "cx", "cy")
_LENGTHS = {"object_height": 0.005, "height_range": 0.1}  # metres, where the file does not tell


class Folder:
    """Reads `<root>/<object>/{train,val,test}/{good,<defect>}/{rgb,depth,mask}/<id>.*`.

    `val` and `test` may be missing, and whole `depth` and `mask` folders; `<object>/unlabelled/{rgb,depth}` holds
    images of which nothing is known. RGB: 8-bit PNG, JPEG, TIFF or BMP. Depth: see `depth_files.read_depth`. Masks: 0
    where good. All images of one id have one size.

    `<root>/dataset.yaml` may have the keys `unit` of depth (m, cm, mm, or metres per level; needed for whole numbers,
    else metres), `camera` of depth images (fx, fy, cx, cy in pixels; without it the focal length is taken to be the
    image's width, which keeps planes plane but changes lengths along them), `object_height` (metres above the
    background plane from which a pixel is the object's, 0.005), `height_range` (metres that the `height` encoding
    spans, 0.1) and `normals_window` (pixels; by default `depth.window_for` the first training images).

    Args:
        root: the folder that holds one folder per object.
        objects: "all", or names, also separated by commas in one text, in the order in which they are learned.
        needs_depth: whether images without depth are refused.

    Raises:
        UserError: a folder or file is missing, empty, unusable as far as that is seen without reading all, or leads out
            of the root, or an object is unknown.
    """

    def __init__(self, root: str | Path, objects: str | Sequence[str] = "all", needs_depth: bool = False) -> None:
        self.root = Path(root)
        self._items: dict[tuple[str, Split], dict[str, Item]] = {}
        with opening(self.root):
            self.objects = select(objects, object_names(self.root))
            file = self.root / SETTINGS
            self._settings_files = (file,) if file.exists() else ()
            self._settings = _settings(file, read_yaml(file) if file.exists() else {})
            for name in self.objects:
                self._index(name, ("depth",) if needs_depth else ())
        self.object_height: float = self._settings["object_height"]
        self.height_range: float = self._settings["height_range"]
        windows = [self._window(name) for name in self.objects]
        self.normals_window: int = self._settings.get("normals_window") or sorted(windows)[len(windows) // 2]

    def __repr__(self) -> str:
        return f"Folder({str(self.root)!r})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """The samples of one object and split, by name, those of a test set by defect first."""
        return tuple(self._items.get((object, split), ()))

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """RGB, depth, mask and settings, as far as there are."""
        return self._items[object, split][id].files + self._settings_files

    def read(self, object: str, split: Split, id: str) -> Sample:
        """One sample.

        Raises:
            UserError: one of its files is unusable, or they do not fit together.
        """
        return read_item(
            object,
            id,
            self._items[object, split][id],
            unit=self._settings.get("unit"),
            remedy=f"give the unit in {self.root / SETTINGS}, for example unit: mm",
            camera=self._settings.get("camera"),
        )

    def _index(self, name: str, needed: tuple[str, ...]) -> None:
        folder = self.root / name
        for split in folders(folder, self.root):
            if split not in _SPLITS:
                raise UserError(f"{folder / split} is not one of {', '.join(_SPLITS)}; rename it or put it elsewhere.")
        self._items[name, "train"] = good_items(folder / "train", self.root, _KINDS, needed)
        if (folder / "val").exists():
            self._items[name, "calibration"] = good_items(folder / "val", self.root, _KINDS, needed)
        if (folder / "test").exists():
            self._items[name, "test"] = labelled_items(folder / "test", self.root, _KINDS, needed)
        if (folder / "unlabelled").exists():
            items = items_of("unknown", folder / "unlabelled", self.root, _UNLABELLED, needed)
            self._items[name, "unlabelled"] = items

    def _window(self, name: str) -> int:
        """For the noise of an object's first training image; reading one also finds early what all have wrong."""
        sample = self.read(name, "train", self.ids(name, "train")[0])
        if sample.depth is None or sample.camera is None:
            return 3
        return depth.window_for(sample.depth, sample.camera)


def object_names(root: Path) -> tuple[str, ...]:
    """The objects that a folder has."""
    with opening(root):
        names = folders(root, root)
    if not names:
        raise UserError(f"config.dataset.root is {root}, which holds no folder; give every object a folder there.")
    return names


def _settings(file: Path, given: dict[Any, Any]) -> dict[str, Any]:
    """The keys of dataset.yaml, checked: unit in metres, a `Camera`, lengths."""
    known = ("unit", "camera", *_LENGTHS, "normals_window")
    for key in given:
        if key not in known:
            raise UserError(f"{file} has the key {shown(key)}; known are {', '.join(known)}.")
    settings: dict[str, Any] = {key: _number(file, key, given.get(key, value)) for key, value in _LENGTHS.items()}
    if "unit" in given:
        unit = given["unit"]
        settings["unit"] = _UNITS[unit] if isinstance(unit, str) and unit in _UNITS else _number(file, "unit", unit)
    if "camera" in given:
        camera = given["camera"]
        if not isinstance(camera, dict) or set(camera) != set(_CAMERA):
            raise UserError(f"{file} has {shown(camera)} as camera; give {', '.join(_CAMERA)} in pixels.")
        focal = [_number(file, f"camera: {key}", camera[key]) for key in ("fx", "fy")]
        centre = [_number(file, f"camera: {key}", camera[key], above=-math.inf) for key in ("cx", "cy")]
        settings["camera"] = Camera(focal[0], focal[1], centre[0], centre[1])
    if "normals_window" in given:
        window = given["normals_window"]
        if window not in range(3, 100, 2) or isinstance(window, bool):
            raise UserError(f"{file} has {shown(window)} as normals_window; give 3, 5, 7 or more, up to 99.")
        settings["normals_window"] = window
    return settings


def _number(file: Path, key: str, value: Any, above: float = 0) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < sys.float_info.max:
        known = f"{', '.join(_UNITS)} or metres per level" if key == "unit" else f"a number above {above}"
        raise UserError(f"{file} has {shown(value)} as {key}; give {known}.")
    return float(value)
