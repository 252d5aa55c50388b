"""The Eyecandies format (Bonfiglioli et al., ACCV 2022), which the embedded `candies` are written in too."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from iumad_jax.data.formats.depth_files import check_distance
from iumad_jax.data.formats.files import check_file, listing, opening, read_yaml, select, shown
from iumad_jax.data.formats.images import check_same_size, read_image, read_mask
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
LIGHTS = ("0", "1", "2", "3", "4", "5")
FOCAL_LENGTH = 50 / 36  # image widths: a 50 mm lens on a 36 mm sensor, 711.11 pixels at 512

_LIGHT = "4"  # under which images are tested when all lights are trained on
_FOLDERS: dict[Split, str] = {
    "train": "train",
    "calibration": "val",
    "test": "test_public",
    "unlabelled": "test_private",
}
_SAMPLE_FILE = re.compile(r"(\d+)_\w+\.(?:png|yaml|txt)", re.ASCII)
_FARTHEST = 1000  # metres: what is farther is given in another unit


class Eyecandies:
    """Reads `<root>/<object>/{train,val,test_public,test_private}/data/<id>_*`; the last is optional, unlabelled.

    Args:
        root: the folder that holds one folder per object.
        objects: "all", or names, also separated by commas in one text, in the order in which they are learned.
        light: which of the images under six different lights is the RGB image; or "all": each training image counts
            six times, as `<id>_<light>`, and the other splits have light 4.
        normals: whether the official normals are read as well; most releases in circulation lack them.

    Raises:
        UserError: a folder or file is missing or empty, leads out of the root, or an object is unknown.
    """

    object_height = 0.008
    height_range = 1.0
    normals_window = 3

    def __init__(
        self, root: str | Path, objects: str | Sequence[str] = "all", light: str = _LIGHT, normals: bool = False
    ) -> None:
        if light not in (*LIGHTS, "all"):
            raise UserError(f"config.dataset.light is {light}; use one of 0 to {LIGHTS[-1]}, or all.")
        self.root = Path(root)
        self.light, self.normals = light, normals
        self.objects = select(objects, OBJECTS)
        with opening(self.root):
            self._ids = {(name, split): self._index(name, split) for name in self.objects for split in _FOLDERS}

    def __repr__(self) -> str:
        return f"Eyecandies({str(self.root)!r}, light={self.light}, normals={self.normals})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """The samples of one object and split, by number."""
        return self._ids[object, split]

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """RGB, depth, its range, mask, labels and normals, as far as the split has them and they are read."""
        number, _, light = id.partition("_")
        folder = self.root / object / _FOLDERS[split] / "data"
        return tuple(folder / f"{number}_{ending}" for ending in self._endings(split, light or self._light(split)))

    def read(self, object: str, split: Split, id: str) -> Sample:
        """One sample.

        Raises:
            UserError: one of its files is unusable, or they do not fit together.
        """
        rgb_file, depth_file, range_file, *others = self.files(object, split, id)
        rgb = read_image(rgb_file, "8-bit RGB")
        depth = _read_depth(depth_file, range_file)
        check_same_size(depth_file, depth, rgb_file, rgb)
        normals = None
        if self.normals:
            normals_file = others.pop()
            normals = _read_normals(normals_file)
            check_same_size(normals_file, normals, rgb_file, rgb)
        defect, mask = "unknown", None
        if split != "unlabelled":
            mask_file, label_file = others
            mask = read_mask(mask_file)
            check_same_size(mask_file, mask, rgb_file, rgb)
            defect = _read_defect(label_file)
            if split != "test" and defect != "good":
                raise UserError(f"{label_file} labels the image {defect}; only test images may have defects.")
        height, width = depth.shape
        focal = FOCAL_LENGTH * width
        camera = Camera(focal, focal, (width - 1) / 2, (height - 1) / 2)
        return Sample(object, id, defect, rgb, depth, mask, defect not in ("good", "unknown"), camera, normals)

    def _light(self, split: Split) -> str:
        return _LIGHT if self.light == "all" and split != "train" else self.light

    def _endings(self, split: Split, light: str) -> tuple[str, ...]:
        return (
            *(f"image_{one}.png" for one in (LIGHTS if light == "all" else light)),
            "depth.png",
            "info_depth.yaml",
            *(("mask.png", "metadata.yaml") if split != "unlabelled" else ()),
            *(("normals.png",) if self.normals else ()),
        )

    def _index(self, object: str, split: Split) -> tuple[str, ...]:
        """The ids in a folder whose every sample has all its files, none of them empty."""
        folder = self.root / object / _FOLDERS[split] / "data"
        if not folder.is_dir():
            if split == "unlabelled":
                return ()
            raise UserError(f"{folder} is missing; put {object} there or leave it out of config.dataset.objects.")
        found = listing(folder, self.root)
        numbered = {match[1] for match in map(_SAMPLE_FILE.fullmatch, found) if match}
        ids = tuple(sorted(numbered, key=lambda id_: (int(id_), id_)))
        light = self._light(split)
        endings = self._endings(split, light)
        if not ids:
            raise UserError(f"{folder} holds no samples; put files such as 000_{endings[0]} there.")
        for name in (f"{id_}_{ending}" for id_ in ids for ending in endings):
            if name not in found:
                raise UserError(f"{folder / name} is missing; every sample needs {', '.join(endings)}.")
            check_file(found[name])
        return tuple(f"{id_}_{one}" for id_ in ids for one in LIGHTS) if light == "all" else ids


def _read_depth(file: Path, range_file: Path) -> np.ndarray:
    """Metres along the optical axis (h, w).

    The file's own values run from the nearest to the farthest pixel. None means missing: the renderer sees a surface
    everywhere. A depth that is not positive is missing all the same.
    """
    nearest, farthest = _read_range(range_file)
    depth = read_image(file, "16-bit grey").astype(np.float32)
    depth = depth * np.float32((farthest - nearest) / 65535) + np.float32(nearest)
    depth[depth <= 0] = np.nan
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth: all of it is 0 m or less by {range_file.name}; correct either.")
    check_distance(depth, file, f"correct {range_file.name}")
    return depth


def _read_range(file: Path) -> tuple[float, float]:
    span = read_yaml(file).get("normalization")
    metres = []
    for key in ("min", "max"):
        value = span.get(key) if isinstance(span, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _FARTHEST:
            raise UserError(f"{file} has {shown(value)} as normalization: {key}; give metres, from 0 to {_FARTHEST}.")
        metres.append(float(value))
    nearest, farthest = metres
    if nearest > farthest:
        raise UserError(f"{file} has min {nearest} above max {farthest}; give the range of the depth in metres.")
    return nearest, farthest


def _read_normals(file: Path) -> Float32[np.ndarray, "h w 3"]:
    """The renderer's normals in the axes of `Camera`; the file's have y up and z backwards."""
    normals = read_image(file, "8-bit RGB").astype(np.float32) / np.float32(127.5) - 1
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True) * np.array([1, -1, -1], np.float32)


def _read_defect(file: Path) -> str:
    labels = read_yaml(file)
    for key in ("anomalous", *(f"anomalous_{kind}" for kind in DEFECTS)):
        if labels.get(key) not in (0, 1):
            raise UserError(f"{file} has {shown(labels.get(key))} as {key}; give 0 or 1.")
    kinds = [kind for kind in DEFECTS if labels[f"anomalous_{kind}"]]
    if bool(kinds) != bool(labels["anomalous"]):
        raise UserError(f"{file} has anomalous: {labels['anomalous']} but the kinds {kinds}; make them agree.")
    return "good" if not kinds else kinds[0] if len(kinds) == 1 else "combined"
