"""Reader of the Eyecandies format (Bonfiglioli et al., ACCV 2022), which rendered `candies` and `sweets` use, too."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from iumad_jax.data.formats.depth_files import check_distance
from iumad_jax.data.formats.files import abbreviate, check_file, list_entries, opening, read_yaml, select
from iumad_jax.data.formats.images import check_same_size, read_image, read_mask
from iumad_jax.data.sample import Camera, DepthFormat, Sample, Split
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
FOCAL_LENGTH = 50 / 36  # in image widths: a 50 mm lens on a 36 mm sensor, 711.11 pixels at width 512

_LIGHT = "4"  # light of the test images when training uses all lights
_FOLDERS: dict[Split, str] = {
    "train": "train",
    "calibration": "val",
    "test": "test_public",
    "unlabelled": "test_private",
}
_SAMPLE_FILE = re.compile(r"(\d+)_\w+\.(?:png|yaml|txt)", re.ASCII)
_MAX_DEPTH = 1000  # metres; larger values mean a wrong unit


class Eyecandies:
    """Reader of `<root>/<object>/{train,val,test_public,test_private}/data/<id>_*`.

    `test_private` is optional and unlabelled.

    Args:
        root: Folder with one subfolder per object.
        objects: "all", names separated by commas, or a sequence of names, in the order of learning.
        light: Light of the RGB images, "0" to "5"; or "all", which reads six training images per sample, with the ids
            `<id>_<light>`, and light 4 in the other splits.
        normals: Whether to read the official normals, too; most releases lack them.
        available: All objects of the dataset.
        trusted: Folders that links may lead into, besides the root.

    Raises:
        UserError: If a folder or file is missing or empty or leads elsewhere, or an object is unknown.
    """

    object_height = 0.008
    height_range = 1.0
    normals_window = 3
    depth_format = DepthFormat()

    def __init__(
        self,
        root: str | Path,
        objects: str | Sequence[str] = "all",
        light: str = _LIGHT,
        normals: bool = False,
        available: Sequence[str] = OBJECTS,
        trusted: Sequence[Path] = (),
    ) -> None:
        if light not in (*LIGHTS, "all"):
            raise UserError(f"config.dataset.light is {light}; use one of 0 to {LIGHTS[-1]}, or all.")
        self.root = Path(root)
        self._within = (self.root, *trusted)
        self.light, self.normals = light, normals
        self.objects = select(objects, available)
        with opening(self.root):
            self._ids = {(name, split): self._index(name, split) for name in self.objects for split in _FOLDERS}

    def __repr__(self) -> str:
        return f"Eyecandies({str(self.root)!r}, light={self.light}, normals={self.normals})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the ids of one object and split, sorted by number."""
        return self._ids[object, split]

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files of RGB, depth, its range, mask, labels and normals, except those that are not read."""
        number, _, light = id.partition("_")
        folder = self.root / object / _FOLDERS[split] / "data"
        return tuple(folder / f"{number}_{ending}" for ending in self._endings(split, light or self._light(split)))

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample.

        Raises:
            UserError: If one of its files is unusable or they contradict each other.
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
                raise UserError(f"{label_file} labels a {split} image {defect}; move it to test_public.")
        height, width = depth.shape
        focal = FOCAL_LENGTH * width
        camera = Camera(focal, focal, (width - 1) / 2, (height - 1) / 2)
        return Sample(object, id, defect, rgb, depth, mask, defect not in ("good", "unknown"), camera, normals)

    def _light(self, split: Split) -> str:
        return _LIGHT if self.light == "all" and split != "train" else self.light

    def _endings(self, split: Split, light: str) -> tuple[str, ...]:
        """List the parts of a sample's file names after `<id>_`."""
        return (
            *(f"image_{number}.png" for number in (LIGHTS if light == "all" else light)),
            "depth.png",
            "info_depth.yaml",
            *(("mask.png", "metadata.yaml") if split != "unlabelled" else ()),
            *(("normals.png",) if self.normals else ()),
        )

    def _index(self, object: str, split: Split) -> tuple[str, ...]:
        """List the ids of one object and split; raise UserError if a sample lacks a file or a file is empty."""
        folder = self.root / object / _FOLDERS[split] / "data"
        if not folder.is_dir():
            if split == "unlabelled":
                return ()
            raise UserError(
                f"{folder} is missing; add {object} there, or name the other objects in config.dataset.objects."
            )
        entries = list_entries(folder, self._within)
        numbered = {match[1] for match in map(_SAMPLE_FILE.fullmatch, entries) if match}
        ids = tuple(sorted(numbered, key=lambda id_: (int(id_), id_)))
        light = self._light(split)
        endings = self._endings(split, light)
        if not ids:
            raise UserError(f"{folder} holds no samples; add files such as 000_{endings[0]}.")
        for name in (f"{id_}_{ending}" for id_ in ids for ending in endings):
            if name not in entries:
                raise UserError(f"{folder / name} is missing; add it, since every sample needs {', '.join(endings)}.")
            check_file(entries[name])
        return tuple(f"{id_}_{number}" for id_ in ids for number in LIGHTS) if light == "all" else ids


def _read_depth(file: Path, range_file: Path) -> np.ndarray:
    """Read depth along the optical axis in metres, shape (h, w).

    The file's values run linearly from the nearest to the farthest pixel. The renderer has a surface in every pixel and
    hence no value for missing depth, but depths that are not positive are set to NaN.
    """
    nearest, farthest = _read_range(range_file)
    depth = read_image(file, "16-bit grey").astype(np.float32)
    depth = depth * np.float32((farthest - nearest) / 65535) + np.float32(nearest)
    depth[depth <= 0] = np.nan
    if np.isnan(depth).all():
        raise UserError(f"{file} has no valid depth: {range_file.name} makes all of it 0 m or less; correct either.")
    check_distance(depth, file, f"correct {range_file.name}")
    return depth


def _read_range(file: Path) -> tuple[float, float]:
    """Read the smallest and largest depth of an image in metres."""
    span = read_yaml(file).get("normalization")
    metres = []
    for key in ("min", "max"):
        value = span.get(key) if isinstance(span, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _MAX_DEPTH:
            raise UserError(f"{file} has {abbreviate(value)} as normalization: {key}; use 0 to {_MAX_DEPTH} metres.")
        metres.append(float(value))
    nearest, farthest = metres
    if nearest > farthest:
        raise UserError(f"{file} has min {nearest} above max {farthest}; use the range of depth in metres.")
    return nearest, farthest


def _read_normals(file: Path) -> Float32[np.ndarray, "h w 3"]:
    """Read the renderer's unit normals and convert them from y up and z backwards to the axes of `Camera`."""
    normals = read_image(file, "8-bit RGB").astype(np.float32) / np.float32(127.5) - 1
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True) * np.array([1, -1, -1], np.float32)


def _read_defect(file: Path) -> str:
    """Read the defect of an image: "good", one of DEFECTS, or "combined" for several."""
    labels = read_yaml(file)
    for key in ("anomalous", *(f"anomalous_{kind}" for kind in DEFECTS)):
        if labels.get(key) not in (0, 1):
            raise UserError(f"{file} has {abbreviate(labels.get(key))} as {key}; use 0 or 1.")
    kinds = [kind for kind in DEFECTS if labels[f"anomalous_{kind}"]]
    if bool(kinds) != bool(labels["anomalous"]):
        raise UserError(f"{file} has anomalous: {labels['anomalous']} but the defects {kinds}; make them agree.")
    return "good" if not kinds else kinds[0] if len(kinds) == 1 else "combined"
