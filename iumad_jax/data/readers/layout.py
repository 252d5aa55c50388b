"""The layout `<object>/<split>/<good or defect>/<kind>/<name>.<ending>` of MVTec 3D-AD and of one's own objects."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.files import check_file, folders, listing
from iumad_jax.data.formats.images import check_same_size, read_mask, read_photograph
from iumad_jax.data.sample import Camera, Sample
from iumad_jax.errors import UserError

Kinds = Mapping[str, Sequence[str]]  # the folders of RGB, depth and masks, in this order, with their files' endings


class Item(NamedTuple):
    """The files of one sample."""

    defect: str
    rgb: Path
    depth: Path | None
    mask: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that there are."""
        return tuple(file for file in self[1:] if isinstance(file, Path))


def good_items(split: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """The samples of a split of good images, by name; for the arguments and errors see `items_of`."""
    _check_there(split)
    for name in folders(split, root):
        if name != "good":
            raise UserError(f"{split / name} is not good; only test images may have defects.")
    if not (split / "good").is_dir():
        raise UserError(f"{split / 'good'} is missing; put the good images there, in folders {', '.join(kinds)}.")
    return items_of("good", split / "good", root, kinds, needed)


def labelled_items(split: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """The samples of a split with defects, as "defect/name"; no good image needs a mask. See `items_of`."""
    _check_there(split)
    found = {}
    for defect in folders(split, root):
        own = [kind for kind in needed if defect != "good" or kind != list(kinds)[2]]
        for name, item in items_of(defect, split / defect, root, kinds, own).items():
            found[f"{defect}/{name}"] = item
    if not found:
        raise UserError(f"{split} holds no folder good and none named after a defect; add one or remove {split.name}.")
    return found


def items_of(defect: str, folder: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """The samples in `<folder>/<kind>/<name>.<ending>`, by name, sorted.

    Args:
        defect: that the folder's images have.
        folder: of folders by kind.
        root: of the dataset.
        kinds: the folders' names and their files' endings. The RGB images tell which names there are.
        needed: kinds that must be there; others may be left out as a whole.

    Raises:
        UserError: a file is missing, empty, of an unknown ending, without its image or there twice.
        OSError: something cannot be read.
    """
    present = listing(folder, root)
    for name in present:
        if name not in kinds:
            raise UserError(f"{folder / name} is not one of {', '.join(kinds)}; rename it or put it elsewhere.")
    images, *others = (_by_name(folder / kind, root, kinds[kind]) if kind in present else {} for kind in kinds)
    first, *rest = kinds
    if not images:
        raise UserError(f"{folder / first} holds no images; put files such as 000{kinds[first][0]} there.")
    for kind, by_name in zip(rest, others, strict=True):
        if not by_name and kind not in needed:
            continue
        for name, file in by_name.items():
            if name not in images:
                raise UserError(f"{file} has no image of its name in {folder / first}; add that or remove the file.")
        for name in images:
            if name not in by_name:
                missing = folder / kind / (name + kinds[kind][0])
                raise UserError(f"{missing} is missing; every image in {folder / first} needs its file in {kind}.")
    depth, mask, *_ = *others, {}
    return {name: Item(defect, rgb, depth.get(name), mask.get(name)) for name, rgb in images.items()}


def read_item(
    object_: str,
    id_: str,
    item: Item,
    *,
    unit: float | None = None,
    remedy: str,
    camera: Camera | None = None,
    two_values: bool = True,
    needs_cloud: bool = False,
) -> Sample:
    """One sample.

    Args:
        object_: its object.
        id_: its id.
        item: its files.
        unit: metres per unit of its depth; None: nobody said.
        remedy: what to do about a wrong unit.
        camera: of depth images. None: a pinhole camera whose focal length is the image's width. Clouds tell theirs.
        two_values: whether a mask may have one value only beside 0.
        needs_cloud: whether depth alone is refused.

    Raises:
        UserError: one of its files is unusable, or they do not fit together.
    """
    rgb = read_photograph(item.rgb)
    height, width = rgb.shape[:2]
    depth, own_camera = None, None
    if item.depth is not None:
        depth, own_camera = read_depth(item.depth, unit, (height, width), remedy)
        check_same_size(item.depth, depth, item.rgb, rgb)
        if needs_cloud and own_camera is None:
            raise UserError(f"{item.depth} has depth alone; give x, y and z.")
        own_camera = own_camera or camera or Camera(width, width, (width - 1) / 2, (height - 1) / 2)
    anomalous = item.defect not in ("good", "unknown")
    mask = np.zeros((height, width), bool) if item.defect == "good" else None
    if item.mask is not None:
        mask = read_mask(item.mask, two_values=two_values)
        check_same_size(item.mask, mask, item.rgb, rgb)
        if mask.any() and not anomalous:
            raise UserError(f"{item.mask} marks a defect but its image is good; clear the mask or move the image.")
        if anomalous and not mask.any():
            raise UserError(f"{item.mask} marks nothing but its image has the defect {item.defect}; mark where it is.")
    return Sample(object_, id_, item.defect, rgb, depth, mask, anomalous, own_camera)


def _check_there(split: Path) -> None:
    if not split.is_dir():
        raise UserError(f"{split} is missing; put it there or leave {split.parent.name} out of config.dataset.objects.")


def _by_name(folder: Path, root: Path, endings: Sequence[str]) -> dict[str, Path]:
    """The files of a folder by their names without endings."""
    found: dict[str, Path] = {}
    for name, entry in listing(folder, root).items():
        file = folder / name
        if file.suffix.lower() not in endings:
            raise UserError(f"{file} is not one of {' '.join(endings)}; convert it or put it elsewhere.")
        check_file(entry)
        if file.stem in found:
            raise UserError(f"{file} and {found[file.stem].name} have one name; rename or remove either.")
        found[file.stem] = file
    return found
