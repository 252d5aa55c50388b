"""Unknown images as the beginning of new objects: groups of like images, each written as an object to learn.

A group becomes `new_object_<number>`, an object of a dataset that `data.readers.folder` reads:

    new_object_1.jpg                           up to 12 images of the group, labelled with the numbers of their files
    new_object_1/train/good/rgb/000_<name>.*   copies of the input files
    new_object_1/train/good/depth/000_<name>.*
    dataset.yaml                               unit, camera and settings of depth

Depth of datasets, whose files may need others to be read, is written as clouds or heights in metres.
"""

import io
import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jaxtyping import Float
from PIL import Image, ImageOps

from iumad_jax.data.depth import backproject
from iumad_jax.data.formats.files import read_error
from iumad_jax.data.readers.folder import SETTINGS
from iumad_jax.data.readers.unlabelled import InputImage
from iumad_jax.data.sample import Alignment, Camera
from iumad_jax.inference.detector import Detector
from iumad_jax.report import contact_sheet
from iumad_jax.runtime.storage import make_folder, write_whole

_SHOWN = 12  # images per picture
_SIDE = 160  # pixels per side of an image in a picture


class Group(NamedTuple):
    """Images that are like each other."""

    name: str  # name of the object that they may become
    images: list[InputImage]
    picture: Path


def group(embeddings: Float[np.ndarray, "n c"], threshold: float) -> list[list[int]]:
    """Group images by likeness: agglomerative clustering with average linkage.

    Images of an object that was never learned spread about their mean like those of a learned one, that is up to the
    threshold. Two of them are therefore sqrt(2) times as far from each other, as their deviations are independent.

    Args:
        embeddings: What unknown images would be recognised by, see `recognition.whitened`.
        threshold: Distance to an object above which an image is unknown.

    Returns:
        The rows of each group, ascending; the largest group first.
    """
    if len(embeddings) < 2:  # scikit-learn refuses to cluster a single image
        return [[row] for row in range(len(embeddings))]
    from sklearn.cluster import AgglomerativeClustering  # loads slowly, and few commands need it

    root_mean_square = embeddings.astype(np.float64) / math.sqrt(embeddings.shape[1])
    limit = math.sqrt(2) * threshold
    clustering = AgglomerativeClustering(n_clusters=None, linkage="average", distance_threshold=limit)
    labels = clustering.fit_predict(root_mean_square)
    rows = [np.flatnonzero(labels == label).tolist() for label in range(labels.max() + 1)]
    return sorted(rows, key=lambda members: (-len(members), members))


def write(
    detector: Detector, images: Sequence[InputImage], embeddings: Float[np.ndarray, "n c"], folder: Path
) -> list[Group]:
    """Group unknown images and write each group as an object to learn.

    Args:
        detector: Detector that does not know the images.
        images: Unknown images, at least one.
        embeddings: What they would be recognised by, see `recognition.whitened`.
        folder: Root of the dataset to write, new or empty.

    Raises:
        UserError: If a file cannot be read or written.
    """
    names = (name for number in itertools.count(1) if (name := f"new_object_{number}") not in detector.objects)
    threshold = float(np.median(detector.state.thresholds.unknown))
    groups = [
        Group(name, [images[row] for row in rows], folder / f"{name}.jpg")
        for rows, name in zip(group(embeddings, threshold), names, strict=False)
    ]
    has_depth = "depth" in detector.processing.modalities
    for name, members, picture in groups:
        good = folder / name / "train" / "good"
        for number, image in enumerate(members):
            _copy_image(detector, image, good, f"{number:03}_{image.name.replace('/', '_')}")
        shown = np.linspace(0, len(members) - 1, min(len(members), _SHOWN), dtype=int)
        panels = [_panel(f"{number:03}", members[number]) for number in shown]
        contact_sheet.save(picture, f"{name}: {len(panels)} of {len(members)} unknown images", panels)
    settings = {"bits": detector.processing.bits} if detector.processing.bits else {}
    if has_depth:
        settings |= _settings(detector, images[0])
    if settings:
        write_whole(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False).encode())
    return groups


def describe(groups: Sequence[Group], workdir: str) -> str:
    """Describe the groups, with the commands that learn them."""
    count = f"{len(groups)} group{'s' * (len(groups) > 1)}"
    lines = [
        f"The unknown images form {count} of like images. Before a group is learned, a person must look at its picture"
        " and remove images with defects, or of other objects, from its folder, which may be renamed together with"
        " --objects. Keep the folder, because the run reads it again in later steps:"
    ]
    for name, images, picture in groups:
        count = f"{len(images)} images" if len(images) > 1 else "1 image, too few to learn"
        lines.append(f"{name}: {count}; see {picture}.")
        if len(images) > 1:
            dataset = ["--config.dataset.name=folder", f"--config.dataset.root={picture.parent}"]
            command = ["python", "-m", "iumad_jax.learn", f"--workdir={workdir}", f"--objects={name}", *dataset]
            lines.append(f"  {shlex.join(command)}")
    return "\n".join(lines)


def _copy_image(detector: Detector, image: InputImage, good: Path, name: str) -> None:
    rgb_file, depth_file = image.files()
    if rgb_file is not None and "rgb" in detector.processing.modalities:
        _copy(rgb_file, good / "rgb" / f"{name}{rgb_file.suffix}")
    if depth_file is not None:
        _copy(depth_file, good / "depth" / f"{name}{depth_file.suffix}")
    elif "depth" in detector.processing.modalities:
        _, depth, camera = image.read()
        assert depth is not None
        cloud = io.BytesIO()
        camera = camera or detector.default_camera(depth.shape[1])
        np.save(cloud, depth if camera.heights else backproject(depth, camera))
        _write(good / "depth" / f"{name}.npy", cloud.getvalue())


def _copy(file: Path, copy: Path) -> None:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise read_error(file, error) from error
    _write(copy, content)


def _write(file: Path, content: bytes) -> None:
    make_folder(file.parent)
    write_whole(file, content)


def _panel(label: str, image: InputImage) -> contact_sheet.Panels:
    rgb, _, _ = image.read()
    return contact_sheet.Panels(label, np.asarray(ImageOps.pad(Image.fromarray(rgb), (_SIDE, _SIDE), color="white")))


def _settings(detector: Detector, image: InputImage) -> dict[str, Any]:
    """Return the settings of depth with which the detector prepared the images, as dataset.yaml.

    Clouds bring their own cameras.
    """
    processing, format_ = detector.processing, image.format_
    settings: dict[str, Any] = {} if format_.unit is None else {"unit": format_.unit}
    if format_.missing is not None:
        settings["missing"] = list(format_.missing)
    _, depth, camera = image.read()
    assert depth is not None
    camera = camera or detector.default_camera(depth.shape[1])
    if format_.heights:
        settings |= {"kind": "height", "pitch": [1000 / camera.fx, 1000 / camera.fy]}
    elif image.files()[1] is not None and not camera.orthographic:
        settings["camera"] = _intrinsics(camera)
    if isinstance(format_.align, Alignment):
        settings["camera"] = _intrinsics(format_.align.depth)
        settings["align"] = {"camera": _intrinsics(format_.align.rgb), "matrix": list(map(list, format_.align.matrix))}
    elif format_.align:
        settings["align"] = format_.align
    return settings | {
        "object_height": processing.object_height,
        "height_range": processing.height_range,
        "normals_window": processing.normals_window,
    }


def _intrinsics(camera: Camera) -> dict[str, float]:
    return {key: float(getattr(camera, key)) for key in ("fx", "fy", "cx", "cy")}
