"""Depth of another resolution, of another camera and in no order, compared with scenes that are known exactly."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from iumad_jax.data import depth
from iumad_jax.data.degradation import vary
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers import unlabelled
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.sample import Alignment, Camera, DepthFormat
from iumad_jax.errors import UserError
from iumad_jax.inference import unknown_images
from iumad_jax.inference.detector import Detector
from tests import sentences
from tests.data.formats.test_depth_files import ply

DEPTH_CAMERA, RGB_CAMERA = Camera(110, 112, 63.2, 47.9), Camera(190, 188, 99, 71)
RGB_SIZE, DEPTH_SIZE = (140, 200), (96, 128)
ANGLE = np.radians(3)
ROTATION = np.array([[np.cos(ANGLE), 0, np.sin(ANGLE)], [0, 1, 0], [-np.sin(ANGLE), 0, np.cos(ANGLE)]])
SHIFT = np.array([0.025, 0.002, -0.001])  # metres
MATRIX = [[*row, shift] for row, shift in zip(ROTATION.tolist(), SHIFT.tolist(), strict=True)] + [[0, 0, 0, 1]]
NORMAL, DISTANCE = np.array([0.2, 0.1, -1]) / np.sqrt(1.05), 0.5  # of a plane in coordinates of the depth camera


def rays(camera: Camera, size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([(columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones(size)], axis=-1)


def plane_seen_by(camera: Camera, size: tuple[int, int], normal: np.ndarray, distance: float) -> np.ndarray:
    return (-distance / (rays(camera, size) @ normal)).astype(np.float32)


def write(root: Path, name: str, rgb: np.ndarray, metres: np.ndarray, settings: dict) -> None:
    for kind in ("rgb", "depth"):
        (root / "bolt/train/good" / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(root / f"bolt/train/good/rgb/{name}.png")
    tifffile.imwrite(root / f"bolt/train/good/depth/{name}.tiff", metres)
    (root / "dataset.yaml").write_text(yaml.safe_dump(settings))


def intrinsics(camera: Camera) -> dict[str, float]:
    return {key: getattr(camera, key) for key in ("fx", "fy", "cx", "cy")}


CALIBRATED = {"camera": intrinsics(DEPTH_CAMERA), "align": {"camera": intrinsics(RGB_CAMERA), "matrix": MATRIX}}
PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (*RGB_SIZE, 3)).astype(np.uint8)


def test_depth_of_another_camera_is_seen_from_the_photographs(tmp_path: Path) -> None:
    """The plane n . p + d = 0 becomes (R n) . q + d - (R n) . t = 0 for q = R p + t."""
    measured = plane_seen_by(DEPTH_CAMERA, DEPTH_SIZE, NORMAL, DISTANCE)
    measured[40:44, 50:55] = np.nan
    write(tmp_path, "0", PHOTOGRAPH, measured, CALIBRATED)
    sample = Folder(tmp_path, needs_depth=True).read("bolt", "train", "0")
    assert sample.camera == RGB_CAMERA
    assert sample.depth.shape == RGB_SIZE
    turned = ROTATION @ NORMAL
    expected = plane_seen_by(RGB_CAMERA, RGB_SIZE, turned, DISTANCE - turned @ SHIFT)
    known = np.isfinite(sample.depth)
    assert np.abs(sample.depth - expected)[known].max() < 1e-3  # half a pixel on the slope
    assert np.abs(sample.depth - expected)[known].mean() < 3e-4
    points = ((rays(RGB_CAMERA, RGB_SIZE) * expected[..., None]) - SHIFT) @ ROTATION
    columns = points[..., 0] / points[..., 2] * DEPTH_CAMERA.fx + DEPTH_CAMERA.cx
    rows = points[..., 1] / points[..., 2] * DEPTH_CAMERA.fy + DEPTH_CAMERA.cy
    hole = (np.abs(rows - 41.5) < 1.5) & (np.abs(columns - 52) < 2)
    seen = (rows > 0) & (rows < 95) & (columns > 0) & (columns < 127)
    assert known[seen & ~((np.abs(rows - 41.5) < 3) & (np.abs(columns - 52) < 4))].all()
    assert not known[hole].any()
    angles = np.degrees(np.arccos(np.clip(depth.measure(sample.depth, RGB_CAMERA, 9).normals[..., 2], -1, 1)))
    assert np.quantile(angles[seen], 0.95) < 3


def test_the_nearest_point_of_a_pixel_is_seen() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal([0, 0, 0.5], [0.1, 0.1, 0.1], (3000, 3))
    camera = Camera(20, 22, 9.5, 7)
    image = depth.project(points, camera, (15, 20))
    expected = np.full((15, 20), np.nan, np.float32)
    for x, y, z in points[points[:, 2] > 0]:
        row, column = round(camera.fy * y / z + camera.cy), round(camera.fx * x / z + camera.cx)
        if 0 <= row < 15 and 0 <= column < 20:
            expected[row, column] = np.fmin(expected[row, column], np.float32(z))
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("removed", [0, 500])
def test_a_cloud_in_no_order_is_projected(tmp_path: Path, scan, removed: int) -> None:
    scene = scan(noise=0, holes=0)
    points = np.random.default_rng(0).permutation(scene.cloud.reshape(-1, 3))[removed:]
    file = tmp_path / "000.ply"
    file.write_bytes(ply(points[None], "binary_little_endian", size=False))
    measured, camera = read_depth(file, DepthFormat(), (48, 64), "", scene.camera)
    assert camera == scene.camera
    known = np.isfinite(measured)
    assert (~known).sum() == removed
    np.testing.assert_array_equal(measured[known], scene.cloud[..., 2][known])
    with pytest.raises(UserError):
        read_depth(file, DepthFormat(), (48, 64), "")
    with pytest.raises(UserError, match=sentences.CAMERA_SEES_NOTHING):
        read_depth(file, DepthFormat(), (48, 64), "", Camera(1e6, 1e6, -1e6, 0))


def test_one_view_in_two_resolutions(tmp_path: Path, scan) -> None:
    """Depth of half the resolution is processed at its own, in training as in use."""
    scene = scan(96, 128, holes=0)
    half = scene.cloud[::2, ::2, 2]
    write(tmp_path, "0", scene.rgb, half, {"align": "resize", "camera": intrinsics(scene.camera.scaled(0.5))})
    reader = Folder(tmp_path, needs_depth=True)
    sample = reader.read("bolt", "train", "0")
    np.testing.assert_array_equal(sample.depth, half)
    processing = Processing(("rgb", "depth"), 32, "height", reader.height_range, 0.005, 5)
    arrays = processing(sample)
    whole = processing(dataclasses.replace(sample, depth=scene.cloud[..., 2], camera=scene.camera))
    assert np.abs(arrays["images_depth"].astype(float) - whole["images_depth"]).mean() < 1
    moved = vary(sample, 3, 0.005)
    assert moved.depth.shape == half.shape
    assert (moved.camera.cx - sample.camera.cx) == pytest.approx(0.03 * 64, abs=0.03 * 128)
    recorded = json.loads(json.dumps(Store(tmp_path, reader, processing, lambda x: x, {}).describe()))
    format_ = DepthFormat.recorded(recorded["depth"])
    camera, width = Camera(**recorded["camera"]), recorded["camera_width"]
    detector = Detector(Path(), {}, None, (), (), 0, processing, format_, camera, width, None, None)
    prepared = detector.prepare(sample.rgb, half)
    np.testing.assert_array_equal(prepared["depth"][0], arrays["images_depth"].astype(np.float32))
    folders = (tmp_path / "bolt/train/good" / kind for kind in ("rgb", "depth"))
    rgb, depths = folders
    (image,) = unlabelled.photographs(rgb, True, depths, format_, None)
    np.testing.assert_array_equal(image.read()[1], half)
    assert unknown_images._settings(detector, image)["align"] == "resize"
    aligned = dataclasses.replace(detector, depth_format=DepthFormat())
    with pytest.raises(UserError, match="depth is float32 of shape"):
        aligned.prepare(sample.rgb, half)


def test_an_alignment_survives_its_record() -> None:
    rows = tuple(map(tuple, MATRIX))
    format_ = DepthFormat(0.001, (7.0,), align=Alignment(DEPTH_CAMERA, RGB_CAMERA, rows))
    assert DepthFormat.recorded(json.loads(json.dumps(dataclasses.asdict(format_)))) == format_


def without(key: str) -> dict:
    return {name: value for name, value in CALIBRATED.items() if name != key}


BAD = {
    "no alignment": ({}, sentences.ALIGN_MISSING),
    "one view of two shapes": ({"align": "resize"}, sentences.ALIGN_NOT_ONE_VIEW),
    "another word": ({"align": "crop"}, sentences.ALIGN_WRONG),
    "three rows": (
        CALIBRATED | {"align": {"camera": intrinsics(RGB_CAMERA), "matrix": MATRIX[:3]}},
        sentences.ALIGN_WRONG,
    ),
    "millimetres in the last row": (
        CALIBRATED | {"align": {"camera": intrinsics(RGB_CAMERA), "matrix": (np.array(MATRIX) * 2).tolist()}},
        sentences.ALIGN_NO_ROTATION,
    ),
    "half of the cameras": (without("camera"), sentences.ALIGN_WITHOUT_CAMERA),
    "half of a camera": (
        CALIBRATED | {"align": {"camera": {"fx": 1}, "matrix": MATRIX}},
        sentences.CAMERA_INCOMPLETE.format("{'fx': 1}"),
    ),
    "a shift in millimetres": (
        CALIBRATED
        | {
            "align": {
                "camera": intrinsics(RGB_CAMERA),
                "matrix": [[1, 0, 0, 25], [0, 1, 0, 2], [0, 0, 1, 1], [0, 0, 0, 1]],
            }
        },
        sentences.ALIGN_OUTSIDE,
    ),
}


@pytest.mark.parametrize(("settings", "expected"), BAD.values(), ids=BAD)
def test_bad_settings(tmp_path: Path, refused, settings: dict, expected: str) -> None:
    write(tmp_path, "0", PHOTOGRAPH, plane_seen_by(DEPTH_CAMERA, DEPTH_SIZE, NORMAL, DISTANCE), settings)
    refused(lambda: Folder(tmp_path, needs_depth=True), str(tmp_path), expected)
