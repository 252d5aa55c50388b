"""Good images given as arrays, written into a run's folder as a dataset that its steps read.

`images/<digest>/` is named by what it holds, so that the same images, given again, go on with the step that they began:

    dataset.yaml                            camera and settings of depth
    <object>/train/good/rgb/00000.png
    <object>/train/good/depth/00000.npy     metres; clouds of points if the camera is orthographic
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, UInt8
from PIL import Image

from iumad_jax.data.depth import backproject
from iumad_jax.data.formats.depth_files import check_distance
from iumad_jax.data.formats.images import check_size
from iumad_jax.data.readers.folder import SETTINGS
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detector
from iumad_jax.runtime.storage import write_error

Photographs = UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "n h w 3"] | Sequence[UInt8[np.ndarray, "h w 3"]]
Depths = Float[np.ndarray, "h w"] | Float[np.ndarray, "n h w"] | Sequence[Float[np.ndarray, "h w"]]
_Images = list[tuple[np.ndarray, np.ndarray | None]]  # RGB and depth of each image


def check_name(name: str) -> None:
    """Raise UserError unless a name can be that of an object's folder."""
    valid = isinstance(name, str) and name.isprintable() and name.strip() == name != "all"
    if not valid or not name or name.startswith(".") or set(name) & set('/\\,:*?"<>|'):
        raise UserError(f"{name!r} cannot be the name of an object; use letters, digits, - and _.")


def write(
    workdir: Path, detector: Detector, name: str, rgb: Photographs, depth: Depths | None, camera: Camera | None
) -> Path:
    """Check good images of an object and write them as a dataset, unless they were written before.

    Args:
        workdir: Workdir of the run.
        detector: Detector of the run.
        name: Name of the object.
        rgb: One or several images.
        depth: Depth of each image in metres; unused if the run learns from RGB alone.
        camera: Camera of the depth; by default that of the run's training images.

    Returns:
        Root of the dataset, which appears only when it is complete.

    Raises:
        UserError: If an image cannot be used, or the dataset cannot be written.
    """
    images, settings = list(_checked(detector, rgb, depth, camera)), b""
    if images[0][1] is not None:
        camera = camera or detector.default_camera(images[0][0].shape[1])
        images = [(photograph, _stored(metres, camera)) for photograph, metres in images if metres is not None]
        settings = yaml.safe_dump(_settings(detector, camera), sort_keys=False).encode()
    root = workdir.absolute() / "images" / _digest(name, images, settings)
    if root.exists():
        return root
    unfinished = root.with_name(f"{root.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        good = unfinished / name / "train" / "good"
        for kind in ("rgb", "depth") if settings else ("rgb",):
            (good / kind).mkdir(parents=True)
        for number, (photograph, metres) in enumerate(images):
            Image.fromarray(photograph).save(good / "rgb" / f"{number:05}.png")
            if metres is not None:
                np.save(good / "depth" / f"{number:05}.npy", metres)
        if settings:
            (unfinished / SETTINGS).write_bytes(settings)
        unfinished.rename(root)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise write_error(root, error) from error
    return root


def _checked(detector: Detector, rgb: Any, depth: Any, camera: Camera | None) -> Iterator[tuple[Any, Any]]:
    """Yield RGB and depth of each image, depth being None where the detector does not use it."""
    photographs = _listed("rgb", rgb, axes=3)
    depths: list[Any] = [None] * len(photographs)
    if "depth" in detector.processing.modalities and depth is not None:
        depths = _listed("depth", depth, axes=2)
        if len(depths) != len(photographs):
            raise UserError(f"rgb holds {len(photographs)} images and depth {len(depths)}; pass one depth per image.")
        if len({metres.shape for metres in depths}) > 1:
            raise UserError("depth holds images of several sizes, but has one camera; pass images of one size.")
    for number, (photograph, metres) in enumerate(zip(photographs, depths, strict=True)):
        try:
            detector.prepare(photograph, metres, camera)
            check_size(Path("it"), photograph.shape[1], photograph.shape[0])
            if metres is not None:
                measured = metres[np.isfinite(metres) & (metres != 0)]
                check_distance(measured[None], Path("its depth"), "pass metres")
        except UserError as error:
            problem = str(error).removeprefix("image 0: ")
            raise UserError(f"image {number} of {len(photographs)}: {problem}") from error
        yield photograph, metres


def _listed(argument: str, images: Any, axes: int) -> list[Any]:
    """List the images of an argument, which may be a single one."""
    if getattr(images, "ndim", None) == axes and (axes == 2 or images.shape[-1] == 3):
        return [images]
    if not isinstance(images, np.ndarray | Sequence) or not len(images):
        raise UserError(f"{argument} holds no images; pass an array of them, or a sequence of arrays.")
    for number, image in enumerate(images):
        if getattr(image, "ndim", None) != axes:
            raise UserError(f"{argument}[{number}] is not an array of {axes} axes; pass one for every image.")
    return list(images)


def _stored(depth: Float[np.ndarray, "h w"], camera: Camera) -> np.ndarray:
    """Return depth as it is stored; settings of a dataset cannot describe an orthographic camera, but clouds can."""
    metres = depth.astype(np.float32)
    return backproject(metres, camera) if camera.orthographic else metres


def _settings(detector: Detector, camera: Camera) -> dict[str, Any]:
    """Return the content of dataset.yaml: the camera, and the settings with which the run prepares depth."""
    camera_settings = {key: float(getattr(camera, key)) for key in ("fx", "fy", "cx", "cy")}
    return {
        **({} if camera.orthographic else {"camera": camera_settings}),
        "object_height": detector.processing.object_height,
        "height_range": detector.processing.height_range,
        "normals_window": detector.processing.normals_window,
    }


def _digest(name: str, images: _Images, settings: bytes) -> str:
    """Return a digest of all that the dataset holds."""
    digest = hashlib.sha256(f"{name}\n".encode() + settings)
    for photograph, metres in images:
        for array in (photograph, metres) if metres is not None else (photograph,):
            digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]
