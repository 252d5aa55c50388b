"""Good images given as arrays, written into a run's folder as a dataset that its steps read.

`images/<digest>/` is named by what it holds, so that the same images, given again, go on with the step that they began:

    dataset.yaml                            camera and settings of depth
    <object>/train/good/rgb/00000.png
    <object>/train/good/depth/00000.npy     metres; clouds if the camera is orthographic and measures no heights
"""

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, UInt8
from PIL import Image

from iumad_jax.data.depth import backproject
from iumad_jax.data.formats.images import check_size
from iumad_jax.data.readers.folder import SETTINGS
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detector
from iumad_jax.runtime.storage import make_folder, write_whole

Photographs = UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "n h w 3"] | Sequence[UInt8[np.ndarray, "h w 3"]]
Depths = Float[np.ndarray, "h w"] | Float[np.ndarray, "n h w"] | Sequence[Float[np.ndarray, "h w"]]


def check_name(name: str) -> None:
    """Raise UserError unless a name can be that of an object's folder."""
    valid = isinstance(name, str) and name.isprintable() and name.strip() == name != "all"
    if not valid or not name or name.startswith(".") or set(name) & set('/\\,:*?"<>|'):
        raise UserError(f"{name!r} cannot be the name of an object; use letters, digits, - and _.")


def write(
    workdir: Path, detector: Detector, name: str, rgb: Photographs | None, depth: Depths | None, camera: Camera | None
) -> Path:
    """Check good images of an object and write them as a dataset, unless they were written before.

    Args:
        workdir: Workdir of the run.
        detector: Detector of the run.
        name: Name of the object.
        rgb: One or several images; None only if the run learns from depth alone.
        depth: Depth (or height) of each image in metres; unused if the run learns from RGB alone.
        camera: Camera of the depth; by default that of the run's training images.

    Returns:
        Root of the dataset, which appears only when it is complete.

    Raises:
        UserError: If an image cannot be used, or the dataset cannot be written.
    """
    images = list(_checked(detector, rgb, depth, camera))
    files = dict(_files(detector, name, images, camera))
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.encode() + data).digest() for path, data in files.items()))
    root = workdir.absolute() / "images" / digest.hexdigest()[:12]
    unfinished = root.with_name(f"{root.name}.unfinished")
    if root.exists():
        return root
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for path, content in files.items():
            make_folder((unfinished / path).parent)
            write_whole(unfinished / path, content)
        unfinished.rename(root)
    except UserError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return root


def _checked(detector: Detector, rgb: Any, depth: Any, camera: Camera | None) -> Iterator[tuple[Any, Any]]:
    """Yield RGB and depth of each image, None where the detector does not use it."""
    uses = detector.processing.modalities
    photographs = None if rgb is None and "rgb" not in uses else _listed("rgb", rgb, axes=3)
    depths = _listed("depth", depth, axes=2) if "depth" in uses else None
    if photographs and depths and len(depths) != len(photographs):
        raise UserError(f"rgb holds {len(photographs)} images and depth {len(depths)}; pass one depth per image.")
    if depths and len({metres.shape for metres in depths}) > 1:
        raise UserError("depth holds images of several sizes, but has one camera; pass images of one size.")
    count = len(photographs or depths or ())
    pairs = zip(photographs or [None] * count, depths or [None] * count, strict=True)
    for number, (photograph, metres) in enumerate(pairs):
        try:
            detector.prepare(photograph, metres, camera)
            for image in (photograph, metres):
                if image is not None:
                    check_size(Path("it"), image.shape[1], image.shape[0])
            if metres is not None:
                detector.check_metres(metres)
        except UserError as error:
            problem = str(error).removeprefix("image 0: ")
            raise UserError(f"image {number} of {count}: {problem}") from error
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


def _files(
    detector: Detector, name: str, images: Sequence[tuple[Any, Any]], camera: Camera | None
) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file of the dataset."""
    good = f"{name}/train/good"
    for number, (photograph, depth) in enumerate(images):
        png, npy = io.BytesIO(), io.BytesIO()
        if photograph is not None:
            Image.fromarray(photograph).save(png, "PNG")
            yield f"{good}/rgb/{number:05}.png", png.getvalue()
        if depth is not None:
            camera, metres = camera or detector.default_camera(depth.shape[1]), depth.astype(np.float32)
            is_cloud = camera.orthographic and not camera.heights
            np.save(npy, backproject(metres, camera) if is_cloud else metres)
            yield f"{good}/depth/{number:05}.npy", npy.getvalue()
    if camera is not None and images[0][1] is not None:
        yield SETTINGS, yaml.safe_dump(_settings(detector, camera), sort_keys=False).encode()


def _settings(detector: Detector, camera: Camera) -> dict[str, Any]:
    """Return the camera and the settings with which the run prepares depth; clouds tell an orthographic camera."""
    processing = detector.processing
    settings: dict[str, Any] = {"unit": "m", "missing": [], "kind": "depth"}
    if camera.heights:
        settings |= {"kind": "height", "pitch": [1000 / camera.fx, 1000 / camera.fy]}
    elif not camera.orthographic:
        settings["camera"] = {key: float(getattr(camera, key)) for key in ("fx", "fy", "cx", "cy")}
    if detector.depth_format.align == "resize":
        settings["align"] = "resize"
    return settings | {
        "object_height": processing.object_height,
        "height_range": processing.height_range,
        "normals_window": processing.normals_window,
    }
