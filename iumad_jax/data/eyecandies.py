"""The Eyecandies format (Bonfiglioli et al., ACCV 2022), which the embedded `candies` are written in too."""

import os
import re
import reprlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from iumad_jax.data.sample import Camera, Sample, Split
from iumad_jax.errors import UserError

OBJECTS = (
    "CandyCane",
    "ChocolateCookie",
    "ChocolatePraline",
    "Confetto",
    "GummyBear",
    "HazelnutTruffle",
    "LicoriceSandwich",
    "Lollipop",
    "Marshmallow",
    "PeppermintCandy",
)
DEFECTS = ("bumps", "dents", "colors", "normals")
LIGHTS = 6
MAX_SIDE = 8192  # pixels
FOCAL_LENGTH = 50 / 36  # image widths: a 50 mm lens on a 36 mm sensor, 711.11 pixels at 512

_FOLDERS: dict[Split, str] = {"train": "train", "calibration": "val", "test": "test_public"}
_SAMPLE_FILE = re.compile(r"(\d+)_\w+\.(?:png|yaml|txt)", re.ASCII)
_FARTHEST = 1000  # metres: what is farther is given in another unit
_MAX_YAML_BYTES = 1 << 16
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_KINDS = {(8, 0): "8-bit grey", (16, 0): "16-bit grey", (8, 2): "8-bit RGB"}  # (bit depth, colour type)


class Eyecandies:
    """Reads `<root>/<object>/{train,val,test_public}/data/<id>_*`.

    Args:
        root: the folder that holds one folder per object.
        objects: "all", or names separated by commas, in the order in which they are learned.
        light: which of the images under six different lights is the RGB image.

    Raises:
        UserError: a folder or file is missing or empty, leads out of the root, or an object is unknown.
    """

    object_height = 0.008
    height_range = 1.0

    def __init__(self, root: str | Path, objects: str = "all", light: int = 4) -> None:
        if light not in range(LIGHTS):
            raise UserError(f"config.dataset.light is {light}; use one of 0 to {LIGHTS - 1}.")
        self.root = Path(root)
        self.light = light
        self.objects = selected(objects)
        try:
            if not self.root.is_dir():
                raise UserError(f"config.dataset.root is {self.root}, which is not a folder; name the dataset's.")
            if not any(self.root.iterdir()):
                raise UserError(f"config.dataset.root is {self.root}, which is empty; name the dataset's folder.")
            self._ids = {(name, split): self._index(name, split) for name in self.objects for split in _FOLDERS}
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error

    def __repr__(self) -> str:
        return f"Eyecandies({str(self.root)!r}, light={self.light})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """The samples of one object and split, by number."""
        return self._ids[object, split]

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """RGB, depth, its range, mask and labels."""
        return tuple(self._folder(object, split) / f"{id}_{ending}" for ending in self._endings())

    def read(self, object: str, split: Split, id: str) -> Sample:
        """One sample.

        Raises:
            UserError: one of its files is unusable, or they do not fit together.
        """
        rgb_file, depth_file, range_file, mask_file, label_file = self.files(object, split, id)
        rgb = _read_png(rgb_file, "8-bit RGB")
        depth = _read_depth(depth_file, range_file)
        mask = _read_mask(mask_file)
        for file, array in ((depth_file, depth), (mask_file, mask)):
            if array.shape != rgb.shape[:2]:
                raise UserError(
                    f"{file} has {_size(array)} pixels but {rgb_file.name} {_size(rgb)}; a sample's images must agree."
                )
        height, width = depth.shape
        focal = FOCAL_LENGTH * width
        camera = Camera(focal, focal, (width - 1) / 2, (height - 1) / 2)
        defect = _read_defect(label_file)
        if split != "test" and defect != "good":
            raise UserError(f"{label_file} labels the image {defect}; only test images may have defects.")
        return Sample(object, id, defect, rgb, depth, mask, defect != "good", camera)

    def _endings(self) -> tuple[str, ...]:
        return f"image_{self.light}.png", "depth.png", "info_depth.yaml", "mask.png", "metadata.yaml"

    def _folder(self, object: str, split: Split) -> Path:
        return self.root / object / _FOLDERS[split] / "data"

    def _index(self, object: str, split: Split) -> tuple[str, ...]:
        """The ids in a folder whose every sample has all its files, none of them empty."""
        folder = self._folder(object, split)
        if not folder.is_dir():
            raise UserError(f"{folder} is missing; put {object} there or leave it out of config.dataset.objects.")
        self._check_inside(folder)
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
        numbered = {match[1] for match in map(_SAMPLE_FILE.fullmatch, found) if match}
        ids = tuple(sorted(numbered, key=lambda id_: (int(id_), id_)))
        if not ids:
            raise UserError(f"{folder} holds no samples; put files such as 000_{self._endings()[0]} there.")
        for name in (f"{id_}_{ending}" for id_ in ids for ending in self._endings()):
            if name not in found or not found[name].is_file():
                raise UserError(f"{folder / name} is missing; every sample needs {', '.join(self._endings())}.")
            if found[name].is_symlink():
                self._check_inside(folder / name)
            if found[name].stat().st_size == 0:
                raise UserError(f"{folder / name} is empty; restore it from the dataset.")
        return ids

    def _check_inside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{path} leads out of config.dataset.root to {path.resolve()}; put a copy in its place.")


def selected(objects: str) -> tuple[str, ...]:
    """The names that `config.dataset.objects` gives, in the order of learning.

    Raises:
        UserError: a name is unknown or given twice.
    """
    if objects == "all":
        return OBJECTS
    names = tuple(name.strip() for name in objects.split(","))
    for name in names:
        if name not in OBJECTS:
            raise UserError(f'config.dataset.objects names "{name}"; known are all and {", ".join(OBJECTS)}.')
        if names.count(name) > 1:
            raise UserError(f"config.dataset.objects names {name} twice; name it once.")
    return names


def _read_depth(file: Path, range_file: Path) -> np.ndarray:
    """Metres along the optical axis (h, w).

    The file's own values run from the nearest to the farthest pixel. None means missing: the renderer sees a surface
    everywhere. A depth that is not positive is missing all the same.
    """
    nearest, farthest = _read_range(range_file)
    depth = _read_png(file, "16-bit grey").astype(np.float32)
    depth = depth * np.float32((farthest - nearest) / 65535) + np.float32(nearest)
    depth[depth <= 0] = np.nan
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth: all of it is 0 m or less by {range_file.name}; correct either.")
    return depth


def _read_range(file: Path) -> tuple[float, float]:
    span = _read_yaml(file).get("normalization")
    metres = []
    for key in ("min", "max"):
        value = span.get(key) if isinstance(span, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _FARTHEST:
            raise UserError(
                f"{file} has {reprlib.repr(value):.40} as normalization: {key}; give metres, from 0 to {_FARTHEST}."
            )
        metres.append(float(value))
    nearest, farthest = metres
    if nearest > farthest:
        raise UserError(f"{file} has min {nearest} above max {farthest}; give the range of the depth in metres.")
    return nearest, farthest


def _read_mask(file: Path) -> np.ndarray:
    grey = _read_png(file, "8-bit grey")
    values = np.unique(grey[grey > 0])
    if len(values) > 1:
        raise UserError(f"{file} has the values {values[:5].tolist()} beside 0; a mask has 0 and one other value.")
    return grey > 0


def _read_defect(file: Path) -> str:
    labels = _read_yaml(file)
    for key in ("anomalous", *(f"anomalous_{kind}" for kind in DEFECTS)):
        if labels.get(key) not in (0, 1):
            raise UserError(f"{file} has {reprlib.repr(labels.get(key)):.40} as {key}; give 0 or 1.")
    kinds = [kind for kind in DEFECTS if labels[f"anomalous_{kind}"]]
    if bool(kinds) != bool(labels["anomalous"]):
        raise UserError(f"{file} has anomalous: {labels['anomalous']} but the kinds {kinds}; make them agree.")
    return "good" if not kinds else kinds[0] if len(kinds) == 1 else "combined"


def _read_yaml(file: Path) -> dict[Any, Any]:
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_YAML_BYTES + 1)
    except OSError as error:
        raise _unreadable(file, error) from error
    if len(text) > _MAX_YAML_BYTES:
        raise UserError(f"{file} is larger than {_MAX_YAML_BYTES} bytes; restore it from the dataset.")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is not plain YAML ({reason}); restore it from the dataset.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no keys; restore it from the dataset.")
    return content


def _read_png(file: Path, kind: str) -> np.ndarray:
    """The pixels of a PNG of one kind; its header is checked before anything is decoded."""
    try:
        with file.open("rb") as stream:
            header = stream.read(26)
            if not header:
                raise UserError(f"{file} is empty; restore it from the dataset.")
            if len(header) < 26 or not header.startswith(_PNG_START):
                raise UserError(f"{file} is not a PNG image; restore it from the dataset.")
            width, height, *found = struct.unpack(">IIBB", header[len(_PNG_START) :])
            if max(width, height) > MAX_SIDE:
                raise UserError(f"{file} has {width}x{height} pixels; use at most {MAX_SIDE}x{MAX_SIDE}.")
            if _PNG_KINDS.get((found[0], found[1])) != kind:
                named = _PNG_KINDS.get((found[0], found[1]), f"{found[0]}-bit PNG of colour type {found[1]}")
                raise UserError(f"{file} is {named}; it must be {kind}; restore it from the dataset.")
            stream.seek(0)
            with Image.open(stream, formats=("PNG",)) as image:
                return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # all that Pillow raises for what it cannot decode
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = (isinstance(error, OSError) and error.strerror) or "it is truncated or damaged"
    return UserError(f"{file} cannot be read ({reason}); restore it from the dataset.")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
