"""One's own objects: what the README shows, every format of depth against the scene it was written from, bad input."""

import contextlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iumad_jax import data, protocol
from iumad_jax.config import paper
from iumad_jax.data import depth
from iumad_jax.data.folder import Folder
from iumad_jax.data.processing import Processing
from iumad_jax.errors import UserError


def levels(scene) -> np.ndarray:
    """Depth in tenths of a millimetre."""
    return np.round(scene.cloud[..., 2] * 10_000).astype(np.uint16)


def write(folder: Path, scene, name: str = "000", kinds: tuple[str, ...] = ("rgb", "depth")) -> None:
    """One sample as PNG; depth in tenths of a millimetre."""
    images = {"rgb": scene.rgb, "depth": levels(scene), "mask": scene.mask}
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[kind]).save(folder / kind / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path, scan) -> Path:
    """Two objects, one of them never tested; names as people give them."""
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


def test_reads_what_was_written(root: Path, scan, tree) -> None:
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


def test_the_config_finds_the_objects(root: Path) -> None:
    config = paper("1-1")
    config.dataset.name, config.dataset.root = "folder", str(root)
    assert data.objects(config) == data.open_reader(config).objects == ("Zahnrad groß", "bolt")
    assert len(protocol.steps(config.protocol, data.objects(config))) == 2
    config.dataset.objects = "bolt"
    assert data.objects(config) == data.open_reader(config).objects == ("bolt",)
    config.dataset.objects = "nut"
    with pytest.raises(UserError, match=r'names "nut"; known are all and Zahnrad groß, bolt\.'):
        data.objects(config)
    config.dataset.objects, config.input.depth_encoding = "all", "normals_official"
    with pytest.raises(UserError, match="which folder lacks; use normals"):
        data.open_reader(config)


def test_photographs_alone(tmp_path: Path, scan, read_all) -> None:
    """The least that one can bring: every kind of photograph, no depth, no masks, no settings."""
    folder = tmp_path / "bolt/train/good/rgb"
    folder.mkdir(parents=True)
    rgb = scan().rgb
    for ending in ("png", "jpg", "JPEG", "bmp", "tif", "tiff"):
        Image.fromarray(rgb).save(folder / f"{ending} image.{ending}")
    Image.fromarray(rgb).save(folder / "lzw.tiff", compression="tiff_lzw")
    Image.fromarray(rgb[..., 0]).save(folder / "grey.png")
    (folder / ".DS_Store").touch()
    write(tmp_path / "bolt/test/dent", scan(), kinds=("rgb",))
    samples = {sample.id: sample for sample in read_all(Folder(tmp_path))}
    assert len(samples) == 9
    assert all(sample.depth is None and sample.camera is None for sample in samples.values())
    for name, sample in samples.items():
        exact = np.stack([rgb[..., 0]] * 3, -1) if name == "grey" else rgb
        assert np.abs(sample.rgb.astype(int) - exact).mean() < (60 if "jp" in name.lower() else 0.001), name
    assert (samples["dent/000"].mask, samples["dent/000"].anomalous) == (None, True)
    arrays = Processing(("rgb",), 32, "normals", 0.1, 0.005)(samples["dent/000"])
    assert not arrays["masked"]
    with pytest.raises(UserError, match=r"good/depth/JPEG image\.png is missing; every image in"):
        Folder(tmp_path, needs_depth=True)


def ply(cloud: np.ndarray, kind: str = "ascii", size: bool = True, extra: bool = True) -> bytes:
    """A PLY file of a cloud, with a colour in each vertex and a face after them."""
    height, width = cloud.shape[:2]
    sizes = f"obj_info num_cols {width}\nobj_info num_rows {height}\n" if size else "comment of a scanner\n"
    colour = "property uchar red\n" if extra else ""
    face = "element face 1\nproperty list uchar int vertex_indices\n" if extra else ""
    header = (
        f"ply\nformat {kind} 1.0\n{sizes}element vertex {height * width}\n{colour}property float x\nproperty float y\n"
        f"property double z\n{face}end_header\n"
    )
    order = ">" if "big" in kind else "<"
    fields = ([("red", "u1")] if extra else []) + [("x", order + "f4"), ("y", order + "f4"), ("z", order + "f8")]
    table = np.zeros(height * width, fields)
    table["x"], table["y"], table["z"] = cloud.reshape(-1, 3).T
    if kind == "ascii":
        body = "".join(" ".join(repr(float(value)) for value in row) + "\n" for row in table.tolist())
        return (header + body + ("3 0 1 2\n" if extra else "")).encode()
    return header.encode() + table.tobytes() + (struct.pack(order + "B3i", 3, 0, 1, 2) if extra else b"")


def pcd(cloud: np.ndarray, kind: str = "ascii", **changes: object) -> bytes:
    """A PCD file of a cloud, padded as PCL pads it."""
    height, width = cloud.shape[:2]
    keys = {
        "VERSION": "0.7", "FIELDS": "x y z _ rgb _", "SIZE": "4 4 4 1 4 1", "TYPE": "F F F U F U",
        "COUNT": "1 1 1 4 1 12", "WIDTH": width, "HEIGHT": height, "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": height * width, "DATA": kind,
    } | changes  # fmt: skip
    header = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{key} {keys[key]}\n" for key in keys)
    rows = cloud.reshape(-1, 3).astype("<f4")
    if kind == "ascii":
        lines = (" ".join(repr(float(value)) for value in row) + " 0" * 4 + " 7.5" + " 0" * 12 for row in rows)
        return (header + "\n".join(lines) + "\n").encode()
    return header.encode() + b"".join(row.tobytes() + bytes(20) for row in rows)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def tiff(array: np.ndarray, **settings) -> bytes:
    stream = io.BytesIO()
    photometric = {"photometric": "rgb"} if array.ndim == 3 else {"photometric": "minisblack"}
    tifffile.imwrite(stream, array, **(photometric | settings))
    return stream.getvalue()


FORMATS = {
    "TIFF of 32-bit floats": ("tiff", lambda cloud: tiff(cloud[..., 2])),
    "TIFF of 64-bit floats, big-endian": ("tif", lambda cloud: tiff(cloud[..., 2].astype(float), byteorder=">")),
    "TIFF of clouds": ("tiff", tiff),
    "npy of depth": ("npy", lambda cloud: npy(cloud[..., 2])),
    "npy of depth, by columns": ("npy", lambda cloud: npy(np.asfortranarray(cloud[..., 2].astype(">f8")))),
    "npy of clouds": ("npy", npy),
    "PLY in words": ("ply", ply),
    "PLY, little-endian": ("ply", lambda cloud: ply(cloud, "binary_little_endian")),
    "PLY, big-endian, as large as the image": ("PLY", lambda cloud: ply(cloud, "binary_big_endian", size=False)),
    "PLY with lines of DOS": ("ply", lambda cloud: ply(cloud, extra=False).replace(b"\n", b"\r\n")),
    "PCD in words": ("pcd", pcd),
    "PCD, binary": ("pcd", lambda cloud: pcd(cloud, "binary")),
}


@pytest.mark.parametrize(("ending", "encode"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("missing", [0, np.nan])
def test_formats_of_depth(tmp_path: Path, scan, ending: str, encode, missing: float) -> None:
    """All in metres without settings; a cloud tells its camera, depth alone does not."""
    scene = scan(24, 32, seed=8)
    cloud = np.where(scene.cloud[..., 2:] == 0, np.float32(missing), scene.cloud)
    write(tmp_path / "bolt/train/good", scene, kinds=("rgb",))
    (tmp_path / "bolt/train/good/depth").mkdir()
    (tmp_path / f"bolt/train/good/depth/000.{ending}").write_bytes(encode(cloud))
    sample = Folder(tmp_path, needs_depth=True).read("bolt", "train", "000")
    assert sample.depth.dtype == np.float32
    z = scene.cloud[..., 2]
    np.testing.assert_array_equal(sample.depth, np.where(z == 0, np.nan, z))
    found, true = sample.camera, scene.camera
    if "ly" in ending.lower() or "pcd" in ending or encode in (tiff, npy):
        assert [found.fx, found.cx, found.cy] == pytest.approx([true.fx, true.cx, true.cy], abs=1e-3)
    else:
        assert [found.fx, found.fy, found.cx, found.cy] == [32, 32, 15.5, 11.5]


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1000), ("cm", 100), ("m", 1), (0.00025, 4000), (1, 1)])
def test_units(tmp_path: Path, scan, unit: str | float, factor: float) -> None:
    scene = scan(seed=8)
    write(tmp_path / "bolt/train/good", scene, kinds=("rgb",))
    (tmp_path / "bolt/train/good/depth").mkdir()
    np.save(tmp_path / "bolt/train/good/depth/000.npy", scene.cloud * factor)
    (tmp_path / "dataset.yaml").write_text(f"unit: {unit}")
    sample = Folder(tmp_path).read("bolt", "train", "000")
    np.testing.assert_allclose(sample.depth[sample.depth > 0], scene.cloud[..., 2][scene.cloud[..., 2] > 0], rtol=1e-5)
    assert sample.camera.fx == pytest.approx(scene.camera.fx, rel=1e-4)


def test_a_scanner_without_perspective(tmp_path: Path, scan) -> None:
    """A profiler's cloud: x and y on a grid of half a millimetre. Heights and normals are as true as a pinhole's."""
    scene = scan()
    columns, rows = np.meshgrid(np.arange(64), np.arange(48))
    x, y = (columns - 30) * 5e-4, (rows - 20) * 5e-4
    tilt = np.radians(35)
    normal = np.array([0, -np.sin(tilt), -np.cos(tilt)])
    step = (columns > 40) * 0.004  # towards the sensor, along the normal
    z = (0.1 - step + normal[1] * y) / -normal[2]
    z += 2e-5 * np.random.default_rng(0).standard_normal(z.shape)
    write(tmp_path / "bolt/train/good", scene, kinds=("rgb",))
    (tmp_path / "bolt/train/good/depth").mkdir()
    np.save(tmp_path / "bolt/train/good/depth/000.npy", np.stack([x, y, z], -1))
    sample = Folder(tmp_path).read("bolt", "train", "000")
    assert sample.camera.orthographic
    assert sample.camera.fx == pytest.approx(2000, rel=1e-4)
    surface = depth.measure(sample.depth, sample.camera, window=5)
    assert np.degrees(np.arccos(surface.plane.normal @ normal)) < 0.2
    np.testing.assert_allclose(surface.height, step, atol=1.5e-4)
    off = np.degrees(np.arccos(np.clip(surface.normals[..., 2], -1, 1)))
    assert np.quantile(off[:, :38], 0.95) < 1
    points = depth.backproject(sample.depth, sample.camera)
    np.testing.assert_allclose(points[..., 0], x, atol=1e-6)


def test_settings_and_what_is_assumed_without(root: Path) -> None:
    reader = Folder(root)
    assert (reader.object_height, reader.height_range) == (0.005, 0.1)
    with (root / "dataset.yaml").open("a") as file:
        file.write("object_height: 0.002\nheight_range: 0.3\nnormals_window: 9\n")
    reader = Folder(root)
    assert (reader.object_height, reader.height_range, reader.normals_window) == (0.002, 0.3, 9)
    (root / "dataset.yaml").write_text("unit: 0.0001")
    assert Folder(root).read("bolt", "train", "000").camera.fx == 64


@pytest.mark.parametrize(("noise", "expected"), [(1e-4, 3), (2e-2, 15)])
def test_the_window_of_normals_follows_from_the_noise(root: Path, scan, noise: float, expected: int) -> None:
    """Pixels are 5.9 mm apart."""
    for object_, name in (("bolt", "000"), ("Zahnrad groß", "10"), ("Zahnrad groß", "part 2")):
        write(root / object_ / "train/good", scan(noise=noise), name)
    assert Folder(root).normals_window == expected


# Everything that can be wrong

GOOD, BROKEN = "bolt/train/good", "Zahnrad groß/test/broken tooth"
RGB, DEPTH, MASK = f"{GOOD}/rgb/000.png", f"{GOOD}/depth/000.png", f"{BROKEN}/mask/000.png"
GREY = np.zeros((48, 64), np.uint8)


def save(image: np.ndarray, **kwargs):
    return lambda file: Image.fromarray(image).save(file, **kwargs)


def replace(name: str, content: bytes):
    """Another file in the place of one."""

    def spoil(file: Path) -> None:
        file.unlink()
        file.with_name(name).write_bytes(content)

    return spoil


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def jpeg_header(side: int) -> bytes:
    """A JPEG of any size, without its pixels."""
    frame = struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    scan = struct.pack(">HB", 12, 3) + bytes([1, 0, 2, 0, 3, 0, 0, 63, 0])
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda" + scan


def bmp_header(side: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def npy_header(shape: str, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


CLOUD = np.ones((48, 64, 3), np.float32)
BAD = {
    "an empty root": (".", "empty", "which is empty"),
    "no train": ("bolt/train", "rmtree", "bolt/train cannot be read (No such file or directory)"),
    "no good images": (GOOD, ("rename_to", "fine"), "train/fine is not good; only test images may have defects"),
    "an empty train": ("bolt/train", "empty", "train/good is missing; put the good images there"),
    "an empty good": (GOOD, "empty", "good/rgb holds no images; put files such as 000.png there"),
    "an empty rgb": (f"{GOOD}/rgb", "empty", "good/rgb holds no images"),
    "an empty depth": (f"{GOOD}/depth", "empty", "depth/000.png is missing; every image in"),
    "an empty test": ("Zahnrad groß/test", "empty", "test holds no folder good and none named after a defect"),
    "an empty defect": (BROKEN, "empty", "broken tooth/rgb holds no images"),
    "an unknown split": ("bolt/unlabelled", ("rename_to", "Test"), "bolt/Test is not one of train, val, test"),
    "an unknown kind": (f"{BROKEN}/mask", ("rename_to", "masks"), "masks is not one of rgb, depth, mask"),
    "an unknown ending": (RGB, ("copy_to", "001.webp"), "001.webp is not one of .png .jpg"),
    "one name twice": (RGB, ("copy_to", "000.jpg"), "000.png and 000.jpg have one name; rename or remove either"),
    "depth without an image": (DEPTH, ("copy_to", "001.png"), "001.png has no image of its name"),
    "some masks missing": (
        f"{BROKEN}/rgb/000.png",
        lambda file: add_second(file),
        "mask/001.png is missing; every image in",
    ),
    "a mask that marks nothing": (MASK, save(GREY), "marks nothing but its image has the defect broken tooth"),
    "a mask of three values": (MASK, save(np.tile(np.uint8([0, 7, 255, 0]), (48, 16))), "has the values [7, 255]"),
    "a mask of another size": (MASK, save(GREY[:, :9]), "000.png has 9x48 pixels but"),
    "a colour mask": (MASK, save(np.stack([GREY] * 3, -1)), "is 8-bit RGB; it must be 8-bit grey or 1-bit grey"),
    "an empty file": (DEPTH, ("write", b""), "depth/000.png is empty"),
    "a folder for a file": (DEPTH, "fold", "depth/000.png is not a file"),
    "a link to itself": (RGB, "loop", "cannot be read (Too many levels of symbolic links)"),
    "an object elsewhere": ("bolt", "move_out", "bolt leads out of config.dataset.root"),
    "settings elsewhere": ("dataset.yaml", "move_out", "dataset.yaml leads out of config.dataset.root"),
    "16-bit RGB": (
        RGB,
        replace("000.tiff", tiff(np.zeros((48, 64, 3), np.uint16))),
        "000.tiff is 16-bit RGB; it must be 8-bit RGB or 8-bit grey",
    ),
    "16-bit grey": (RGB, save(GREY.astype(np.uint16)), "is 16-bit grey; it must be 8-bit RGB or 8-bit grey"),
    "RGB with alpha": (RGB, save(np.zeros((48, 64, 4), np.uint8)), "is 8-bit RGB with alpha; it must be"),
    "a palette": (RGB, lambda file: Image.fromarray(GREY).convert("P").save(file), "is of Pillow's mode P"),
    "a turned photograph": (
        RGB,
        lambda file: Image.fromarray(GREY).save(file.with_suffix(".jpg"), exif=exif(6)) or file.unlink(),
        "000.jpg is shown turned, by its EXIF orientation",
    ),
    "a PNG called JPEG": (RGB, ("rename_to", "000.jpg"), "000.jpg is not a JPEG image"),
    "a truncated PNG": (RGB, "truncate", "000.png cannot be read (it is truncated or damaged)"),
    "a huge JPEG": (RGB, replace("000.jpg", jpeg_header(65_000)), "65000x65000 pixels; use at most 8192x8192"),
    "a huge BMP": (RGB, replace("000.bmp", bmp_header(2**30)), "1073741824x1073741824 pixels; use at most 8192x8192"),
    "a huge npy": (DEPTH, replace("000.npy", npy_header("(10**9, 10**9)".replace("10**9", "1000000000"))), "cannot be"),
    "a large npy": (DEPTH, replace("000.npy", npy_header("(9000, 1)") + bytes(36_000)), "1x9000 pixels; use at most"),
    "a program": (DEPTH, replace("000.npy", npy_header("(1,)", "'|O'") + b"cos\nsystem\n"), "000.npy cannot be read"),
    "words": (DEPTH, replace("000.npy", npy(np.full((48, 64), "far"))), "holds <U3; give numbers"),
    "a row": (DEPTH, replace("000.npy", npy(np.ones(9, np.float32))), "has the shape (9,); give (rows, columns)"),
    "a truncated npy": (DEPTH, replace("000.npy", npy(CLOUD)[:-9]), "000.npy cannot be read"),
    "8-bit depth": (DEPTH, save(GREY), "is 8-bit grey; it must be 16-bit grey"),
    "depth of another size": (DEPTH, save(np.full((24, 64), 5000, np.uint16)), "000.png has 64x24 pixels but"),
    "nothing valid": (DEPTH, save(GREY.astype(np.uint16)), "depth/000.png has no valid depth"),
    "no unit": ("dataset.yaml", Path.unlink, "holds whole numbers of an unknown unit; give the unit in"),
    "millimetres called metres": ("dataset.yaml", ("write", "unit: m"), "as if millimetres were called metres"),
    "metres called millimetres": (
        DEPTH,
        replace("000.npy", npy(np.full((48, 64), 0.4))),
        "as if metres were called millimetres; give the unit in",
    ),
    "behind the sensor": (DEPTH, replace("000.npy", npy(np.full((48, 64), -5000))), "depth is the distance from"),
    "a turned cloud": (
        DEPTH,
        replace("000.npy", npy(np.random.default_rng(0).uniform(3000, 5000, (48, 64, 3)))),
        "beside the rays of the best pinhole or orthographic camera",
    ),
    "no PLY": (DEPTH, replace("000.ply", b"mesh"), "000.ply is not a PLY file"),
    "a PLY without format": (DEPTH, replace("000.ply", b"ply\nend_header\n"), "header without a known format"),
    "a PLY of few points": (DEPTH, replace("000.ply", ply(CLOUD[:9], size=False)), "has 576 points; an organised"),
    "a PLY without z": (DEPTH, replace("000.ply", ply(CLOUD).replace(b" z\n", b" w\n")), "give x, y and z, each once"),
    "a PLY of lists": (
        DEPTH,
        replace("000.ply", ply(CLOUD).replace(b"property uchar red", b"property list uchar int red")),
        "has vertices with lists or unknown types",
    ),
    "a truncated PLY": (DEPTH, replace("000.ply", ply(CLOUD, "binary_little_endian")[:-99]), "000.ply cannot be read"),
    "a PLY in words that ends early": (DEPTH, replace("000.ply", ply(CLOUD)[:-999]), "000.ply cannot be read"),
    "a PLY without points": (
        DEPTH,
        replace("000.ply", ply(CLOUD).partition(b"end_header\n")[0] + b"end_header\n"),
        "has no points after its header",
    ),
    "a huge PLY": (
        DEPTH,
        replace("000.ply", ply(CLOUD).replace(b"num_cols 64", b"num_cols 99999")),
        "99999x48 pixels; use at most",
    ),
    "no PCD": (DEPTH, replace("000.pcd", b"cloud"), "000.pcd is not a PCD file"),
    "a PCD without height": (DEPTH, replace("000.pcd", pcd(CLOUD).replace(b"HEIGHT", b"H")), "incomplete PCD header"),
    "a compressed PCD": (
        DEPTH,
        replace("000.pcd", pcd(CLOUD, "binary_compressed")),
        "has the data binary_compressed; save it as ascii or binary",
    ),
    "a PCD in no order": (DEPTH, replace("000.pcd", pcd(CLOUD, WIDTH=3072, HEIGHT=1)), "is not organised"),
    "a PCD of unknown types": (DEPTH, replace("000.pcd", pcd(CLOUD, "binary", SIZE="3 3 3 1 4 1")), "cannot be read"),
    "broken YAML": ("dataset.yaml", ("write", "unit: [mm"), "dataset.yaml is not plain YAML"),
    "YAML that runs": ("dataset.yaml", ("write", "unit: !!python/name:os.getcwd"), "dataset.yaml is not plain YAML"),
    "YAML without keys": ("dataset.yaml", ("write", "mm"), "dataset.yaml holds no keys"),
    "an unknown key": ("dataset.yaml", ("write", "units: mm"), "has the key 'units'; known are unit, camera"),
    "an unknown unit": ("dataset.yaml", ("write", "unit: inch"), "'inch' as unit; give m, cm, mm or metres per level"),
    "a unit of 0": ("dataset.yaml", ("write", "unit: 0"), "has 0 as unit"),
    "yes for a unit": ("dataset.yaml", ("write", "unit: yes"), "has True as unit"),
    "half a camera": ("dataset.yaml", ("write", "camera: {fx: 9}"), "as camera; give fx, fy, cx, cy in pixels"),
    "a camera in words": ("dataset.yaml", ("write", "camera: D435"), "'D435' as camera; give fx, fy, cx, cy"),
    "a negative focal length": (
        "dataset.yaml",
        ("write", "camera: {fx: -9, fy: 9, cx: 1, cy: 1}"),
        "has -9 as camera: fx; give a number above 0",
    ),
    "a height that is none": ("dataset.yaml", ("write", "object_height: .nan"), "has nan as object_height"),
    "an even window": ("dataset.yaml", ("write", "normals_window: 4"), "has 4 as normals_window; give 3, 5, 7"),
    "a window in a list": ("dataset.yaml", ("write", "normals_window: [3]"), "has [3] as normals_window"),
}


def add_second(file: Path) -> None:
    """A second image with depth, but without a mask."""
    for kind in ("rgb", "depth"):
        source = file.parents[1] / kind / "000.png"
        source.with_name("001.png").write_bytes(source.read_bytes())


@pytest.mark.parametrize(("path", "how", "expected"), BAD.values(), ids=BAD)
def test_bad_input(root: Path, refused, spoil, path: str, how, expected: str) -> None:
    if isinstance(how, tuple):
        how = getattr(spoil, how[0])(how[1])
    elif isinstance(how, str):
        how = getattr(spoil, how)
    how(root / path)
    refused(lambda: Folder(root, "all" if path == "." else "bolt,Zahnrad groß", needs_depth=True), str(root), expected)


def test_a_root_without_objects(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("unit: mm")
    with pytest.raises(UserError, match="holds no folder; give every object a folder there"):
        Folder(tmp_path)
    with pytest.raises(UserError, match="nowhere, which is not a folder"):
        Folder(tmp_path / "nowhere")


@pytest.mark.parametrize(("ending", "encode"), [*FORMATS.values(), ("png", None)], ids=[*FORMATS, "PNG"])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, scan, ending: str, encode, draw: st.DataObject) -> None:
    scene = scan(12, 16, seed=8)
    root = tmp_path_factory.mktemp("damaged")
    write(root / "bolt/train/good", scene, kinds=("rgb",) if encode else ("rgb", "depth"))
    (root / "dataset.yaml").write_text("unit: 0.0001" if encode is None else "unit: m")
    file = root / f"bolt/train/good/depth/000.{ending}"
    file.parent.mkdir(exist_ok=True)
    original = encode(scene.cloud) if encode else file.read_bytes()
    start = draw.draw(st.integers(0, min(len(original) - 1, 600)))
    cut = draw.draw(st.integers(0, 8))
    file.write_bytes(original[:start] + draw.draw(st.binary(max_size=8)) + original[start + cut :])
    with contextlib.suppress(UserError):  # anything else that is raised is a traceback for the user
        sample = Folder(root).read("bolt", "train", "000")
        assert sample.depth.shape == (12, 16)
        assert np.nanmin(sample.depth) > 0
