"""Lists images to predict: photographs in files or folders, or a split of a dataset."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from iumad_jax.data.depth import picture
from iumad_jax.data.formats import retry
from iumad_jax.data.formats.alignment import align
from iumad_jax.data.formats.depth_files import DEPTH_IMAGES, UNITS, read_depth
from iumad_jax.data.formats.files import Within, check_inside, is_clutter, is_output, tell
from iumad_jax.data.formats.images import PHOTOGRAPHS, read_photograph
from iumad_jax.data.readers import matching
from iumad_jax.data.readers.layout import DEPTHS, MASKS
from iumad_jax.data.sample import Camera, DepthFormat, Reader, Split
from iumad_jax.errors import UserError

_REMEDY = "use --depth_unit=UNIT, such as mm"


class InputImage(NamedTuple):
    """An image to predict."""

    name: str  # path of its output files, relative and without suffix
    read: Callable[[], tuple[np.ndarray, np.ndarray | None, Camera | None]]  # RGB, depth, camera of a `Sample`
    files: Callable[[], tuple[Path | None, Path | None]]  # RGB, depth; None if it is not in one file of its own
    format_: DepthFormat = DepthFormat()  # what the numbers in the depth file mean


def photographs(
    root: Path,
    needs_depth: bool,
    depth_path: Path | None,
    format_: DepthFormat,
    camera: Camera | None,
    bits: int | None = None,
    trusted: Sequence[Path] = (),
    *,
    may_be_empty: bool = False,
) -> Iterator[InputImage]:
    """Yield the images of --input with their depth from --depth.

    Args:
        root: An image, or a folder of images.
        needs_depth: Whether to read depth.
        depth_path: Depth file of the image, or a folder with depth files of the images' names, or such as `matching`
            accepts.
        format_: What the numbers in the depth files mean.
        camera: Camera of the depth files; by default it is estimated from clouds.
        bits: Bits that photographs of 16 bits per channel use; None refuses such photographs.
        trusted: Folders that links in the input, or in the folder of depth, may lead into.
        may_be_empty: Whether a folder without images is accepted.

    Raises:
        UserError: If the input or depth is missing or unusable. Errors of a single file are raised when it is read.
    """
    if not root.exists():
        raise UserError(f"--input is {root}, which does not exist; choose an image or a folder of images.")
    if needs_depth:
        _check_depth(depth_path, root)
    within = (root, *trusted)
    images = [root] if root.is_file() else _list_photographs(within)
    if (images and images[0].suffix.lower() not in PHOTOGRAPHS) or (not images and not may_be_empty):
        raise UserError(f"--input is {root}, which contains no image; use files ending in {' '.join(PHOTOGRAPHS)}.")
    for name, file in _by_name(root, images).items():

        def files(file: Path = file, name: str = name) -> tuple[Path, Path | None]:
            return file, _find_depth_file(depth_path, name, file) if needs_depth and depth_path else None

        def read(
            file: Path = file, files: Callable[[], tuple[Path, Path | None]] = files
        ) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            check_inside(file, within)
            rgb, (_, depth_file) = read_photograph(file, bits), files()
            if depth_file is None or depth_path is None:
                return rgb, None, None
            check_inside(depth_file, (depth_path, *trusted))
            _check_no_own_range(depth_file)
            depth, cloud_camera = read_depth(depth_file, format_, rgb.shape[:2], _REMEDY, camera)
            depth, cloud_camera = align(depth, cloud_camera, format_.align, rgb.shape[:2], depth_file, file)
            return rgb, depth, camera or cloud_camera

        yield InputImage(name, read, files, format_)


def depth_files(
    root: Path,
    format_: DepthFormat,
    camera: Camera | None,
    default_camera: Callable[[int], Camera],
    trusted: Sequence[Path] = (),
    *,
    may_be_empty: bool = False,
) -> Iterator[InputImage]:
    """Yield the images of --input for a model of depth alone; for the arguments and errors see `photographs`."""
    if not root.exists():
        raise UserError(f"--input is {root}, which does not exist; choose a depth file or a folder of depth files.")
    within = (root, *trusted)
    files = [root] if root.is_file() else _list(root, DEPTH_IMAGES, within)
    if (files and files[0].suffix.lower() not in DEPTH_IMAGES) or (not files and not may_be_empty):
        raise UserError(f"--input is {root}, which contains no depth; use files ending in {' '.join(DEPTH_IMAGES)}.")
    for name, file in _by_name(root, files).items():

        def read(file: Path = file) -> tuple[np.ndarray, np.ndarray, Camera | None]:
            check_inside(file, within)
            _check_no_own_range(file)
            depth, cloud_camera = read_depth(file, format_, None, _REMEDY, camera)
            camera_ = camera or cloud_camera or default_camera(depth.shape[1])
            return picture(depth, camera_), depth, camera_

        def files_(file: Path = file) -> tuple[None, Path]:
            return None, file

        yield InputImage(name, read, files_, format_)


def _check_depth(path: Path | None, root: Path) -> None:
    """Raise UserError unless --depth is valid; a folder of images needs a folder of depth files."""
    if path is None:
        raise UserError("--depth is missing; add it, since this model was trained with depth.")
    if not path.exists():
        raise UserError(f"--depth is {path}, which does not exist; choose a depth file or a folder of depth files.")
    if root.is_dir() and not path.is_dir():
        raise UserError(f"--depth is {path}, one file for all of {root}; choose a folder of depth files.")


def _check_no_own_range(file: Path) -> None:
    """Raise UserError for a depth image of Eyecandies, the numbers of which mean something else in every image."""
    range_file = file.with_name(f"{file.stem}.yaml".replace("depth", "info_depth"))
    if range_file != file and range_file.exists():
        raise UserError(
            f"{file} has a range of its own, in {range_file.name}; predict Eyecandies without --input and --depth, with"
            " --config.dataset.root and --split."
        )


def _list_photographs(within: Within) -> list[Path]:
    """List the photographs in a folder and its subfolders, without masks and depth images, which are told."""
    root = within[0]
    files = {file.relative_to(root): file for file in _list(root, PHOTOGRAPHS, within)}
    names = [str(path.with_suffix("")) for path in files]
    beside = {*matching.beside(names, matching.MASK), *matching.beside(names, matching.DEPTH)}
    others = [
        path
        for path in files
        if {part.casefold() for part in path.parent.parts} & {*MASKS, *DEPTHS} or str(path.with_suffix("")) in beside
    ]
    if others:
        tell("masks and depth images beside photographs are not predicted", root / others[0])
    return [file for path, file in files.items() if path not in others]


def _list(folder: Path, suffixes: Collection[str], within: Within, linked: bool = False) -> list[Path]:
    """List the files in a folder and its subfolders, sorted, without clutter and results of commands.

    A link to a folder is followed if it leads out of the input, where the files are not listed yet, but none behind it.
    Broken links to files are listed, so that reading them tells.
    """
    check_inside(folder, within)
    try:
        entries = [(path, path.is_dir()) for path in sorted(folder.iterdir()) if not is_clutter(path.name)]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable.") from error
    files: list[Path] = []
    for path, is_folder in entries:
        if is_folder and path.is_symlink():
            if path.resolve().is_relative_to(within[0].resolve()):
                continue
            if linked:
                tell("links to folders are not followed behind another one", path)
            elif not is_output(path):
                files += _list(path, suffixes, within, linked=True)
        elif is_folder:
            if not is_output(path):
                files += _list(path, suffixes, within, linked)
        elif path.suffix.lower() in suffixes and (path.is_file() or not path.exists()):
            if not str(path).isprintable():
                raise UserError(f"{path} has a name that cannot be printed; rename it.")
            files.append(path)
    return files


def _by_name(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for file in files:
        name = str(file.relative_to(root).with_suffix("")) if root.is_dir() else file.stem
        if name in names:
            raise UserError(f"{file} and {names[name].name} differ only in suffix; rename or remove either.")
        names[name] = file
    return names


def _find_depth_file(path: Path, name: str, photograph: Path) -> Path:
    if path.is_file():
        return path
    for like in matching.depth_names(name):
        files = [file for suffix in DEPTH_IMAGES if (file := path / f"{like}{suffix}").is_file() and file != photograph]
        if len(files) == 1:
            if like != name:
                matching.tell_likeness(files[0])
            return files[0]
        if files:
            raise UserError(f"{files[0]} and {files[1].name} both are the depth of {name}; keep one.")
    folder = (path / name).parent
    found = [file.name for file in folder.iterdir() if file.suffix.lower() in DEPTH_IMAGES] if folder.is_dir() else []
    nearest = "".join(f" (nearest: {other})" for other in get_close_matches(Path(name).name, found, 1, 0))
    raise UserError(
        f"{folder} has no depth of {name}{nearest}; add a file of its name, ending in {' '.join(DEPTH_IMAGES)}."
    )


def parse_unit(value: str) -> float:
    """Return the metres of the unit in --depth_unit.

    Raises:
        UserError: If it is neither the name of a unit nor a number above 0.
    """
    with suppress(ValueError):
        if 0 < (unit := UNITS.get(value.lower()) or float(value)) < math.inf:
            return unit
    raise UserError(f"--depth_unit is {value}; use {', '.join(UNITS)}, or metres per unit such as 0.001.")


def parse_camera(values: list[str]) -> Camera:
    """Parse the values of --camera.

    Raises:
        UserError: If they are not fx, fy, cx and cy.
    """
    try:
        fx, fy, cx, cy = map(float, values)
        return Camera(fx, fy, cx, cy)
    except (ValueError, UserError) as error:
        raise UserError(f"--camera is {','.join(values)}; use fx,fy,cx,cy in pixels, fx and fy above 0.") from error


def split_images(reader: Reader, split: Split) -> Iterator[InputImage]:
    """Yield the images of a split of a dataset.

    Raises:
        UserError: If the split has no images. Errors of a single image are raised when it is read.
    """
    ids = [(name, id_) for name in reader.objects for id_ in reader.ids(name, split)]
    if not ids:
        raise UserError(f"the dataset has no {split} images; choose another --split.")
    resized: Literal["resize"] | None = "resize" if reader.depth_format.align == "resize" else None
    format_ = DepthFormat(1.0, heights=reader.depth_format.heights, align=resized)  # of depth that is read already
    for name, id_ in ids:

        def read(name: str = name, id_: str = id_) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            sample = retry.after_system_error(reader.read, name, split, id_)
            return sample.rgb, sample.depth, sample.camera

        def files(name: str = name, id_: str = id_) -> tuple[Path, None]:
            return reader.files(name, split, id_)[0], None

        yield InputImage(f"{name}/{id_}", read, files, format_)
