"""Finds the images of an object in the folders that people have.

    <object>/{train,val,test}/<good or defect>/...      splits, with masks there or in ground_truth/<defect> (MVTec AD)
    <object>/{<good>,<defect>,mask}/...                 good and anomalous images; a fifth of the good ones tests
    <object>/Data/{Images,Masks}/{Normal,Anomaly}/...   the same in VisA, whose split_csv/1cls.csv tells the test images
    <object>/...                                        good images alone

`layout.list_items` says what may be in place of the dots.
"""

import csv
import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from iumad_jax.data.formats.depth_files import DEPTH_IMAGES
from iumad_jax.data.formats.files import Within, check_inside, folders, opening, read_error, tell
from iumad_jax.data.formats.images import PHOTOGRAPHS
from iumad_jax.data.readers import layout
from iumad_jax.data.readers.layout import Item, list_good_items, list_items, list_labelled_items
from iumad_jax.data.sample import Split
from iumad_jax.errors import UserError

_KINDS = {"rgb": PHOTOGRAPHS, "depth": DEPTH_IMAGES, "mask": PHOTOGRAPHS}
_UNLABELLED = {"rgb": PHOTOGRAPHS, "depth": DEPTH_IMAGES}
_SPLITS: dict[str, Split] = {  # names in lower case
    "train": "train",
    "val": "calibration",
    "validation": "calibration",
    "test": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
_TABLES = "split_csv"  # folder of VisA beside its objects
_MAX_TABLE_BYTES = 1 << 24
_TESTING_SHARE = 5  # one of so many good images tests, where nothing says which


class Named(NamedTuple):
    """Folders of each object that the settings name, as paths within it."""

    normal: tuple[str, ...]
    abnormal: tuple[str, ...] = ()
    masks: str | None = None


_VISA = Named(("Data/Images/Normal",), ("Data/Images/Anomaly",), "Data/Masks/Anomaly")


def object_folders(root: Path, trusted: Sequence[Path] = ()) -> dict[str, Path]:
    """Find the objects in a folder, one per subfolder; a folder that has one for training or good images is an object.

    Args:
        root: Folder of the dataset.
        trusted: Folders that links may lead into, besides the root.

    Returns:
        The folder of each object by its name, sorted.

    Raises:
        UserError: If the folder cannot be read or has no subfolders.
    """
    with opening(root):
        names = folders(root, (root, *trusted))
        if (root / _VISA.normal[0]).is_dir() or any(
            layout.means_good(root / name) or (name.casefold() == "train" and not (root / name / "train").is_dir())
            for name in names
        ):
            return {root.resolve().name: root}
    objects = {name: root / name for name in names if name != _TABLES}
    if not objects:
        raise UserError(f"config.dataset.root is {root}, which holds no folder; add one for every object.")
    return objects


def list_object(
    folder: Path, within: Within, needed: Collection[str] = (), named: Named | None = None
) -> dict[Split, dict[str, Item]]:
    """List the samples of an object by split and name.

    Args:
        folder: Folder of the object.
        within: Folders that links may lead into, first the root of the dataset.
        needed: Kinds of files that must exist; see `layout.list_items`.
        named: Folders that the settings name, if any.

    Raises:
        UserError: If the folders are of no known arrangement, or a file is missing or has no place.
        OSError: If a folder or file cannot be read.
    """
    names = folders(folder, within)
    if named is None and (folder / _VISA.normal[0]).is_dir():
        named = _VISA
    if named is not None:
        return _divide(folder, within, needed, named)
    splits: dict[Split, Path] = {}
    for name in names:
        if split := _SPLITS.get(name.casefold()):
            if split in splits:
                raise UserError(f"{folder / name} and {splits[split].name} mean the same; keep one.")
            splits[split] = folder / name
    if not splits:
        good = tuple(name for name in names if layout.means_good(folder / name))
        others = tuple(name for name in names if name not in good and layout.find_kind(name, _KINDS) is None)
        masks = layout.find_masks(folder, within)
        if good:
            return _divide(folder, within, needed, Named(good, others, masks.name if masks else None))
        if layout.holds_images(folder, within, _KINDS):
            listed = list_items("good", folder, within, _KINDS, needed)
            if nested := next((item.files[0].parent for name, item in listed.items() if "/" in name), None):
                raise UserError(
                    f"{nested} may hold good images or defects; name it as normal or abnormal in dataset.yaml."
                )
            tell("images in an object's own folder are good images to learn from", folder)
            return {"train": listed}
    for name in names:
        if name.casefold() not in (*_SPLITS, *layout.MASKS):
            raise UserError(f"{folder / name} is not one of train, val, test, unlabelled; rename or remove it.")
    found: dict[Split, dict[str, Item]] = {}
    found["train"] = list_good_items(splits.get("train", folder / "train"), within, _KINDS, needed)
    if "calibration" in splits:
        found["calibration"] = list_good_items(splits["calibration"], within, _KINDS, needed)
    if "test" in splits:
        found["test"] = list_labelled_items(splits["test"], within, _KINDS, needed)
    if "unlabelled" in splits:
        found["unlabelled"] = list_items("unknown", splits["unlabelled"], within, _UNLABELLED, needed)
    return found


def _divide(folder: Path, within: Within, needed: Collection[str], named: Named) -> dict[Split, dict[str, Item]]:
    """List images that are in folders of good and anomalous ones; test with the anomalous and some of the good ones."""
    good: dict[str, Item] = {}
    for path in named.normal:
        listed = _list_named("good", folder / path, within, needed)
        good |= {name if len(named.normal) == 1 else f"{path}/{name}": item for name, item in listed.items()}
    test: dict[str, Item] = {}
    for path in named.abnormal:
        defect = PurePosixPath(path).name
        masks = folder / named.masks if named.masks else None
        if masks and ((masks / defect).is_dir() or len(named.abnormal) > 1):
            masks /= defect
        listed = _list_named(defect, folder / path, within, needed, masks)
        test |= {f"{defect}/{name}": item for name, item in listed.items()}
    if not test:
        return {"train": good}
    testing = _testing(folder, within, good)
    if len(testing) == len(good):
        raise UserError(f"{folder} leaves no good image to learn from; add some to {folder / named.normal[0]}.")
    test |= {f"good/{name}": good[name] for name in good if name in testing}
    return {"train": {name: item for name, item in good.items() if name not in testing}, "test": test}


def _list_named(
    defect: str, folder: Path, within: Within, needed: Collection[str], masks: Path | None = None
) -> dict[str, Item]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; add it, or correct normal and abnormal in dataset.yaml.")
    return list_items(defect, folder, within, _KINDS, needed, masks)


def _testing(folder: Path, within: Within, good: dict[str, Item]) -> set[str]:
    """Choose the good images that test, by the table of VisA if there is one; more images do not change the choice."""
    root = within[0]
    file = root / _TABLES / "1cls.csv"
    check_inside(file, within)
    splits = _read_splits(file) if file.is_file() else {}
    by_name = {name: splits.get(item.files[0].relative_to(root).as_posix()) for name, item in good.items()}
    if any(by_name.values()):
        for name, split in by_name.items():
            if split not in ("train", "test"):
                raise UserError(f"{file} does not say whether {good[name].files[0]} is of train or test; add it there.")
        return {name for name, split in by_name.items() if split == "test"}
    tell(f"of good images, one of {_TESTING_SHARE} tests, chosen by name, because no folder says which", folder)
    return {name for name in good if hashlib.sha256(name.encode()).digest()[0] % _TESTING_SHARE == 0}


def _read_splits(file: Path) -> dict[str, str]:
    """Read the split of each image, by its path within the dataset, from a table of VisA.

    Raises:
        UserError: If the file cannot be read or is no such table.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_TABLE_BYTES + 1)
        if len(content) > _MAX_TABLE_BYTES:
            raise UserError(f"{file} is larger than {_MAX_TABLE_BYTES} bytes; replace it.")
        rows = csv.DictReader(content.decode("utf-8-sig").splitlines())
        return {row["image"]: row["split"] for row in rows}
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{file} is not a table with the columns image and split; replace it.") from error
