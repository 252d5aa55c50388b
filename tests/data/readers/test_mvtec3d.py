"""The MVTec 3D-AD reader on simulated scans in the official layout, and bad input."""

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from iumad_jax.data import depth
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.errors import UserError
from tests import sentences


def save(file: Path, cloud: np.ndarray, **settings) -> None:
    """Write a cloud as a TIFF with one page, channels last."""
    tifffile.imwrite(file, cloud, **({"photometric": "rgb", "planarconfig": "contig"} | settings))


def write(folder: Path, scene, name: str = "000", gt: bool = True) -> None:
    """Write one sample: rgb, xyz, and gt with the ball as defect unless the folder is good."""
    for kind in ("rgb", "xyz", *(("gt",) if gt else ())):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.rgb).save(folder / f"rgb/{name}.png")
    save(folder / f"xyz/{name}.tiff", scene.cloud)
    if gt:
        Image.fromarray(scene.mask * (folder.name != "good")).save(folder / f"gt/{name}.png")


@pytest.fixture
def root(tmp_path: Path, scan) -> Path:
    """Create the object bagel as in the official archive, with gt for all test images and no others."""
    root = tmp_path / "dataset"
    (root / "bagel").mkdir(parents=True)
    (root / "bagel/license.txt").touch()
    for name in ("000", "001"):
        write(root / "bagel/train/good", scan(seed=int(name)), name, gt=False)
    write(root / "bagel/validation/good", scan(seed=2), gt=False)
    write(root / "bagel/test/good", scan(seed=3))
    write(root / "bagel/test/hole", scan(seed=4))
    write(root / "bagel/test/combined", scan(seed=5))
    return root


def test_samples_are_read_as_written(root: Path, scan, tree) -> None:
    before = tree(root)
    reader = MVTec3D(root, "bagel", needs_depth=True)
    assert reader.ids("bagel", "train") == ("000", "001", "validation/000")
    assert reader.ids("bagel", "test") == ("combined/000", "good/000", "hole/000")
    assert reader.ids("bagel", "calibration") == reader.ids("bagel", "unlabelled") == ()
    for split, id_, seed, defect in (
        ("train", "001", 1, "good"),
        ("train", "validation/000", 2, "good"),
        ("test", "good/000", 3, "good"),
        ("test", "hole/000", 4, "hole"),
    ):
        scene, sample = scan(seed=seed), reader.read("bagel", split, id_)
        assert (sample.object, sample.id, sample.defect, sample.anomalous) == ("bagel", id_, defect, defect != "good")
        np.testing.assert_array_equal(sample.rgb, scene.rgb)
        np.testing.assert_array_equal(sample.mask, (scene.mask > 0) & (defect != "good"))
        z = scene.cloud[..., 2]
        np.testing.assert_array_equal(sample.depth, np.where(z == 0, np.nan, z))
        assert sample.depth.dtype == np.float32
        camera, true = sample.camera, scene.camera
        np.testing.assert_allclose(
            [camera.fx, camera.fy, camera.cx, camera.cy], [true.fx, true.fy, true.cx, true.cy], atol=1e-3
        )
        assert not camera.orthographic
    assert {file.name for file in reader.files("bagel", "test", "hole/000")} == {"000.png", "000.tiff"}
    assert len(reader.files("bagel", "test", "hole/000")) == 3
    assert tree(root) == before


def test_validation_images_used_for_calibration(root: Path) -> None:
    reader = MVTec3D(root, "bagel", validation="calibration")
    assert reader.ids("bagel", "train") == ("000", "001")
    assert reader.ids("bagel", "calibration") == ("000",)
    assert reader.files("bagel", "calibration", "000")[0] == root / "bagel/validation/good/rgb/000.png"
    with pytest.raises(
        UserError, match=sentences.UNKNOWN_VALIDATION.format(found="test", known="train or calibration")
    ):
        MVTec3D(root, "bagel", validation="test")


def test_without_xyz_there_is_no_depth(root: Path, read_all) -> None:
    for folder in root.rglob("xyz"):
        shutil.rmtree(folder)
    samples = read_all(MVTec3D(root, "bagel"))
    assert len(samples) == 6
    assert all(sample.depth is None and sample.camera is None for sample in samples)
    with pytest.raises(UserError, match=sentences.DEPTH_NOT_THERE.format(folder="good", kind="xyz")):
        MVTec3D(root, "bagel", needs_depth=True)


@pytest.mark.parametrize(("height", "width", "pixel"), [(400, 400, 0.9e-3), (900, 800, 0.45e-3)])
def test_geometry_at_the_official_sizes(root: Path, scan, height: int, width: int, pixel: float) -> None:
    """Plane, heights and normals are correct with noise of 0.25 mm and a tenth of the pixels missing."""
    scene = scan(height, width, tilt=30, noise=2.5e-4, holes=0.1, seed=6)
    assert scene.distance / scene.camera.fx == pytest.approx(pixel, rel=0.1)
    write(root / "bagel/test/cut", scene)
    reader = MVTec3D(root, "bagel")
    sample = reader.read("bagel", "test", "cut/000")
    surface = depth.measure(sample.depth, sample.camera, reader.normals_window)
    angle = np.degrees(np.arccos(np.clip(surface.plane.normal @ scene.normal, -1, 1)))
    assert angle < 0.1
    error = np.abs(surface.height - scene.height)[surface.valid]
    assert np.sqrt((error**2).mean()) < 3e-4
    assert np.median(np.abs(surface.height - scene.height)[~surface.valid]) < 5e-4
    flat = scene.height < 1e-9
    angles = np.degrees(np.arccos(np.clip(surface.normals[..., 2], -1, 1)))[flat]
    assert np.quantile(angles, 0.95) < 3
    region = depth.object_mask(surface.height, reader.object_height)
    assert (region == (scene.height > reader.object_height))[surface.valid].mean() > 0.999


def test_objects_have_any_names(root: Path) -> None:
    for name in ("tire", "Zahnrad groß"):
        shutil.copytree(root / "bagel", root / name)
    assert MVTec3D(root).objects == ("Zahnrad groß", "bagel", "tire")
    assert MVTec3D(root, "tire,bagel").objects == ("tire", "bagel")


def test_a_gt_may_be_missing_from_good_images_and_have_several_values(root: Path) -> None:
    shutil.rmtree(root / "bagel/test/good/gt")
    mask = np.asarray(Image.open(root / "bagel/test/hole/gt/000.png"))
    marked = mask // 2 + mask // 4 * (np.arange(mask.shape[1]) % 2).astype(np.uint8)
    Image.fromarray(marked).save(root / "bagel/test/hole/gt/000.png")
    reader = MVTec3D(root, "bagel")
    assert not reader.read("bagel", "test", "good/000").mask.any()
    np.testing.assert_array_equal(reader.read("bagel", "test", "hole/000").mask, mask > 0)


def test_a_cloud_of_another_convention_keeps_its_geometry(root: Path, scan) -> None:
    """The camera estimated from a cloud with x to the left and y upwards is unchanged."""
    scene = scan(seed=4)
    save(root / "bagel/test/hole/xyz/000.tiff", scene.cloud * np.float32([-1, -1, 1]))
    camera = MVTec3D(root, "bagel").read("bagel", "test", "hole/000").camera
    assert camera.fx == pytest.approx(scene.camera.fx)
    assert camera.cy == pytest.approx(scene.camera.cy, abs=1e-3)


def test_the_camera_fit_tolerates_outliers_and_lens_distortion(root: Path, scan) -> None:
    """4 % of the points are random, and rays bend outwards by up to half a percent of the image's width."""
    scene = scan(96, 128, seed=4)
    columns, rows = np.meshgrid(np.arange(128) - scene.camera.cx, np.arange(96) - scene.camera.cy)
    bend = 1 + 0.01 * (columns**2 + rows**2) / 64**2
    cloud = scene.cloud * np.stack([bend, bend, np.ones_like(bend)], axis=-1)
    rng = np.random.default_rng(0)
    wild = rng.random(bend.shape) < 0.04
    cloud[wild, :2] = rng.uniform(-1, 1, (wild.sum(), 2))
    folder = root / "bagel/test/cut"
    write(folder, scene._replace(cloud=cloud.astype(np.float32)))
    camera = MVTec3D(root, "bagel").read("bagel", "test", "cut/000").camera
    assert camera.fx == pytest.approx(scene.camera.fx, rel=0.015)
    assert camera.cx == pytest.approx(scene.camera.cx, abs=1.3)


# Bad input


def change(to: Callable, **settings) -> Callable:
    """Return a function that replaces a cloud file by a changed cloud."""

    def spoil(file: Path) -> None:
        save(file, to(tifffile.imread(file)), **settings)

    return spoil


def header_of(width: int, height: int) -> bytes:
    """Encode an uncompressed TIFF of three float channels, of any size, without its pixels."""
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 32), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, 4), (339, 3, 1, 3),
    ]  # fmt: skip
    return (
        struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    )


GOOD, HOLE = "bagel/train/good", "bagel/test/hole"
BAD = {
    "no object": ("bagel", shutil.rmtree, sentences.ROOT_WITHOUT_OBJECTS),
    "no train": ("bagel/train", shutil.rmtree, sentences.SPLIT_MISSING.format(path="bagel/train", object="bagel")),
    "no validation": (
        "bagel/validation",
        shutil.rmtree,
        sentences.SPLIT_MISSING.format(path="bagel/validation", object="bagel"),
    ),
    "no test": ("bagel/test", shutil.rmtree, sentences.SPLIT_MISSING.format(path="bagel/test", object="bagel")),
    "no good images": (GOOD, shutil.rmtree, sentences.GOOD_IMAGES_MISSING.format("train/good")),
    "no images": (
        f"{GOOD}/rgb",
        "empty",
        sentences.FOLDER_WITHOUT_IMAGES.format(folder="train/good/rgb", example="000.png"),
    ),
    "no rgb": (
        f"{GOOD}/rgb",
        shutil.rmtree,
        sentences.FOLDER_WITHOUT_IMAGES.format(folder="train/good/rgb", example="000.png"),
    ),
    "an empty test set": ("bagel/test", "empty", sentences.TEST_WITHOUT_FOLDERS.format("test")),
    "a defect in train": (GOOD, ("rename_to", "crack"), sentences.DEFECT_OUTSIDE_TEST.format("train/crack")),
    "a missing cloud": (f"{GOOD}/xyz/001.tiff", Path.unlink, sentences.FILE_OF_IMAGE_MISSING.format("001.tiff")),
    "a cloud without an image": (
        f"{GOOD}/xyz/001.tiff",
        ("copy_to", "002.tiff"),
        sentences.FILE_WITHOUT_IMAGE.format("002.tiff"),
    ),
    "a defect without gt": (f"{HOLE}/gt", shutil.rmtree, sentences.FILE_OF_IMAGE_MISSING.format("hole/gt/000.png")),
    "a gt without an image": (
        f"{HOLE}/gt/000.png",
        ("copy_to", "007.png"),
        sentences.FILE_WITHOUT_IMAGE.format("007.png"),
    ),
    "a gt without a defect": (
        "bagel/test/good/gt/000.png",
        lambda file: shutil.copy(file.parents[2] / "hole/gt/000.png", file) and None,
        sentences.MASK_MARKS_GOOD_IMAGE.format("000.png"),
    ),
    "a gt that marks nothing": (
        f"{HOLE}/gt/000.png",
        lambda file: shutil.copy(file.parents[2] / "good/gt/000.png", file) and None,
        sentences.MASK_MARKS_NOTHING.format(file="000.png", defect="hole"),
    ),
    "an unknown kind": (
        f"{GOOD}/xyz",
        ("rename_to", "heights"),
        sentences.UNKNOWN_NAME.format(path="good/heights", known="rgb, xyz, gt"),
    ),
    "an unknown ending": (
        f"{GOOD}/xyz/000.tiff",
        ("copy_to", "000.mat"),
        sentences.UNKNOWN_SUFFIX.format(path="000.mat", known=".tiff"),
    ),
    "an empty file": (f"{GOOD}/xyz/000.tiff", ("write", b""), sentences.FILE_EMPTY.format("000.tiff")),
    "a folder for a file": (f"{GOOD}/xyz/000.tiff", "fold", sentences.NOT_A_FILE.format("000.tiff")),
    "a link to itself": (
        f"{GOOD}/xyz/000.tiff",
        "loop",
        sentences.FILE_UNREADABLE_WITH_REASON.format(file="", reason="Too many levels of symbolic links"),
    ),
    "a folder that is a link to itself": (
        f"{GOOD}/xyz",
        "loop",
        sentences.FILE_UNREADABLE_WITH_REASON.format(file="", reason="Too many levels of symbolic links"),
    ),
    "a file elsewhere": (f"{GOOD}/xyz/000.tiff", "move_out", sentences.LEADS_OUT_OF_ROOT.format("000.tiff")),
    "a folder elsewhere": (f"{GOOD}/xyz", "move_out", sentences.LEADS_OUT_OF_ROOT.format("xyz")),
    "an object elsewhere": ("bagel", "move_out", sentences.LEADS_OUT_OF_ROOT.format("bagel")),
    "a truncated cloud": (f"{GOOD}/xyz/000.tiff", "truncate", sentences.FILE_UNREADABLE.format("000.tiff")),
    "a truncated image": (f"{GOOD}/rgb/000.png", "truncate", sentences.FILE_DAMAGED.format("000.png")),
    "no TIFF": (f"{GOOD}/xyz/000.tiff", ("write", "x, y, z"), sentences.FILE_UNREADABLE.format("000.tiff")),
    "a huge cloud": (
        f"{GOOD}/xyz/000.tiff",
        ("write", header_of(10**9, 10**9)),
        sentences.TOO_MANY_PIXELS.format(size="1000000000x1000000000", most="8192x8192"),
    ),
    "a cloud of another size": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud[:, ::2]),
        sentences.SIZES_DIFFER.format(file="000.tiff", size="32x48"),
    ),
    "complex numbers": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud.astype(np.complex64)),
        sentences.NOT_NUMBERS.format("complex64"),
    ),
    "one channel too many": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: np.concatenate([cloud, cloud[..., :1]], -1), extrasamples=["unspecified"]),
        sentences.ARRAY_OF_WRONG_SHAPE.format("(48, 64, 4)"),
    ),
    "channels first": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: np.moveaxis(cloud, -1, 0), planarconfig="separate"),
        sentences.ARRAY_OF_WRONG_SHAPE.format("(3, 48, 64)"),
    ),
    "depth alone": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud[..., 2], photometric="minisblack", planarconfig=None),
        sentences.TIFF_WITHOUT_COORDINATES,
    ),
    "several pages": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: np.moveaxis(cloud, -1, 0), photometric="minisblack", planarconfig=None),
        sentences.TIFF_WITH_SEVERAL_PAGES,
    ),
    "millimetres": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud * 1000),
        sentences.UNIT_WRONG.format(true="millimetres", called="metres"),
    ),
    "kilometres": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud / 1000),
        "as if the unit were 1000 times too small",
    ),
    "nothing valid": (f"{GOOD}/xyz/000.tiff", change(to=np.zeros_like), sentences.DEPTH_ALL_MISSING.format("000.tiff")),
    "all NaN": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud * np.nan),
        sentences.DEPTH_ALL_MISSING.format("000.tiff"),
    ),
    "all infinite": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: np.full_like(cloud, np.inf)),
        sentences.DEPTH_ALL_MISSING.format("000.tiff"),
    ),
    "behind the sensor": (f"{GOOD}/xyz/000.tiff", change(to=lambda cloud: -cloud), sentences.DEPTH_NEGATIVE),
    "a turned cloud": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud[..., [1, 0, 2]]),
        sentences.NO_CAMERA_FITS,
    ),
    "a cloud in no order": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: np.random.default_rng(0).permuted(cloud, axis=1)),
        sentences.NO_CAMERA_FITS,
    ),
    "a single column": (
        f"{GOOD}/xyz/000.tiff",
        change(to=lambda cloud: cloud * (np.arange(64) == 30)[:, None].astype(np.float32)),
        sentences.TOO_FEW_POINTS_FOR_CAMERA,
    ),
}


@pytest.mark.parametrize(("path", "damage", "expected"), BAD.values(), ids=BAD)
def test_bad_input(root: Path, refused, spoil, path: str, damage, expected: str) -> None:
    (root / "README").touch()
    spoil.apply(damage, root / path)
    refused(lambda: MVTec3D(root, "bagel", needs_depth=True), str(root), expected)


def test_nan_and_infinite_points_are_missing(root: Path) -> None:
    file = root / HOLE / "xyz/000.tiff"
    cloud = tifffile.imread(file)
    cloud[5, 6], cloud[7, 8], cloud[9, 10, 2] = np.nan, np.inf, -np.inf
    save(file, cloud)
    measured = MVTec3D(root, "bagel").read("bagel", "test", "hole/000").depth
    assert np.isnan(measured[[5, 7, 9], [6, 8, 10]]).all()
    assert np.isfinite(measured).mean() > 0.9


def test_compressed_clouds(root: Path, scan) -> None:
    file = root / HOLE / "xyz/000.tiff"
    plain = MVTec3D(root, "bagel").read("bagel", "test", "hole/000").depth
    save(file, tifffile.imread(file), compression="zlib")
    np.testing.assert_array_equal(MVTec3D(root, "bagel").read("bagel", "test", "hole/000").depth, plain)
    content = bytearray(file.read_bytes())
    tag = content.index(struct.pack("<HHI", 259, 3, 1))  # the compression tag, set to LZW
    content[tag + 8 : tag + 10] = struct.pack("<H", 5)
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=re.escape(sentences.TIFF_COMPRESSION_UNKNOWN.format(file="000.tiff", name="LZW"))
    ):
        MVTec3D(root, "bagel").read("bagel", "test", "hole/000")


def test_a_compressed_bomb_is_refused_before_it_grows(root: Path) -> None:
    file = root / HOLE / "xyz/000.tiff"
    save(file, np.zeros((6400, 64, 3), np.float32), compression="zlib", rowsperstrip=6400)
    content = bytearray(file.read_bytes())
    for tag in (257, 278):  # rows of the image and of its strip, set to a hundredth
        start = content.index(struct.pack("<H", tag))
        content[start + 2 : start + 12] = struct.pack("<HII", 4, 1, 64)
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentences.TIFF_INFLATES.format("000.tiff"))):
        MVTec3D(root, "bagel").read("bagel", "test", "hole/000")
