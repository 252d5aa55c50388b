"""Lists and reads files of the layout `<object>/<split>/<good or defect>/<kind>/<name>.<suffix>`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iumad_jax.data.depth import picture
from iumad_jax.data.formats.alignment import align
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.files import check_file, folders, list_entries
from iumad_jax.data.formats.images import check_same_size, read_mask, read_photograph
from iumad_jax.data.sample import Camera, DepthFormat, Sample
from iumad_jax.errors import UserError

Kinds = Mapping[str, Sequence[str]]  # folders of RGB, depth and masks, in this order, with their file suffixes


class Item(NamedTuple):
    """The files of one sample."""

    defect: str
    rgb: Path | None
    depth: Path | None
    mask: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Existing files of the sample."""
        return tuple(file for file in self[1:] if isinstance(file, Path))


def list_good_items(split: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """List the samples of a split of good images by name; for the arguments and errors see `list_items`."""
    _check_exists(split)
    for name in folders(split, root):
        if name != "good":
            raise UserError(f"{split / name} is not good; move images with defects to test.")
    if not (split / "good").is_dir():
        raise UserError(f"{split / 'good'} is missing; add the good images there, in folders {', '.join(kinds)}.")
    return list_items("good", split / "good", root, kinds, needed)


def list_labelled_items(split: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """List the samples of a labelled split as "defect/name"; good images need no mask. See `list_items`."""
    _check_exists(split)
    items = {}
    for defect in folders(split, root):
        needed_here = [kind for kind in needed if defect != "good" or kind != list(kinds)[2]]
        for name, item in list_items(defect, split / defect, root, kinds, needed_here).items():
            items[f"{defect}/{name}"] = item
    if not items:
        raise UserError(f"{split} holds no folder good or named after a defect; add one or remove {split.name}.")
    return items


def list_items(defect: str, folder: Path, root: Path, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """List the samples in `<folder>/<kind>/<name>.<suffix>` by name, sorted.

    Args:
        defect: Defect of the images in the folder; "good" for none, "unknown" for images without labels.
        folder: Folder with one subfolder per kind of file.
        root: Root folder of the dataset.
        kinds: Subfolders and their file suffixes; the first subfolder holds the RGB images, one per sample, or if it
            is missing and not needed, the second.
        needed: Kinds that must exist; the folders of other kinds may be missing.

    Raises:
        UserError: If a file is missing, is empty, has an unknown suffix, belongs to no image, or differs
            from another only in suffix.
        OSError: If a folder or file cannot be read.
    """
    entries = list_entries(folder, root)
    for name in entries:
        if name not in kinds:
            raise UserError(f"{folder / name} is not one of {', '.join(kinds)}; rename or remove it.")
    files = {kind: _files_by_name(folder / kind, root, kinds[kind]) if kind in entries else {} for kind in kinds}
    image_kind, depth_kind, *_ = kinds
    if image_kind not in entries and image_kind not in needed and depth_kind in entries:
        image_kind = depth_kind
    images = files[image_kind]
    if not images:
        raise UserError(f"{folder / image_kind} holds no images; add files such as 000{kinds[image_kind][0]}.")
    for kind, by_name in files.items():
        if kind == image_kind or (not by_name and kind not in needed):
            continue
        for name, file in by_name.items():
            if name not in images:
                raise UserError(f"{file} has no image of its name in {folder / image_kind}; add it or remove the file.")
        for name in images:
            if name not in by_name:
                missing = folder / kind / (name + kinds[kind][0])
                raise UserError(f"{missing} is missing; add it, as every image in {folder / image_kind} needs one.")
    rgb, depth, mask, *_ = *files.values(), {}
    return {name: Item(defect, rgb.get(name), depth.get(name), mask.get(name)) for name in images}


def read_item(
    object_: str,
    id_: str,
    item: Item,
    format_: DepthFormat,
    *,
    remedy: str,
    camera: Camera | None = None,
    two_values: bool = True,
    needs_cloud: bool = False,
) -> Sample:
    """Read one sample.

    Args:
        object_: Object of the sample.
        id_: Id of the sample.
        item: Files of the sample.
        format_: What the numbers in depth files mean.
        remedy: Advice on a missing or wrong unit, the end of the error message.
        camera: Camera of depth images; by default a pinhole camera whose focal length is the image's width. The camera
            of a cloud is estimated from the cloud instead.
        two_values: Whether all values of a mask other than 0 must be equal.
        needs_cloud: Whether to refuse depth without x and y.

    Raises:
        UserError: If one of its files is unusable or they contradict each other.
    """
    rgb = None if item.rgb is None else read_photograph(item.rgb)
    depth, depth_camera = None, None
    if item.depth is not None:
        size = None if rgb is None else rgb.shape[:2]
        depth, depth_camera = read_depth(item.depth, format_, size, remedy, camera)
        if size:
            depth, depth_camera = align(depth, depth_camera, format_.align, size, item.depth, item.files[0])
        height, width = depth.shape
        if needs_cloud and depth_camera is None:
            raise UserError(f"{item.depth} holds only depth; save x, y and z.")
        depth_camera = depth_camera or camera or Camera(width, width, (width - 1) / 2, (height - 1) / 2)
        rgb = picture(depth, depth_camera) if rgb is None else rgb
    assert rgb is not None
    anomalous = item.defect not in ("good", "unknown")
    mask = np.zeros(rgb.shape[:2], bool) if item.defect == "good" else None
    if item.mask is not None:
        mask = read_mask(item.mask, two_values=two_values)
        check_same_size(item.mask, mask, item.files[0], rgb)
        if mask.any() and not anomalous:
            raise UserError(f"{item.mask} marks a defect but its image is good; clear the mask or move the image.")
        if anomalous and not mask.any():
            raise UserError(f"{item.mask} marks nothing but its image has the defect {item.defect}; mark the defect.")
    return Sample(object_, id_, item.defect, rgb, depth, mask, anomalous, depth_camera)


def _check_exists(split: Path) -> None:
    if not split.is_dir():
        raise UserError(f"{split} is missing; add it or remove {split.parent.name} from config.dataset.objects.")


def _files_by_name(folder: Path, root: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """List the files of a folder by their names without suffix."""
    files: dict[str, Path] = {}
    for name, entry in list_entries(folder, root).items():
        file = folder / name
        if file.suffix.lower() not in suffixes:
            raise UserError(f"{file} does not end in one of {' '.join(suffixes)}; convert or remove it.")
        check_file(entry)
        if file.stem in files:
            raise UserError(f"{file} and {files[file.stem].name} differ only in suffix; rename or remove either.")
        files[file.stem] = file
    return files
