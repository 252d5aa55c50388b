"""The folder reader: the layout of iumad_jax/data/README.md, photographs, settings, cameras and bad input."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax import protocol
from iumad_jax.config import paper
from iumad_jax.data import readers
from iumad_jax.data.formats.files import read_yaml
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.readers import folder
from iumad_jax.data.readers.folder import Folder
from iumad_jax.errors import UserError
from tests import sentences


def levels(scene) -> np.ndarray:
    """Return depth in tenths of a millimetre."""
    return np.round(scene.cloud[..., 2] * 10_000).astype(np.uint16)


def write(folder: Path, scene, name: str = "000", kinds: tuple[str, ...] = ("rgb", "depth")) -> None:
    """Write one sample as PNG; depth in tenths of a millimetre."""
    images = {"rgb": scene.rgb, "depth": levels(scene), "mask": scene.mask}
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[kind]).save(folder / kind / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path, scan) -> Path:
    """Create a dataset of two objects, one without test images, with spaces and non-ASCII letters in names."""
    root = tmp_path / "dataset"
    for name in ("part 2", "10"):
        write(root / "Zahnrad groß/train/good", scan(seed=len(name)), name)
    write(root / "Zahnrad groß/val/good", scan(seed=3))
    write(root / "Zahnrad groß/test/good", scan(seed=4))
    write(root / "Zahnrad groß/test/broken tooth", scan(seed=5), kinds=("rgb", "depth", "mask"))
    write(root / "bolt/train/good", scan(seed=6))
    write(root / "bolt/unlabelled", scan(seed=7), "ねじ")
    (root / "dataset.yaml").write_text("unit: 0.0001\ncamera: {fx: 76.8, fy: 76.8, cx: 33.28, cy: 22.56}\n")
    return root


def test_samples_are_read_as_written(root: Path, scan, tree) -> None:
    before = tree(root)
    reader = Folder(root, needs_depth=True)
    gear, bolt = reader.objects
    assert (gear, bolt) == ("Zahnrad groß", "bolt")
    assert reader.ids(gear, "train") == ("10", "part 2")
    assert reader.ids(gear, "calibration") == ("000",)
    assert reader.ids(gear, "test") == ("broken tooth/000", "good/000")
    assert reader.ids(gear, "unlabelled") == reader.ids(bolt, "test") == reader.ids(bolt, "calibration") == ()
    assert reader.ids(bolt, "unlabelled") == ("ねじ",)
    scene, sample = scan(seed=5), reader.read(gear, "test", "broken tooth/000")
    assert (sample.object, sample.id, sample.defect) == (gear, "broken tooth/000", "broken tooth")
    assert sample.anomalous
    np.testing.assert_array_equal(sample.rgb, scene.rgb)
    np.testing.assert_array_equal(sample.mask, scene.mask > 0)
    z = scene.cloud[..., 2]
    np.testing.assert_allclose(sample.depth, np.where(z == 0, np.nan, z), atol=5.1e-5)
    assert (sample.camera.fx, sample.camera.fy, sample.camera.cx, sample.camera.cy) == (76.8, 76.8, 33.28, 22.56)
    good = reader.read(gear, "train", "part 2")
    assert (good.defect, good.anomalous, good.mask.any()) == ("good", False, False)
    unknown = reader.read(bolt, "unlabelled", "ねじ")
    assert (unknown.defect, unknown.anomalous, unknown.mask) == ("unknown", False, None)
    assert root / "dataset.yaml" in reader.files(gear, "train", "10")
    assert tree(root) == before


def test_the_config_selects_objects(root: Path) -> None:
    config = paper("1-1")
    config.dataset.name, config.dataset.root = "folder", str(root)
    assert readers.objects(config) == readers.open_reader(config).objects == ("Zahnrad groß", "bolt")
    assert len(protocol.steps(config.protocol, readers.objects(config))) == 2
    config.dataset.objects = "bolt"
    assert readers.objects(config) == readers.open_reader(config).objects == ("bolt",)
    config.dataset.objects = "nut"
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_OBJECT.format(name="nut", known="Zahnrad groß, bolt."))
    ):
        readers.objects(config)
    config.dataset.objects, config.input.depth_encoding = "all", "normals_official"
    with pytest.raises(UserError, match=sentences.ENCODING_UNAVAILABLE.format(reader="folder", known="normals")):
        readers.open_reader(config)


def test_photographs_alone(tmp_path: Path, scan, read_all) -> None:
    """The smallest dataset: photographs in every format without depth, masks or settings."""
    folder = tmp_path / "bolt/train/good/rgb"
    folder.mkdir(parents=True)
    rgb = scan().rgb
    for ending in ("png", "jpg", "JPEG", "bmp", "tif", "tiff"):
        Image.fromarray(rgb).save(folder / f"{ending} image.{ending}")
    Image.fromarray(rgb).save(folder / "lzw.tiff", compression="tiff_lzw")
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    Image.fromarray(np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)).save(folder / "opaque.png")
    (folder / ".DS_Store").touch()
    write(tmp_path / "bolt/test/dent", scan(), kinds=("rgb",))
    samples = {sample.id: sample for sample in read_all(Folder(tmp_path))}
    assert len(samples) == 10
    assert all(sample.depth is None and sample.camera is None for sample in samples.values())
    for name, sample in samples.items():
        exact = np.stack([rgb[..., 0]] * 3, -1) if name == "grey" else rgb
        assert np.abs(sample.rgb.astype(int) - exact).mean() < (60 if "jp" in name.lower() else 0.001), name
    assert (samples["dent/000"].mask, samples["dent/000"].anomalous) == (None, True)
    arrays = Processing(("rgb",), 32, "normals", 0.1, 0.005)(samples["dent/000"])
    assert not arrays["masked"]
    with pytest.raises(UserError, match=sentences.DEPTH_NOT_THERE.format(folder="bolt/train/good", kind="depth")):
        Folder(tmp_path, needs_depth=True)


def test_settings_and_their_defaults(root: Path) -> None:
    reader = Folder(root)
    assert (reader.object_height, reader.height_range) == (0.005, 0.1)
    with (root / "dataset.yaml").open("a") as file:
        file.write("object_height: 0.002\nheight_range: 0.3\nnormals_window: 9\n")
    reader = Folder(root)
    assert (reader.object_height, reader.height_range, reader.normals_window) == (0.002, 0.3, 9)
    (root / "dataset.yaml").unlink()
    (root / "dataset.yml").write_text("unit: 0.0001")
    assert Folder(root).read("bolt", "train", "000").camera.fx == 64


def test_bits_of_16_bit_photographs(root: Path, scan) -> None:
    """They follow from the first object's training images, so that later objects do not change them, or are set."""
    grey = scan().rgb[..., 0].astype(np.uint16)
    for file in root.glob("*/*/good/rgb/*.png"):
        Image.fromarray(grey * 16).save(file)
    sample = Folder(root).read("Zahnrad groß", "test", "good/000")
    assert sample.bits == 12
    np.testing.assert_array_equal(sample.rgb[..., 0], np.rint(grey * 16.0 / 4095 * 255))
    Image.fromarray(grey * 256).save(root / "bolt/train/good/rgb/000.png")
    with pytest.raises(UserError, match=sentences.LEVEL_ABOVE_BITS.format(level=grey.max() * 256, bits=12)):
        Folder(root)
    with (root / "dataset.yaml").open("a") as file:
        file.write("bits: 16")
    assert Folder(root).read("bolt", "train", "000").bits == 16


@pytest.mark.parametrize(
    ("written", "unit"), [("mm", 1e-3), ("UM", 1e-6), ("1e-6", 1e-6), ("0.01", 0.01), ("cm", 0.01)]
)
def test_units_as_people_write_them(root: Path, written: str, unit: float) -> None:
    (root / "dataset.yaml").write_text(f"unit: {written}\nmissing: [-7, 1e3]")
    file = root / "dataset.yaml"
    assert folder._check_settings(file, read_yaml(file))["unit"] == unit


def test_named_values_are_missing(root: Path, scan) -> None:
    """Naming values ends the search for others, which is right about 9 m here."""
    tenths = levels(scan(seed=6))
    tenths[:4], tenths[4:8] = 4000, 65535
    tenths[8:9] = 60_000
    Image.fromarray(tenths).save(root / DEPTH)
    (root / "dataset.yaml").write_text("unit: 0.0001\nmissing: 4000\n")
    depth = Folder(root, "bolt").read("bolt", "train", "000").depth
    np.testing.assert_array_equal(np.isnan(depth), np.isin(tenths, [0, 4000, 65535]))
    (root / "dataset.yaml").write_text("unit: 0.0001\n")
    depth = Folder(root, "bolt").read("bolt", "train", "000").depth
    np.testing.assert_array_equal(np.isnan(depth), np.isin(tenths, [0, 60_000, 65535]))


def test_the_camera_of_a_cloud_overrides_the_settings(root: Path, scan) -> None:
    """Only depth images use the unit and camera of the settings, which are wrong here."""
    (root / "dataset.yaml").write_text("unit: m\ncamera: {fx: 9, fy: 9, cx: 1, cy: 1}")
    (root / DEPTH).unlink()
    np.save((root / DEPTH).with_suffix(".npy"), scan().cloud)
    assert Folder(root, "bolt").read("bolt", "train", "000").camera.fx == pytest.approx(scan().camera.fx)


@pytest.mark.parametrize(("noise", "expected"), [(1e-4, 3), (2e-2, 15)])
def test_the_window_of_normals_follows_from_the_noise(root: Path, scan, noise: float, expected: int) -> None:
    """The pixel distance is 5.9 mm."""
    for object_, name in (("bolt", "000"), ("Zahnrad groß", "10"), ("Zahnrad groß", "part 2")):
        write(root / object_ / "train/good", scan(noise=noise), name)
    assert Folder(root).normals_window == expected


# Bad input

GOOD, BROKEN = "bolt/train/good", "Zahnrad groß/test/broken tooth"
RGB, DEPTH, MASK = f"{GOOD}/rgb/000.png", f"{GOOD}/depth/000.png", f"{BROKEN}/mask/000.png"
GREY = np.zeros((48, 64), np.uint8)


def save(image: np.ndarray, **kwargs):
    return lambda file: Image.fromarray(image).save(file, **kwargs)


def jpeg_header(side: int) -> bytes:
    """Encode a JPEG of any size without its pixels."""
    frame = struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    scan = struct.pack(">HB", 12, 3) + bytes([1, 0, 2, 0, 3, 0, 0, 63, 0])
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda" + scan


def bmp_header(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


BAD = {
    "an empty root": (".", "empty", sentences.ROOT_EMPTY_PART),
    "no train": ("bolt/train", "rmtree", sentences.SPLIT_MISSING.format(path="bolt/train", object="bolt")),
    "no good images": (GOOD, ("rename_to", "fine"), sentences.DEFECT_OUTSIDE_TEST.format("train/fine")),
    "an empty train": ("bolt/train", "empty", sentences.GOOD_IMAGES_MISSING.format("train/good")),
    "an empty good": (GOOD, "empty", sentences.FOLDER_WITHOUT_IMAGES.format(folder="good/rgb", example="000.png")),
    "an empty rgb": (
        f"{GOOD}/rgb",
        "empty",
        sentences.FOLDER_WITHOUT_IMAGES.format(folder="good/rgb", example="000.png"),
    ),
    "an empty depth": (f"{GOOD}/depth", "empty", sentences.FILE_OF_IMAGE_MISSING.format("depth/000.png")),
    "an empty test": ("Zahnrad groß/test", "empty", sentences.TEST_WITHOUT_FOLDERS.format("test")),
    "an empty defect": (
        BROKEN,
        "empty",
        sentences.FOLDER_WITHOUT_IMAGES.format(folder="broken tooth/rgb", example="000.png"),
    ),
    "an unknown split": (
        "bolt/unlabelled",
        ("rename_to", "tests"),
        sentences.UNKNOWN_NAME.format(path="bolt/tests", known="train, val, test"),
    ),
    "a name with a command to the terminal": (
        RGB,
        ("rename_to", "\x1b[2J.png"),
        sentences.NAME_UNPRINTABLE.format(r"\x1b[2J.png"),
    ),
    "a name in no encoding": (
        RGB,
        ("rename_to", "\udcff.png"),
        sentences.NAME_UNPRINTABLE.format(r"\udcff.png"),
    ),
    "an unknown kind": (
        f"{BROKEN}/mask",
        ("rename_to", "marks"),
        sentences.UNKNOWN_NAME.format(path="marks", known="rgb, depth, mask"),
    ),
    "an unknown ending": (
        RGB,
        ("copy_to", "001.jp2"),
        sentences.UNKNOWN_SUFFIX.format(path="001.jp2", known=".png .jpg"),
    ),
    "one name twice": (
        RGB,
        ("copy_to", "000.jpg"),
        sentences.NAMES_DIFFER_IN_SUFFIX.format(file="000.png", other="000.jpg"),
    ),
    "depth without an image": (DEPTH, ("copy_to", "001.png"), sentences.FILE_WITHOUT_IMAGE.format("001.png")),
    "some masks missing": (
        f"{BROKEN}/rgb/000.png",
        lambda file: add_second(file),
        sentences.FILE_OF_IMAGE_MISSING.format("mask/001.png"),
    ),
    "a mask that marks nothing": (
        MASK,
        save(GREY),
        sentences.MASK_MARKS_NOTHING.format(file="", defect="broken tooth"),
    ),
    "a mask of another size": (MASK, save(GREY[:, :9]), sentences.SIZES_DIFFER.format(file="000.png", size="9x48")),
    "an empty file": (DEPTH, ("write", b""), sentences.FILE_EMPTY.format("depth/000.png")),
    "a folder for a file": (DEPTH, "fold", sentences.NOT_A_FILE.format("depth/000.png")),
    "a link to itself": (
        RGB,
        "loop",
        sentences.FILE_UNREADABLE_WITH_REASON.format(file="", reason="Too many levels of symbolic links"),
    ),
    "an object elsewhere": ("bolt", "move_out", sentences.LEADS_OUT_OF_ROOT.format("bolt")),
    "settings elsewhere": ("dataset.yaml", "move_out", sentences.LEADS_OUT_OF_ROOT.format("dataset.yaml")),
    "16 bits among 8": (
        "Zahnrad groß/train/good/rgb/10.png",
        save(GREY.astype(np.uint16)),
        sentences.BITS_UNKNOWN.format("10.png"),
    ),
    "RGB that is transparent": (RGB, save(np.full((48, 64, 4), 254, np.uint8)), sentences.IMAGE_TRANSPARENT),
    "a truncated PNG": (RGB, "truncate", sentences.FILE_DAMAGED.format("000.png")),
    "a huge JPEG": (
        RGB,
        ("replace", "000.jpg", jpeg_header(65_000)),
        sentences.TOO_MANY_PIXELS.format(size="65000x65000", most="8192x8192"),
    ),
    "a huge BMP": (
        RGB,
        ("replace", "000.bmp", bmp_header(2**30)),
        sentences.TOO_MANY_PIXELS.format(size="1073741824x1073741824", most="8192x8192"),
    ),
    "8-bit depth": (
        DEPTH,
        save(GREY),
        sentences.WRONG_PIXELS.format(file="", found="8-bit grey", needed="16-bit grey"),
    ),
    "depth of another size": (
        DEPTH,
        save(np.full((24, 64), 5000, np.uint16)),
        sentences.SIZES_DIFFER.format(file="000.png", size="64x24"),
    ),
    "nothing valid": (DEPTH, save(GREY.astype(np.uint16)), sentences.DEPTH_ALL_MISSING.format("depth/000.png")),
    "no unit": ("dataset.yaml", Path.unlink, sentences.UNIT_UNKNOWN.format(remedy=sentences.SET_UNIT_IN_SETTINGS)),
    "millimetres called metres": (
        "dataset.yaml",
        ("write", "unit: m"),
        sentences.UNIT_WRONG.format(true="millimetres", called="metres") + "; correct the unit in ",
    ),
    "millimetres called micrometres": (
        "dataset.yaml",
        ("write", "unit: um"),
        sentences.UNIT_WRONG.format(true="millimetres", called="micrometres") + "; correct the unit in ",
    ),
    "broken YAML": ("dataset.yaml", ("write", "unit: [mm"), sentences.YAML_REFUSED.format("dataset.yaml")),
    "YAML that runs": (
        "dataset.yaml",
        ("write", "unit: !!python/name:os.getcwd"),
        sentences.YAML_REFUSED.format("dataset.yaml"),
    ),
    "YAML without keys": ("dataset.yaml", ("write", "mm"), sentences.YAML_WITHOUT_KEYS.format("dataset.yaml")),
    "an unknown key": (
        "dataset.yaml",
        ("write", "units: mm"),
        sentences.UNKNOWN_SETTING.format(key="units", known="unit, missing, kind, pitch, align, camera"),
    ),
    "an unknown unit": ("dataset.yaml", ("write", "unit: inch"), sentences.UNKNOWN_UNIT.format("'inch'")),
    "a missing value in words": (
        "dataset.yaml",
        ("write", "missing: [none]"),
        sentences.SETTING_WRONG.format(found="'none'", key="missing"),
    ),
    "a unit of 0": ("dataset.yaml", ("write", "unit: 0"), sentences.SETTING_WRONG.format(found=0, key="unit")),
    "yes for a unit": ("dataset.yaml", ("write", "unit: yes"), sentences.SETTING_WRONG.format(found=True, key="unit")),
    "bits of two cameras": ("dataset.yaml", ("write", "bits: 24"), sentences.BITS_WRONG.format(24)),
    "half a camera": ("dataset.yaml", ("write", "camera: {fx: 9}"), sentences.CAMERA_INCOMPLETE.format("{'fx': 9}")),
    "a camera in words": ("dataset.yaml", ("write", "camera: D435"), sentences.CAMERA_INCOMPLETE.format("'D435'")),
    "a negative focal length": (
        "dataset.yaml",
        ("write", "camera: {fx: -9, fy: 9, cx: 1, cy: 1}"),
        sentences.SETTING_NOT_POSITIVE.format(found=-9, key="camera: fx"),
    ),
    "a height that is none": (
        "dataset.yaml",
        ("write", "object_height: .nan"),
        sentences.SETTING_WRONG.format(found="nan", key="object_height"),
    ),
    "an even window": ("dataset.yaml", ("write", "normals_window: 4"), sentences.WINDOW_WRONG.format(4)),
    "a window in a list": ("dataset.yaml", ("write", "normals_window: [3]"), sentences.WINDOW_WRONG.format([3])),
}


def add_second(file: Path) -> None:
    """Add a second image with depth but without a mask."""
    for kind in ("rgb", "depth"):
        source = file.parents[1] / kind / "000.png"
        source.with_name("001.png").write_bytes(source.read_bytes())


@pytest.mark.parametrize(("path", "damage", "expected"), BAD.values(), ids=BAD)
def test_bad_input(root: Path, refused, spoil, path: str, damage, expected: str) -> None:
    spoil.apply(damage, root / path)
    refused(lambda: Folder(root, "all" if path == "." else "bolt,Zahnrad groß", needs_depth=True), str(root), expected)


def test_a_root_without_objects(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("unit: mm")
    (tmp_path / "split_csv").mkdir()  # which is no object
    with pytest.raises(UserError, match=sentences.ROOT_WITHOUT_OBJECTS):
        Folder(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentences.ROOT_NOT_A_FOLDER.format(tmp_path / "nowhere"))):
        Folder(tmp_path / "nowhere")
