"""Lists and reads files of the layout `<object>/<split>/<good or defect>/[<kind>/]<name>.<suffix>`."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iumad_jax.data.depth import picture
from iumad_jax.data.formats.alignment import align
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.files import Within, check_file, folders, list_entries, tell
from iumad_jax.data.formats.images import check_mask_size, read_mask, read_photograph
from iumad_jax.data.readers import matching
from iumad_jax.data.sample import Camera, DepthFormat, Sample
from iumad_jax.errors import UserError

Kinds = Mapping[str, Sequence[str]]  # folders of RGB, depth and masks, in this order, with their file suffixes
DEPTHS, MASKS = ("depth", "xyz"), ("mask", "masks", "gt", "ground_truth")  # names of folders, in lower case

_GOOD = ("good", "ok", "normal")
_IMAGES = ("rgb", "images")


class Item(NamedTuple):
    """The files of one sample."""

    defect: str
    rgb: Path | None
    depth: Path | None
    masks: tuple[Path, ...]  # one per defect, or one of all

    @property
    def files(self) -> tuple[Path, ...]:
        """Existing files of the sample."""
        return tuple(file for file in (self.rgb, self.depth, *self.masks) if file is not None)


def means_good(folder: Path) -> bool:
    """Return whether a folder's name says that its images are good; it is told if this is another name than "good"."""
    good = folder.name.casefold() in _GOOD
    if good and folder.name != "good":
        tell(f'folders named "{folder.name}" hold good images', folder)
    return good


def find_kind(name: str, kinds: Kinds) -> str | None:
    """Return the kind of file that a folder of this name holds; None if its name does not say."""
    for kind, names in zip(kinds, (_IMAGES, DEPTHS, MASKS), strict=False):
        if name.casefold() in (kind, *names):
            return kind
    return None


def holds_images(folder: Path, within: Within, kinds: Kinds) -> bool:
    """Return whether a folder has photographs in itself, or a folder of them or of depth."""
    image_kind, depth_kind, *_ = kinds
    return any(
        find_kind(name, kinds) in (image_kind, depth_kind)
        if entry.is_dir()
        else Path(name).suffix.lower() in kinds[image_kind]
        for name, entry in list_entries(folder, within).items()
    )


def list_good_items(split: Path, within: Within, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """List the samples of a split of good images by name; for the arguments and errors see `list_items`."""
    _check_exists(split)
    names = folders(split, within)
    good = [name for name in names if means_good(split / name)]
    for name in names:
        if name not in good and find_kind(name, kinds) is None:
            raise UserError(f"{split / name} is not good; move images with defects to test.")
    if not good and holds_images(split, within, kinds):
        return list_items("good", split, within, kinds, needed)
    if not good:
        raise UserError(f"{split / 'good'} is missing; add the good images there, in folders {', '.join(kinds)}.")
    if len(good) > 1:
        raise UserError(f"{split} holds {' and '.join(good)}, which all mean good; keep one folder.")
    return list_items("good", split / good[0], within, kinds, needed)


def list_labelled_items(split: Path, within: Within, kinds: Kinds, needed: Collection[str] = ()) -> dict[str, Item]:
    """List the samples of a labelled split as "defect/name"; good images need no mask. See `list_items`.

    Masks may also be in a folder beside the split, in folders named after the defects.
    """
    _check_exists(split)
    items: dict[str, Item] = {}
    masks = find_masks(split.parent, within)
    for name in folders(split, within):
        if find_kind(name, kinds) is not None:
            raise UserError(
                f"{split / name} holds images without labels; move it to a folder good or named after a defect."
            )
        good = means_good(split / name)
        needed_here = [kind for kind in needed if not good or kind != list(kinds)[2]]
        own_masks = masks / name if masks and not good else None
        listed = list_items("good" if good else name, split / name, within, kinds, needed_here, own_masks)
        items |= {f"{name}/{id_}": item for id_, item in listed.items()}
    if not items:
        raise UserError(f"{split} holds no folder good or named after a defect; add one or remove {split.name}.")
    return items


def find_masks(folder: Path, within: Within) -> Path | None:
    """Return the subfolder for masks; None without one."""
    return next((folder / name for name in folders(folder, within) if name.casefold() in MASKS), None)


def list_items(
    defect: str,
    folder: Path,
    within: Within,
    kinds: Kinds,
    needed: Collection[str] = (),
    masks: Path | None = None,
) -> dict[str, Item]:
    """List the samples in `<folder>/<kind>/<name>.<suffix>` by name, sorted.

    Photographs may be in the folder itself, and files of all kinds in further subfolders, which belong to their names.
    `<name>_mask.<suffix>` and `<name>_depth.<suffix>` belong to the photograph `<name>`, `<name>_rgb` or
    `<name>_color`, in their folders or beside it; `<name>/<any>.<suffix>` in the folder of masks are several of them.

    Args:
        defect: Defect of the images in the folder; "good" for none, "unknown" for images without labels.
        folder: Folder of the files.
        within: Folders that links may lead into.
        kinds: Subfolders and their file suffixes; the first subfolder holds the RGB images, one per sample, or if there
            are none and they are not needed, the second.
        needed: Kinds that must exist; the folders of other kinds may be missing.
        masks: Another folder of masks, for which a folder within `folder` is preferred.

    Raises:
        UserError: If a file is missing, is empty, has an unknown suffix, belongs to no image or to several, or differs
            from another only in suffix.
        OSError: If a folder or file cannot be read.
    """
    image_kind, *other_kinds = kinds
    mask_kind = "".join(other_kinds[1:])  # "" where masks have no place
    by_kind: dict[str, Path] = {}
    others = []
    for name, entry in list_entries(folder, within).items():
        kind = find_kind(name, kinds) if entry.is_dir() else None
        if kind is None:
            others.append(name)
        elif kind in by_kind:
            raise UserError(f"{folder / name} and {by_kind[kind].name} both hold {kind}; keep one.")
        else:
            by_kind[kind] = folder / name
    for name in others:
        if image_kind in by_kind or name.casefold() in MASKS:
            raise UserError(f"{folder / name} is not one of {', '.join(kinds)}; rename or remove it.")
    if masks is not None and masks.is_dir():
        by_kind.setdefault(mask_kind, masks)
    if image_kind not in by_kind and not others and image_kind not in needed and other_kinds[0] in by_kind:
        image_kind = other_kinds[0]
    image_folder = by_kind.pop(image_kind, folder)
    images = _files_by_name(image_folder, within, kinds[image_kind], [path.name for path in by_kind.values()])
    depth_kind = other_kinds[0]
    beside = {mask_kind: {name: images.pop(name) for name in matching.beside(images, matching.MASK)}}
    if image_kind != depth_kind and depth_kind not in by_kind:
        beside[depth_kind] = {name: images.pop(name) for name in matching.beside(images, matching.DEPTH)}
    if not images:
        alone = ", or use --config.modality=depth" if "depth" in by_kind and image_folder == folder else ""
        raise UserError(f"{folder / image_kind} holds no images; add files such as 000{kinds[image_kind][0]}{alone}.")
    files = {image_kind: {name: [file] for name, file in images.items()}}
    for kind in kinds:
        if kind == image_kind:
            continue
        by_name = _files_by_name(by_kind[kind], within, kinds[kind]) if kind in by_kind else {}
        by_name = by_name or beside.get(kind, {})
        if not by_name and kind not in needed:
            continue
        if not by_name and kind not in by_kind and kind != mask_kind:
            raise UserError(f"{folder} has no {kind}; add a folder {kind}, or use --config.modality=rgb.")
        for file in by_name.values():
            _check_suffix(file, kinds[kind])
        files[kind] = found = _by_image(by_name, images, kind == mask_kind)
        for name in images:
            if name not in found:
                missing = by_kind.get(kind, folder / kind) / (name + kinds[kind][0])
                raise UserError(f"{missing} is missing; add it, as every image in {image_folder} needs one.")
    rgb, depth, own_masks, *_ = *(files.get(kind, {}) for kind in kinds), {}
    return {
        name: Item(
            defect,
            next(iter(rgb.get(name, ())), None),
            next(iter(depth.get(name, ())), None),
            tuple(own_masks.get(name, ())),
        )
        for name in images
    }


def read_item(
    object_: str,
    id_: str,
    item: Item,
    format_: DepthFormat,
    *,
    remedy: str,
    camera: Camera | None = None,
    bits: int | None = None,
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
        bits: Bits that photographs of 16 bits per channel use.
        needs_cloud: Whether to refuse depth without x and y.

    Raises:
        UserError: If one of its files is unusable or they contradict each other.
    """
    rgb = None if item.rgb is None else read_photograph(item.rgb, bits)
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
    for file in item.masks:
        part = read_mask(file)
        check_mask_size(file, part, item.files[0], rgb)
        if part.any() and not anomalous:
            raise UserError(f"{file} marks a defect but its image is good; clear the mask or move the image.")
        if anomalous and not part.any():
            raise UserError(f"{file} marks nothing but its image has the defect {item.defect}; mark the defect.")
        mask = part if mask is None else mask | part
    return Sample(object_, id_, item.defect, rgb, depth, mask, anomalous, depth_camera, bits=bits)


def _check_exists(split: Path) -> None:
    if not split.is_dir():
        raise UserError(f"{split} is missing; add it, or name the other objects in config.dataset.objects.")


def _files_by_name(
    folder: Path, within: Within, suffixes: Sequence[str], besides: Collection[str] = ()
) -> dict[str, Path]:
    """List the files of a folder and its subfolders by their names without suffix, sorted.

    Args:
        folder: Folder of the files.
        within: Folders that links may lead into.
        suffixes: Allowed suffixes.
        besides: Entries of the folder that are left out.
    """
    files: dict[str, Path] = {}
    for name, entry in list_entries(folder, within).items():
        file = folder / name
        if name in besides:
            continue
        if entry.is_dir() and not entry.is_symlink() and file.suffix.lower() not in suffixes:
            inner = {f"{name}/{id_}": path for id_, path in _files_by_name(file, within, suffixes).items()}
        else:
            _check_suffix(file, suffixes)
            check_file(entry)
            inner = {file.stem: file}
        for id_, path in inner.items():
            if id_ in files:
                raise UserError(f"{path} and {files[id_].name} differ only in suffix; rename or remove either.")
            files[id_] = path
    return files


def _check_suffix(file: Path, suffixes: Sequence[str]) -> None:
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{file} does not end in one of {' '.join(suffixes)}; convert or remove it.")


def _by_image(files: dict[str, Path], images: dict[str, Path], masks: bool) -> dict[str, list[Path]]:
    """List the files of depth, or the masks, of each image, all by name; an image may have several masks."""
    photographs, found = matching.Photographs(images), dict[str, list[Path]]()
    for name, file in files.items():
        of = photographs.of(name, matching.MASK if masks else matching.DEPTH)
        folder, _, _ = name.rpartition("/")
        if not of and masks and folder in images:
            of = [folder]
        if not of:
            (nearest,) = get_close_matches(name, images, 1, 0)
            raise UserError(
                f"{file} has no image of its name, the nearest is {images[nearest]}; rename either, add an image or"
                " remove the file."
            )
        image, *others = of
        if others:
            raise UserError(f"{file} may belong to {images[image]} or {images[others[0]].name}; rename it like either.")
        if image in found and not masks:
            raise UserError(f"{file} and {found[image][0].name} both belong to {images[image]}; keep one.")
        if image not in (name, matching.bare(name, matching.MASK), folder):
            matching.tell_likeness(file)
        found.setdefault(image, []).append(file)
    return found
