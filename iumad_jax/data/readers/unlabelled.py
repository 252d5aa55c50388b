"""Images to look at, of which nothing is known: photographs in files or folders, or a split of a dataset."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iumad_jax.data.formats.depth_files import DEPTH_IMAGES, read_depth
from iumad_jax.data.formats.images import PHOTOGRAPHS, check_same_size, read_photograph
from iumad_jax.data.sample import Camera, Reader, Split
from iumad_jax.errors import UserError


class Shot(NamedTuple):
    """An image to look at."""

    name: str  # of its files in the output, with their subfolders
    read: Callable[[], tuple[np.ndarray, np.ndarray | None, Camera | None]]  # RGB, depth, camera


def photographs(
    root: Path, needs_depth: bool, depth_place: Path | None, unit: float | None, camera: Camera | None
) -> Iterator[Shot]:
    """The images that --input names, with the depth that --depth has of them.

    Args:
        root: an image, or a folder of images.
        needs_depth: whether depth is read.
        depth_place: an image's depth, or a folder with files of the images' names.
        unit: metres per unit of the depth files; None: they hold metres.
        camera: of the depth images; None: what a file says.

    Raises:
        UserError: something is missing or of no use; about one file when it is read.
    """
    if not root.exists():
        raise UserError(f"--input is {root}, which does not exist; name an image or a folder of images.")
    images = [root] if root.is_file() else _photographs(root)
    if not images or images[0].suffix.lower() not in PHOTOGRAPHS:
        raise UserError(f"--input is {root}, which is or holds no image; give files ending in {' '.join(PHOTOGRAPHS)}.")
    if needs_depth:
        _check_depth(depth_place, unit, root)
    names: dict[str, Path] = {}
    for file in images:
        name = str(file.relative_to(root).with_suffix("")) if root.is_dir() else file.stem
        if name in names:
            raise UserError(f"{file} and {names[name].name} have one name; rename or remove either.")
        names[name] = file

        def read(file: Path = file, name: str = name) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            rgb = read_photograph(file)
            if not needs_depth or depth_place is None:
                return rgb, None, None
            depth_file = _depth_file(depth_place, name)
            remedy = "give --depth_unit=METRES, such as 0.001 for millimetres"
            depth, own = read_depth(depth_file, unit, rgb.shape[:2], remedy)
            check_same_size(depth_file, depth, file, rgb)
            return rgb, depth, camera or own

        yield Shot(name, read)


def _check_depth(place: Path | None, unit: float | None, root: Path) -> None:
    """Raises UserError unless there is depth where --depth says, for one image or for many as --input has."""
    if place is None:
        raise UserError("--depth is missing; this model was trained with depth.")
    if not place.exists():
        raise UserError(f"--depth is {place}, which does not exist; name a file or a folder of depth images.")
    if root.is_dir() and not place.is_dir():
        raise UserError(f"--depth is {place}, one file for all of {root}; name a folder of depth images.")
    if unit is not None and not 0 < unit < math.inf:
        raise UserError(f"--depth_unit is {unit:g}; give metres per unit, such as 0.001 for millimetres.")


def _photographs(root: Path) -> list[Path]:
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in PHOTOGRAPHS and file.is_file())
    for file in images:
        if not str(file).isprintable():
            raise UserError(f"{file} has a name that cannot be printed; rename it.")
    return images


def _depth_file(place: Path, name: str) -> Path:
    if place.is_file():
        return place
    found = [file for ending in DEPTH_IMAGES if (file := place / f"{name}{ending}").is_file()]
    if len(found) != 1:
        endings = " ".join(DEPTH_IMAGES)
        raise UserError(f"{place} has {len(found)} depth files named {name}; put one there, ending in {endings}.")
    return found[0]


def camera_of(given: list[str]) -> Camera:
    """The camera that --camera gives."""
    try:
        fx, fy, cx, cy = map(float, given)
        return Camera(fx, fy, cx, cy)
    except (ValueError, UserError) as error:
        raise UserError(f"--camera is {','.join(given)}; give fx,fy,cx,cy in pixels, fx and fy above 0.") from error


def samples(reader: Reader, split: Split) -> Iterator[Shot]:
    """The images of a split of a dataset.

    Raises:
        UserError: there are none; about one image when it is read.
    """
    ids = [(name, id_) for name in reader.objects for id_ in reader.ids(name, split)]
    if not ids:
        raise UserError(f"the dataset has no {split} images; choose another --split.")
    for name, id_ in ids:

        def read(name: str = name, id_: str = id_) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            sample = reader.read(name, split, id_)
            return sample.rgb, sample.depth, sample.camera

        yield Shot(f"{name}/{id_}", read)
