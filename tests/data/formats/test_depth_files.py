"""Depth files in every format compared with their scene, and damaged or invalid depth files."""

import contextlib
import gc
import io
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iumad_jax.data import depth
from iumad_jax.data.formats.clouds import read_ply
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.sample import DepthFormat
from iumad_jax.errors import UserError
from tests import sentences


def ply(cloud: np.ndarray, kind: str = "ascii", size: bool = True, extra: bool = True) -> bytes:
    """Encode a cloud as PLY, with a colour in each vertex and a face after the vertices."""
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
    """Encode a cloud as PCD, padded as PCL does."""
    height, width = cloud.shape[:2]
    keys = {
        "VERSION": "0.7", "FIELDS": "x y z _ rgb _", "SIZE": "4 4 4 1 4 1", "TYPE": "F F F U F U",
        "COUNT": "1 1 1 4 1 12", "WIDTH": width, "HEIGHT": height, "VIEWPOINT": "0 0 0 1 0 0 0",
        "POINTS": height * width, "DATA": kind,
    } | changes  # fmt: skip
    header = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{key} {keys[key]}\n" for key in keys)
    rows = cloud.reshape(-1, 3).astype("<f4")
    if kind == "binary_compressed":  # x, y and z of all points, and then their other fields
        fields = rows.T.tobytes() + bytes(20 * len(rows))
        packed = lzf(fields)
        return header.encode() + struct.pack("<II", len(packed), len(fields)) + packed
    if kind == "ascii":
        lines = (" ".join(repr(float(value)) for value in row) + " 0" * 4 + " 7.5" + " 0" * 12 for row in rows)
        return (header + "\n".join(lines) + "\n").encode()
    return header.encode() + b"".join(row.tobytes() + bytes(20) for row in rows)


def lzf(data: bytes) -> bytes:
    """Pack bytes by LZF: as they are, up to 32 at once, or as a repetition of at least three earlier bytes."""
    packed, at, pending, places = b"", 0, b"", {}
    while at < len(data):
        start = places.get(data[at : at + 3], -9999)
        places[data[at : at + 3]] = at
        if at - start > 8192 or at + 3 > len(data):
            pending, at = pending + data[at : at + 1], at + 1
            continue
        length = 3
        while length < 264 and at + length < len(data) and data[start + length] == data[at + length]:
            length += 1
        packed += literal(pending)
        pending, distance, extra = b"", at - start - 1, length - 2
        packed += bytes([min(extra, 7) << 5 | distance >> 8] + [extra - 7] * (extra >= 7) + [distance & 255])
        at += length
    return packed + literal(pending)


def literal(data: bytes) -> bytes:
    return b"".join(bytes([len(piece) - 1]) + piece for piece in (data[i : i + 32] for i in range(0, len(data), 32)))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def tiff(array: np.ndarray, **settings) -> bytes:
    stream = io.BytesIO()
    photometric = {"photometric": "rgb"} if array.ndim == 3 else {"photometric": "minisblack"}
    tifffile.imwrite(stream, array, **(photometric | settings))
    return stream.getvalue()


def tiff_of_pillow(array: np.ndarray, **settings) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF", **settings)
    return stream.getvalue()


def png(cloud: np.ndarray) -> bytes:
    """Encode depth in tenths of a millimetre as PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.round(cloud[..., 2] * 10_000).astype(np.uint16)).save(stream, "PNG")
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
    "PCD, compressed": ("pcd", lambda cloud: pcd(cloud, "binary_compressed")),
    "TIFF by LZW": ("tiff", lambda cloud: tiff_of_pillow(cloud[..., 2], compression="tiff_lzw")),
    "TIFF by deflate": ("tiff", lambda cloud: tiff_of_pillow(cloud[..., 2], compression="tiff_deflate")),
    "TIFF with floating-point predictor": (
        "tiff",
        lambda cloud: tiff_of_pillow(cloud[..., 2], compression="tiff_deflate", tiffinfo={317: 3}),
    ),
}


@pytest.mark.parametrize(("ending", "encode"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("missing", [0, np.nan, np.inf, 1e30])
def test_formats(tmp_path: Path, scan, ending: str, encode, missing: float) -> None:
    """Depth in metres is read unchanged; a camera is estimated from clouds and is None for depth images."""
    scene = scan(24, 32, seed=8, holes=0.2)
    file = tmp_path / f"000.{ending}"
    file.write_bytes(encode(np.where(scene.cloud[..., 2:] == 0, np.float32(missing), scene.cloud)))
    measured, camera = read_depth(file, DepthFormat(), (24, 32), "")
    assert measured.dtype == np.float32
    z = scene.cloud[..., 2]
    np.testing.assert_array_equal(measured, np.where(z == 0, np.nan, z))
    if ending.lower() in ("ply", "pcd") or encode in (tiff, npy):
        true = scene.camera
        assert [camera.fx, camera.fy, camera.cx, camera.cy] == pytest.approx(
            [true.fx, true.fy, true.cx, true.cy], abs=1e-3
        )
    else:
        assert camera is None


INTEGERS = {
    "PGM": ("pgm", lambda levels: b"P5\n# of a sensor\n32 24\n65535\n" + levels.astype(">u2").tobytes()),
    "PGM of 12 bits": ("pgm", lambda levels: b"P5 32 24 4095 " + levels.astype(">u2").tobytes()),
    "TIFF of 16 bits by LZW": ("tif", lambda levels: tiff_of_pillow(levels, compression="tiff_lzw")),
    "TIFF of 32 bits by LZW": ("tif", lambda levels: tiff_of_pillow(levels.astype(np.int32), compression="tiff_lzw")),
    "npy of 16-bit floats": ("npy", lambda levels: npy(levels.astype(np.float16))),
    "TIFF of 16-bit floats": ("tiff", lambda levels: tiff(levels.astype(np.float16))),
}


@pytest.mark.parametrize(("ending", "encode"), INTEGERS.values(), ids=INTEGERS)
def test_formats_of_few_bits(tmp_path: Path, ending: str, encode) -> None:
    levels = np.random.default_rng(0).integers(0, 2048, (24, 32)).astype(np.uint16)
    levels[levels < 400] = 0
    file = tmp_path / f"000.{ending}"
    file.write_bytes(encode(levels))
    measured, _ = read_depth(file, DepthFormat(0.001), (24, 32), "")
    np.testing.assert_allclose(measured, np.where(levels == 0, np.nan, levels / 1000), rtol=1e-6)


def exr(**channels: np.ndarray) -> bytes:
    openexr = pytest.importorskip("OpenEXR", reason="needs iumad-jax[exr]")
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        header = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage}
        openexr.File(header, channels).write(file.name)
        return Path(file.name).read_bytes()


@pytest.mark.parametrize("channels", ["Z", "RGB"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exr(tmp_path: Path, scan, channels: str, dtype: type) -> None:
    z = scan(24, 32).cloud[..., 2].astype(dtype)
    z[3] = np.nan
    file = tmp_path / "000.exr"
    file.write_bytes(exr(**dict.fromkeys(channels, z)))
    measured, _ = read_depth(file, DepthFormat(), (24, 32), "")
    np.testing.assert_array_equal(measured, np.where(z == 0, np.nan, z))
    file.write_bytes(exr(R=z, G=z, B=2 * z))
    with pytest.raises(UserError, match=sentences.EXR_CHANNELS_DIFFER.format("B, G, R")):
        read_depth(file, DepthFormat(), (24, 32), "")
    file.write_bytes(b"v/1\x01 and no more")
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("000.exr"))):
        read_depth(file, DepthFormat(), (24, 32), "")


def test_exr_without_its_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UserError, match=re.escape(sentences.EXR_NEEDS_EXTRA)):
        read_depth(tmp_path / "000.exr", DepthFormat(), None, "")


SENSORS = Path(__file__).parents[4] / "shared/data/sensors"


@pytest.mark.parametrize(
    ("name", "unit", "shape", "median", "missing", "focal"),
    [
        ("cloud_pcl/test0.pcd", 1.0, (480, 640), 0.728, 0.384, 525),
        ("camera_redwood/depth_mm.png", 0.001, (480, 640), 1.861, 0.13, None),
        ("camera_d435/000000080-opaque-depth-img.exr", 1.0, (720, 1280), 0.599, 0.088, None),
    ],
)
def test_files_of_real_sensors(name: str, unit: float, shape, median: float, missing: float, focal) -> None:
    if not SENSORS.is_dir():
        pytest.skip("needs the sensors' files in ../shared/data/sensors")
    if name.endswith("exr"):
        pytest.importorskip("OpenEXR", reason="needs iumad-jax[exr]")
    measured, camera = read_depth(SENSORS / name, DepthFormat(unit), None, "")
    assert measured.shape == shape
    assert np.nanmedian(measured) == pytest.approx(median, rel=0.01)
    assert np.isnan(measured).mean() == pytest.approx(missing, abs=0.005)
    assert focal is None or camera.fx == pytest.approx(focal, rel=0.01)


def test_the_size_in_a_ply_header_is_used(tmp_path: Path, scan) -> None:
    cloud = scan(24, 32, seed=8).cloud
    for size, shape in ((True, (24, 32)), (False, (32, 24))):
        (tmp_path / "000.ply").write_bytes(ply(cloud, size=size))
        assert read_ply(tmp_path / "000.ply", (32, 24)).shape == (*shape, 3)


@pytest.mark.parametrize("factor", [1000, 100, 1, 4000])
def test_units(tmp_path: Path, scan, factor: float) -> None:
    scene = scan(seed=8)
    np.save(tmp_path / "000.npy", scene.cloud * factor)
    measured, camera = read_depth(tmp_path / "000.npy", DepthFormat(1 / factor), (48, 64), "")
    z = scene.cloud[..., 2]
    np.testing.assert_allclose(measured[z > 0], z[z > 0], rtol=1e-5)
    assert camera.fx == pytest.approx(scene.camera.fx, rel=1e-4)


def test_an_orthographic_scanner(tmp_path: Path) -> None:
    """The cloud of a laser profiler, with x and y on a grid of 0.5 mm, gives exact heights and normals."""
    columns, rows = np.meshgrid(np.arange(64), np.arange(48))
    x, y = (columns - 30) * 5e-4, (rows - 20) * 5e-4
    tilt = np.radians(35)
    normal = np.array([0, -np.sin(tilt), -np.cos(tilt)])
    step = (columns > 40) * 0.004  # towards the sensor, along the normal
    z = (0.1 - step + normal[1] * y) / -normal[2]
    z += 2e-5 * np.random.default_rng(0).standard_normal(z.shape)
    np.save(tmp_path / "000.npy", np.stack([x, y, z], -1))
    measured, camera = read_depth(tmp_path / "000.npy", DepthFormat(1.0), z.shape, "")
    assert camera.orthographic
    assert camera.fx == pytest.approx(2000, rel=1e-4)
    surface = depth.measure(measured, camera, window=5)
    assert np.degrees(np.arccos(surface.plane.normal @ normal)) < 0.2
    np.testing.assert_allclose(surface.height, step, atol=1.5e-4)
    angles = np.degrees(np.arccos(np.clip(surface.normals[..., 2], -1, 1)))
    assert np.quantile(angles[:, :38], 0.95) < 1
    points = depth.backproject(measured, camera)
    np.testing.assert_allclose(points[..., 0], x, atol=1e-6)


# Bad input


def npy_header(shape: str, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


CLOUD = np.ones((48, 64, 3), np.float32)
BAD = {
    "a huge npy": (
        "npy",
        npy_header("(10**9, 10**9)".replace("10**9", "1000000000")),
        sentences.FILE_UNREADABLE.format("000.npy"),
    ),
    "a large npy": (
        "npy",
        npy_header("(9000, 1)") + bytes(36_000),
        sentences.TOO_MANY_PIXELS.format(size="1x9000", most="8192x8192"),
    ),
    "a program": ("npy", npy_header("(1,)", "'|O'") + b"cos\nsystem\n", sentences.FILE_UNREADABLE.format("000.npy")),
    "words": ("npy", npy(np.full((48, 64), "far")), sentences.NOT_NUMBERS.format("<U3")),
    "a row": ("npy", npy(np.ones(9, np.float32)), sentences.ARRAY_OF_WRONG_SHAPE.format("(9,)")),
    "a truncated npy": ("npy", npy(CLOUD)[:-9], sentences.FILE_UNREADABLE.format("000.npy")),
    "a turned cloud": (
        "npy",
        npy(np.random.default_rng(0).uniform(0.3, 0.5, (48, 64, 3))),
        sentences.NO_CAMERA_FITS,
    ),
    "no PLY": ("ply", b"mesh", sentences.NOT_A_CLOUD_OF_ITS_FORMAT.format(file="000.ply", format="PLY")),
    "a PLY without format": ("ply", b"ply\nend_header\n", sentences.PLY_WITHOUT_FORMAT),
    "a PLY of few points": ("ply", ply(CLOUD[:9], size=False), sentences.CLOUD_NOT_ORGANISED.format(576)),
    "a PLY of fewer points than it says": (
        "ply",
        ply(CLOUD).replace(b"num_rows 48", b"num_rows 49"),
        sentences.PLY_NOT_ORGANISED.format(3072),
    ),
    "a PLY without z": ("ply", ply(CLOUD).replace(b" z\n", b" w\n"), sentences.PLY_WITHOUT_COORDINATES),
    "a PLY of lists": (
        "ply",
        ply(CLOUD).replace(b"property uchar red", b"property list uchar int red"),
        sentences.PLY_WITH_UNKNOWN_TYPES,
    ),
    "a truncated PLY": ("ply", ply(CLOUD, "binary_little_endian")[:-99], sentences.FILE_UNREADABLE.format("000.ply")),
    "a PLY in words that ends early": ("ply", ply(CLOUD)[:-999], sentences.FILE_UNREADABLE.format("000.ply")),
    "a PLY without points": (
        "ply",
        ply(CLOUD).partition(b"end_header\n")[0] + b"end_header\n",
        sentences.PLY_WITHOUT_POINTS,
    ),
    "a huge PLY": (
        "ply",
        ply(CLOUD).replace(b"num_cols 64", b"num_cols 99999"),
        sentences.TOO_MANY_PIXELS.format(size="99999x48", most="8192x8192"),
    ),
    "no PCD": ("pcd", b"cloud", sentences.NOT_A_CLOUD_OF_ITS_FORMAT.format(file="000.pcd", format="PCD")),
    "a PCD without height": ("pcd", pcd(CLOUD).replace(b"HEIGHT", b"H"), sentences.PCD_HEADER_INCOMPLETE),
    "a PCD of unknown data": ("pcd", pcd(CLOUD, "packed"), sentences.PCD_WITH_UNKNOWN_DATA.format("packed")),
    "a PCD in no order": ("pcd", pcd(CLOUD, WIDTH=3072, HEIGHT=1), sentences.CLOUD_NOT_ORGANISED.format(3072)),
    "a packed PCD that repeats what precedes it": (
        "pcd",
        pcd(CLOUD[:0], "binary_compressed", WIDTH=2, HEIGHT=2, POINTS=4)[:-8]
        + struct.pack("<II", 3, 128)
        + b"\x20\x05\0",
        sentences.FILE_UNREADABLE.format("000.pcd"),
    ),
    "a PGM of 8 bits": ("pgm", b"P5 64 48 255\n" + bytes(3072), sentences.PGM_WRONG),
    "a truncated PGM": ("pgm", b"P5 64 48 65535\n" + bytes(6143), sentences.FILE_UNREADABLE.format("000.pgm")),
    "a huge PGM": (
        "pgm",
        b"P5 9000 48 65535\n",
        sentences.TOO_MANY_PIXELS.format(size="9000x48", most="8192x8192"),
    ),
    "a PCD of unknown types": (
        "pcd",
        pcd(CLOUD, "binary", SIZE="3 3 3 1 4 1"),
        sentences.FILE_UNREADABLE.format("000.pcd"),
    ),
    "far too small": (
        "npy",
        npy(np.full((48, 64), 0.0004)),
        sentences.UNIT_WRONG_BY.format(median=0.0004, times=1000, size="small") + "; give the unit",
    ),
    "behind the sensor": ("npy", npy(np.full((48, 64), -0.4)), sentences.DEPTH_NEGATIVE),
    "heights above a table": (
        "npy",
        npy(np.where(np.arange(64) > 40, 20.0, np.arange(48)[:, None] % 3 - 1) / 1000),
        sentences.DEPTH_NEGATIVE,
    ),
    "heights": ("npy", npy(np.linspace(-0.05, 0.4, 48 * 64).reshape(48, 64)), sentences.DEPTH_NEGATIVE),
    "millimetres": (
        "npy",
        npy(np.full((48, 64), 412.0)),
        sentences.UNIT_WRONG_BY_MEDIAN.format(median=412, true="millimetres", called="metres"),
    ),
    "far too large": (
        "npy",
        npy(np.full((48, 64), 41.2)),
        sentences.UNIT_WRONG_BY_MEDIAN.format(median=41.2, true="centimetres", called="metres"),
    ),
    "no unit": ("npy", npy(np.full((48, 64), 412)), sentences.UNIT_UNKNOWN.format(remedy="give the unit")),
}


@pytest.mark.parametrize(("ending", "content", "expected"), BAD.values(), ids=BAD)
def test_bad_file(tmp_path: Path, ending: str, content: bytes, expected: str) -> None:
    file = tmp_path / f"000.{ending}"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_depth(file, DepthFormat(), (48, 64), "give the unit")
    message = str(error.value)
    assert message.startswith(f"{file} ")
    assert expected in message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        (1e-6, 500, sentences.UNIT_WRONG_BY_MEDIAN.format(median=0.0005, true="millimetres", called="micrometres")),
        (1e-6, 0.5, sentences.UNIT_WRONG_BY_MEDIAN.format(median=5e-07, true="metres", called="micrometres")),
        (0.001, 0.5, sentences.UNIT_WRONG_BY_MEDIAN.format(median=0.0005, true="metres", called="millimetres")),
        (0.001, 500_000, sentences.UNIT_WRONG_BY_MEDIAN.format(median=500, true="micrometres", called="millimetres")),
        (0.01, 3000, sentences.UNIT_WRONG_BY_MEDIAN.format(median=30, true="millimetres", called="centimetres")),
        (0.00025, 20_000_000, sentences.UNIT_WRONG_BY.format(median=5000, times=1000, size="large")),
        (1e-6, 1e-42, sentences.UNIT_WRONG_BY.format(median=0, times=10**38, size="small")),
    ],
)
def test_a_wrong_unit_is_told_as_it_was_read(tmp_path: Path, unit: float, value: float, expected: str) -> None:
    file = tmp_path / "000.npy"
    file.write_bytes(npy(np.full((48, 64), value, np.float32)))
    with pytest.raises(UserError, match=re.escape(expected)):
        read_depth(file, DepthFormat(unit), (48, 64), "give the unit")


def test_a_damaged_tiff_is_not_logged_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "000.tiff"
    file.write_bytes(tiff(CLOUD).replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 99)))  # offset of its rows
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("000.tiff"))):
        read_depth(file, DepthFormat(1.0), (48, 64), "")
    assert not caplog.records


@pytest.mark.parametrize(("ending", "encode"), [*FORMATS.values(), ("png", png)], ids=[*FORMATS, "PNG"])
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, scan, ending: str, encode, draw: st.DataObject) -> None:
    original = encode(scan(12, 16, seed=8).cloud)
    start = draw.draw(st.integers(0, min(len(original) - 1, 600)))
    cut = draw.draw(st.integers(0, 8))
    file = tmp_path / f"000.{ending}"
    file.write_bytes(original[:start] + draw.draw(st.binary(max_size=8)) + original[start + cut :])
    with contextlib.suppress(UserError):  # any other error would be a traceback for the user
        measured, camera = read_depth(file, DepthFormat(0.0001 if ending == "png" else 1.0), (12, 16), "")
        assert np.nanmin(measured) > 0
        if camera is not None:
            assert min(camera.fx, camera.fy) > 0


def test_a_zip_archive_named_npy_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "000.npy"
    file.write_bytes(b"PK\3\4 and no more")
    with pytest.raises(UserError, match=re.escape(sentences.FILE_DAMAGED.format("000.npy") + ".")):
        read_depth(file, DepthFormat(1.0), (4, 4), "")
    gc.collect()  # an open file would warn here
