"""Height maps of laser profilers: geometry against analytic scenes, depth without photographs, settings, real scans."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from scipy import ndimage

from iumad_jax import errors
from iumad_jax.data import depth
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers import unlabelled
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.sample import Camera, DepthFormat
from iumad_jax.errors import UserError
from iumad_jax.inference import unknown_images
from iumad_jax.inference.detector import Detector
from tests import sentences

PITCH = np.array([0.1, 0.25])  # millimetres per pixel
SLOPES, RADIUS = np.array([0.15, -0.3]), 4.0  # of the background plane; of a ball half sunk into it, millimetres
PROFILER = Path(__file__).parents[4] / "shared/data/sensors/profiler_sick"


class Scene:
    """A ball on a tilted plane, seen from above: heights in millimetres and the exact geometry."""

    def __init__(self) -> None:
        y, x = np.meshgrid(*(np.arange(n) * p for n, p in ((60, PITCH[1]), (140, PITCH[0]))), indexing="ij")
        plane = SLOPES[0] * x + SLOPES[1] * y - 1.5
        centre = np.array([x.mean(), y.mean(), SLOPES @ [x.mean(), y.mean()] - 1.5])
        squared = RADIUS**2 - (x - centre[0]) ** 2 - (y - centre[1]) ** 2
        self.ball = squared > 0
        ball = np.where(self.ball, centre[2] + np.sqrt(squared.clip(0)), -np.inf)
        self.ball &= ball > plane
        self.heights = np.where(self.ball, ball, plane)
        # In camera coordinates, z points down.
        self.up = np.array([-SLOPES[0], -SLOPES[1], -1]) / np.sqrt(1 + SLOPES @ SLOPES)
        points = np.stack([x, y, -self.heights], axis=-1)
        self.above = (points - [0, 0, 1.5]) @ self.up
        outwards = (points - [*centre[:2], -centre[2]]) / RADIUS
        normals = np.where(self.ball[..., None], outwards, self.up)
        right = np.array([1, 0, 0]) - self.up[0] * self.up
        right /= np.linalg.norm(right)
        self.normals = normals @ np.stack([right, np.cross(self.up, right), self.up]).T


def write(root: Path, heights: np.ndarray, settings: str, name: str = "000.tiff") -> Path:
    folder = root / "part/train/good/depth"
    folder.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(folder / name, heights)
    (root / "dataset.yaml").write_text(settings)
    return folder / name


@pytest.mark.parametrize("counts", [False, True])
def test_heights_and_normals_of_a_ball_on_a_tilted_plane(tmp_path: Path, counts: bool) -> None:
    """Pixels are not square, and heights are negative in part, or counts from 0, where nothing was measured."""
    scene = Scene()
    if counts:
        levels = np.round((scene.heights + 20) / 0.0005).astype(np.uint16)
        levels[5:9, 5:9] = 0
        write(tmp_path, levels, "kind: height\npitch: [0.1, 0.25]\nunit: 0.5e-6\n")
    else:
        assert scene.heights.min() < 0
        write(tmp_path, scene.heights.astype(np.float32), "kind: height\npitch: [0.1, 0.25]\nunit: mm\n")
    reader = Folder(tmp_path, needs_depth=True)
    assert reader.object_height == pytest.approx(60 * 0.25e-3 / 100)
    sample = reader.read("part", "train", "000")
    assert np.isnan(sample.depth).sum() == 16 * counts
    surface = depth.measure(sample.depth, sample.camera)
    np.testing.assert_allclose(surface.plane.normal, scene.up, atol=2e-4)
    np.testing.assert_allclose(1000 * surface.height[surface.valid], scene.above[surface.valid], atol=2e-3)
    window = np.ones((3, 3))
    edge = ndimage.binary_dilation(scene.ball, window) & ndimage.binary_dilation(~scene.ball, window)
    compared = (scene.normals[..., 2] > 0.75) & ~edge  # windows are flat there, but for the ball's slight curvature
    compared[[0, -1]] = compared[:, [0, -1]] = False
    angles = np.degrees(np.arccos(np.clip((surface.normals * scene.normals).sum(-1), -1, 1)))
    assert (compared & scene.ball).sum() > 500
    assert np.quantile(angles[compared], 0.95) < 0.5
    assert angles[compared & surface.valid].max() < 2
    assert sample.rgb[scene.ball].mean() > 1.5 * sample.rgb[~scene.ball].mean()  # high is bright


def test_a_scan_of_a_real_profiler_stands_upright(tmp_path: Path) -> None:
    """A box lies on a table, with the sensor's intensity as photograph; dark pixels have no height."""
    if not PROFILER.is_dir():
        pytest.skip("needs the profiler's files in ../shared/data/sensors")
    for kind, name in ("depth", "height"), ("rgb", "intensity"):
        (tmp_path / "box/train/good" / kind).mkdir(parents=True)
        image = PROFILER / f"image_34_{'01'[name == 'intensity']}_{name}.png"
        (tmp_path / "box/train/good" / kind / "0.png").write_bytes(image.read_bytes())
    (tmp_path / "dataset.yaml").write_text("kind: height\npitch: [0.1012, 0.1]\nunit: 4.5455e-6\n")
    reader = Folder(tmp_path, needs_depth=True, needs_rgb=True)
    sample = reader.read("box", "train", "0")
    assert np.isnan(sample.depth).mean() == pytest.approx(0.173, abs=0.001)
    surface = depth.measure(sample.depth, sample.camera, reader.normals_window)
    table, lid = surface.height[-150:, 50:-50], surface.height[200:600, 150:300]
    assert np.abs(np.median(table)) < 1e-4
    assert np.median(lid) == pytest.approx(12e-3, abs=1e-3)
    arrays = Processing(("rgb", "depth"), 64, "normals", reader.height_range, reader.object_height)(sample)
    assert np.isfinite(arrays["images_depth"]).all()


def test_heights_that_are_called_depth_are_asked_about(tmp_path: Path, capsys, monkeypatch) -> None:
    heights = np.where(Scene().ball, 30.0, 10.0).astype(np.float32) + np.linspace(0, 0.1, 140, dtype=np.float32)
    low = np.where(Scene().ball, 20, np.arange(140) % 2).astype(np.uint16)  # on a table at 0 and 1
    write(tmp_path, low, "unit: mm\n")
    with pytest.raises(UserError, match=r"kind: height if larger is higher"):
        Folder(tmp_path)
    capsys.readouterr()
    for settings, asked in (("", True), ("", False), ("kind: depth\n", False)):
        if asked or settings:
            monkeypatch.setattr(errors, "_told", set())
        write(tmp_path, heights, f"unit: mm\n{settings}")
        Folder(tmp_path)
        assert (sentences.SEEMS_HEIGHTS in capsys.readouterr().err) == asked
    monkeypatch.setattr(errors, "_told", set())
    write(tmp_path, 500 - heights, "unit: mm\n")
    Folder(tmp_path)
    assert capsys.readouterr().err == ""


def test_missing_heights(tmp_path: Path) -> None:
    """Zero is a height unless counts begin with it; what lies far from all heights is none."""
    heights = Scene().heights.astype(np.float32)
    heights[:3], heights[3:5], heights[5, 0] = -9999, np.nan, 0
    write(tmp_path, heights, "kind: height\npitch: [0.1, 0.25]\nunit: mm\n")
    measured = Folder(tmp_path).read("part", "train", "000").depth
    expected = np.isnan(heights)
    expected[:3] = True
    np.testing.assert_array_equal(np.isnan(measured), expected)
    levels = (np.nan_to_num(heights.clip(-20)) * 1000).astype(np.int16)
    levels[:5] = -32768
    write(tmp_path, levels, "kind: height\npitch: [0.1, 0.25]\nunit: um\n")
    np.testing.assert_array_equal(np.isnan(Folder(tmp_path).read("part", "train", "000").depth), expected)


def detector(processing: Processing, format_: DepthFormat, camera: Camera, width: int) -> Detector:
    """Return a detector that only prepares images."""
    return Detector(Path(), {}, None, (), (), 0, processing, format_, camera, width, None, None)


def test_depth_needs_no_photograph_in_use(tmp_path: Path) -> None:
    """What is recorded of a run prepares a file, or an array of heights in metres, as the run prepared it."""
    scene = Scene()
    file = write(tmp_path, scene.heights.astype(np.float32), "kind: height\npitch: [0.1, 0.25]\nunit: mm\n")
    reader = Folder(tmp_path, needs_depth=True)
    processing = Processing(("depth",), 32, "height+normals", reader.height_range, reader.object_height)
    recorded = json.loads(json.dumps(Store(tmp_path / "prepared", reader, processing, lambda x: x, {}).describe()))
    format_, camera = DepthFormat.recorded(recorded["depth"]), Camera(**recorded["camera"])
    used = detector(Processing.recorded(recorded), format_, camera, recorded["camera_width"])
    expected = processing(reader.read("part", "train", "000"))["images_depth"].astype(np.float32)
    prepared = used.prepare(depth=scene.heights / 1000)
    assert list(prepared) == ["depth"]
    np.testing.assert_allclose(prepared["depth"][0], expected, atol=0.2)
    (image,) = unlabelled.depth_files(file.parent, format_, None, used.default_camera)
    rgb, heights, camera = image.read()
    assert (image.name, image.files(), rgb.shape) == ("000", (None, file), (*heights.shape, 3))
    np.testing.assert_array_equal(used.prepare(rgb, heights, camera)["depth"][0], expected)
    assert used.default_camera(7) == camera  # pixels keep their size
    with pytest.raises(UserError, match=sentences.DEPTH_ARGUMENT_MISSING):
        used.prepare()
    # Unknown images become a dataset of the same kind.
    again = tmp_path / "again"
    unknown_images._copy_image(used, image, again / "part/train/good", "000")
    (again / "dataset.yaml").write_text(yaml.safe_dump(unknown_images._settings(used, image)))
    copy = Folder(again, needs_depth=True).read("part", "train", "000")
    np.testing.assert_array_equal(copy.depth, heights)
    assert asdict(copy.camera) == pytest.approx(asdict(camera))


def test_depth_alone_is_refused_where_photographs_are_needed(tmp_path: Path) -> None:
    write(tmp_path, Scene().heights.astype(np.float32), "kind: height\npitch: [0.1, 0.25]\nunit: mm\n")
    with pytest.raises(UserError, match=sentences.FOLDER_OF_DEPTH_ALONE.format(folder="good/rgb")):
        Folder(tmp_path, needs_depth=True, needs_rgb=True)


BAD = {
    "another kind": ("kind: range", sentences.KIND_WRONG.format("'range'")),
    "no pitch": ("kind: height\nunit: mm", sentences.HEIGHT_INCOMPLETE),
    "no unit": ("kind: height\npitch: [1, 1]", sentences.HEIGHT_INCOMPLETE),
    "a camera": (
        "kind: height\nunit: mm\npitch: [1, 1]\ncamera: {fx: 1, fy: 1, cx: 1, cy: 1}",
        sentences.HEIGHT_INCOMPLETE,
    ),
    "a negative pitch": (
        "kind: height\nunit: mm\npitch: [0.1, -0.1]",
        sentences.SETTING_WRONG.format(found=-0.1, key="pitch"),
    ),
    "a pitch alone": ("unit: mm\npitch: [1, 1]", sentences.PITCH_ALONE),
    "millimetres called metres": ("kind: height\nunit: m\npitch: [0.1, 0.25]", sentences.HEIGHTS_TOO_STEEP),
    "a pitch in metres": ("kind: height\nunit: mm\npitch: [0.0001, 0.00025]", sentences.HEIGHTS_TOO_STEEP),
}


@pytest.mark.parametrize(("settings", "expected"), BAD.values(), ids=BAD)
def test_bad_settings(tmp_path: Path, refused, settings: str, expected: str) -> None:
    write(tmp_path, Scene().heights.astype(np.float32), settings)
    refused(lambda: Folder(tmp_path, needs_depth=True), str(tmp_path), expected)
