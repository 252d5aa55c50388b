"""Photographs and masks of every kind that cameras, phones and annotation tools write."""

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from iumad_jax import errors
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.images import (
    check_mask_size,
    read_image,
    read_mask,
    read_photograph,
    upright,
    used_bits,
)
from iumad_jax.data.sample import DepthFormat
from iumad_jax.errors import UserError
from tests import sentences

HEIGHT, WIDTH = 12, 20
LEVELS = np.random.default_rng(0).integers(0, 1 << 16, (HEIGHT, WIDTH, 4)).astype(np.uint16)
RGB = (LEVELS[..., :3] >> 8).astype(np.uint8)
DEEP = {3: "16-bit RGB", 4: "16-bit RGB with alpha"}  # by channels
DEFECT = np.zeros((HEIGHT, WIDTH), np.uint8)
DEFECT[3:8, 5:14] = 1


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Return a function that returns what was told, as if nothing had been told in this process before."""
    monkeypatch.setattr(errors, "_told", set())
    return lambda: capsys.readouterr().err


def png_of_16_bits(levels: np.ndarray) -> bytes:
    """Encode RGB, with or without alpha; Pillow writes only 8 bits per channel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows, columns, channels = levels.shape
    header = struct.pack(">IIBBBBB", columns, rows, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photograph_is_held_once_beside_what_pillow_holds(tmp_path: Path, orientation: int) -> None:
    """24 megapixels: 4 bytes per pixel in Pillow, 3 in the result."""
    file = tmp_path / "photograph.jpg"
    Image.new("RGB", (6000, 4000), (200, 90, 30)).save(file, exif=exif(orientation))
    code = f"""
from pathlib import Path
from iumad_jax.data.formats.images import read_photograph
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
photograph = read_photograph(Path({str(file)!r}))
print((peak() - before) / 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 24e6 * 7 / 2**20 + 20


# Orientation and pages


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_file_is_turned_as_its_orientation_says(tmp_path: Path, orientation: int) -> None:
    """Photographs, masks and depth alike; Pillow tells how."""
    tagged = Image.fromarray(RGB)
    tagged.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(tagged))
    np.testing.assert_array_equal(upright(RGB, orientation), turned)
    for kind, exact in (("png", True), ("webp", True), ("tiff", True), ("jpg", False)):
        options = {"lossless": True} if kind == "webp" else {}
        Image.fromarray(RGB).save(tmp_path / f"rgb.{kind}", exif=exif(orientation), **options)
        photograph = read_photograph(tmp_path / f"rgb.{kind}")
        assert photograph.shape == turned.shape
        np.testing.assert_allclose(photograph.astype(int), turned, atol=0 if exact else 200)
    Image.fromarray(DEFECT).save(tmp_path / "mask.png", exif=exif(orientation))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), upright(DEFECT, orientation) > 0)
    depth = LEVELS[..., 0] // 2 + 1000
    Image.fromarray(depth).save(tmp_path / "depth.png", exif=exif(orientation))
    tifffile.imwrite(tmp_path / "depth.tiff", depth, extratags=[(0x0112, "H", 1, orientation, True)])
    for name in ("depth.png", "depth.tiff"):
        metres, _ = read_depth(tmp_path / name, DepthFormat(1e-4, ()), (HEIGHT, WIDTH), "")
        np.testing.assert_allclose(metres, upright(depth, orientation) / 1e4, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), [("a.tiff", {}), ("a.webp", {}), ("a.png", {})])
def test_several_pages_are_refused(tmp_path: Path, name: str, options) -> None:
    pages = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=re.escape(sentences.IMAGE_WITH_SEVERAL_PAGES.format(name))):
        read_photograph(tmp_path / name)


# Photographs


TIFFS = ({}, {"compression": "zlib"}, {"tile": (16, 16)})


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("options", [None, *({"byteorder": order, **more} for order in "<>" for more in TIFFS)])
def test_levels_of_16_bits_are_exact(tmp_path: Path, channels: int, options: dict | None) -> None:
    levels, file = LEVELS[..., :channels], tmp_path / "a.png"
    if options is None:
        file.write_bytes(png_of_16_bits(levels))
    else:
        tifffile.imwrite(file, levels, photometric="rgb", extrasamples=["unassalpha"] * (channels - 3), **options)
    np.testing.assert_array_equal(read_image(file, *DEEP.values()), levels)


@pytest.mark.parametrize("bits", range(8, 17))
def test_bits_are_scaled_to_8(tmp_path: Path, bits: int) -> None:
    top = (1 << bits) - 1
    levels = LEVELS[..., 0] >> (16 - bits)
    levels[0, :2] = 0, top
    file = tmp_path / "a.png"
    Image.fromarray(levels).save(file)
    expected = np.rint(levels / top * 255)
    np.testing.assert_array_equal(read_photograph(file, bits), np.stack([expected] * 3, -1))
    if bits > 8:
        with pytest.raises(UserError, match=sentences.LEVEL_ABOVE_BITS.format(level=top, bits=bits - 1)):
            read_photograph(file, bits - 1)


@pytest.mark.parametrize(("highest", "bits"), [(255, 8), (256, 10), (4080, 12), (4096, 14), (65535, 16)])
def test_bits_follow_from_all_photographs(tmp_path: Path, told, highest: int, bits: int) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    Image.fromarray(LEVELS[..., 0] & 63).save(paths[0])
    Image.fromarray(np.full((HEIGHT, WIDTH), highest, np.uint16)).save(paths[1])
    assert used_bits(paths) == bits
    assert sentences.BITS_TOLD.format(bits) in told()
    Image.fromarray(RGB).save(paths[0])
    assert used_bits(paths) is None
    with pytest.raises(UserError, match=re.escape(sentences.BITS_UNKNOWN.format(paths[1]))):
        read_photograph(paths[1], used_bits(paths))


def test_other_colours_are_read_as_rgb(tmp_path: Path) -> None:
    """Palette, CMYK and grey with alpha, each as Pillow shows it; suffixes do not matter."""
    image, grey = Image.fromarray(RGB), Image.fromarray(RGB[..., 0])
    palette = image.quantize(8)
    opaque = palette.copy()
    opaque.info["transparency"] = b"\xff" * 8
    cmyk, with_alpha = image.convert("CMYK"), grey.convert("LA")
    sources = [(palette, "PNG"), (palette, "BMP"), (opaque, "PNG"), (with_alpha, "PNG"), (cmyk, "TIFF")]
    for number, (source, kind) in enumerate(sources):
        file = tmp_path / f"{number}.jpg"
        source.save(file, kind)
        expected = np.asarray(source.convert("RGBA").convert("RGB"))
        np.testing.assert_array_equal(read_photograph(file), expected, err_msg=str(number))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    np.testing.assert_allclose(read_photograph(tmp_path / "cmyk.jpg").astype(int), RGB, atol=16)


def test_what_is_no_photograph_is_refused_in_the_words_of_its_file(tmp_path: Path) -> None:
    image, needed = Image.fromarray(RGB), "8-bit RGB or 8-bit grey"
    half = image.quantize(8)
    half.info["transparency"] = b"\x7f" * 8
    floats = LEVELS[..., :3] / np.float32(9)
    planes = {"data": np.moveaxis(LEVELS[..., :3], -1, 0), "planarconfig": "separate"}
    for write, expected in (
        (lambda file: half.save(file, "PNG"), sentences.IMAGE_TRANSPARENT),
        (lambda file: file.write_bytes(png_of_16_bits(LEVELS)), sentences.IMAGE_TRANSPARENT),
        (lambda file: image.convert("1").save(file, "PNG"), f"is 1-bit grey; save it as {needed}"),
        (lambda file: Image.fromarray(floats[..., 0]).save(file, "TIFF"), f"is 32-bit grey; save it as {needed}"),
        (lambda file: image.convert("LAB").save(file, "TIFF"), f"is of an uncommon kind; save it as {needed}"),
        (lambda file: tifffile.imwrite(file, floats, photometric="rgb"), sentences.UNKNOWN_PIXELS),
        (
            lambda file: tifffile.imwrite(file, **planes, photometric="rgb"),
            f"is 16-bit RGB in planes; save it as {needed}",
        ),
        (lambda file: file.write_bytes(b"GIF89a"), sentences.NOT_AN_IMAGE.format("a.png")),
    ):
        write(tmp_path / "a.png")
        with pytest.raises(UserError, match=expected):
            read_photograph(tmp_path / "a.png", 16)


# Masks

PALETTE = Image.fromarray(DEFECT).convert("P")
PALETTE.putpalette([0, 0, 0, 128, 0, 0])
MASKS = {
    "0 and 1": Image.fromarray(DEFECT),
    "0 and 255": Image.fromarray(DEFECT * 255),
    "1 bit": Image.fromarray(DEFECT * 255).convert("1"),
    "16 bits": Image.fromarray(DEFECT * np.uint16(65535)),
    "32 bits": Image.fromarray(DEFECT.astype(np.int32)),
    "a palette": PALETTE,
    "blue": Image.fromarray(np.dstack([DEFECT * 0, DEFECT * 0, DEFECT * 9])),
    "opaque": Image.fromarray(np.dstack([DEFECT * 255] * 3 + [np.full_like(DEFECT, 255)])),
    "a cut-out": Image.fromarray(np.dstack([np.full_like(DEFECT, 255)] * 3 + [DEFECT * 255])),
    "grey with alpha": Image.fromarray(DEFECT * 255).convert("LA"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_true_where_its_file_is_not_black(tmp_path: Path, told, name: str) -> None:
    MASKS[name].save(tmp_path / "a.tiff", "PNG" if MASKS[name].mode != "I" else "TIFF")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tiff"), DEFECT > 0)
    assert not told()


def test_several_values_are_all_defects(tmp_path: Path, told) -> None:
    Image.fromarray(DEFECT * np.arange(1, WIDTH + 1, dtype=np.uint8)).save(tmp_path / "a.png")
    for _ in range(2):
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), DEFECT > 0)
    assert told().count(sentences.MASK_VALUES_TOLD) == 1


@pytest.mark.parametrize("largest", [255, 100])
def test_soft_edges_are_cut_at_half(tmp_path: Path, told, largest: int) -> None:
    """A JPEG is soft by nature; a PNG, because it has many values."""
    soft = Image.fromarray(np.kron(DEFECT * np.uint8(largest), np.ones((10, 10), np.uint8)))
    soft.save(tmp_path / "a.jpg", quality=60)
    cut = read_mask(tmp_path / "a.jpg")
    assert (cut != (np.asarray(soft) > 0)).mean() < 0.001
    assert (np.asarray(Image.open(tmp_path / "a.jpg")) > 0).mean() > cut.mean() + 0.01  # noise around the defect
    stripe = np.tile(np.uint8([largest] * 3 + [0] * 5), (8, 1))  # noise of few values
    Image.fromarray(stripe).save(tmp_path / "few.jpg", quality=30)
    np.testing.assert_array_equal(read_mask(tmp_path / "few.jpg"), stripe > 0)
    soft.resize((WIDTH * 5, HEIGHT * 5), Image.Resampling.BILINEAR).resize(soft.size, Image.Resampling.BICUBIC).save(
        tmp_path / "a.png"
    )
    edges = read_mask(tmp_path / "a.png")
    assert (edges != (np.asarray(soft) > 0)).mean() < 0.01
    assert told().count(sentences.SOFT_EDGES_TOLD) == 1


@pytest.mark.parametrize("radius", [2, 5, 20])
@pytest.mark.parametrize("supersampling", [2, 4])
def test_edges_of_few_values_are_cut_at_half(tmp_path: Path, told, radius: int, supersampling: int) -> None:
    """Edge pixels of a disc hold the share that it covers; its area is met better than by all that it touches."""
    rows, columns = np.mgrid[: 50 * supersampling, : 50 * supersampling] / supersampling - 25
    disc = np.hypot(rows + 0.2, columns + 0.3) < radius
    shares = disc.reshape(50, supersampling, 50, supersampling).mean((1, 3))
    Image.fromarray((255 * shares).astype(np.uint8)).save(tmp_path / "a.png")
    assert len(np.unique(shares)) <= 17
    mask = read_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask, (255 * shares).astype(np.uint8) > 127.5)
    assert abs(mask.sum() - shares.sum()) < ((shares > 0).sum() - shares.sum()) / 2
    assert sentences.SOFT_EDGES_TOLD in told()


def test_a_thin_defect_of_its_own_value_is_kept(tmp_path: Path, told) -> None:
    """Though it touches another of a larger value."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:5, 2:5], mask[3, 5:8] = 2, 1
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask > 0)
    assert sentences.MASK_VALUES_TOLD in told()


def test_a_mask_of_the_background_is_asked_about(tmp_path: Path, told) -> None:
    Image.fromarray((1 - DEFECT) * 255).save(tmp_path / "a.png")
    read_mask(tmp_path / "a.png")
    assert sentences.MASK_INVERTED_TOLD in told()


def test_the_printed_command_mends_a_mask_of_another_size(tmp_path: Path) -> None:
    file, rgb = tmp_path / "the mask's.png", np.zeros((HEIGHT * 2, WIDTH * 2, 3), np.uint8)
    Image.fromarray(DEFECT).save(file)
    with pytest.raises(UserError) as error:
        check_mask_size(file, read_mask(file), tmp_path / "rgb.png", rgb)
    (code,) = re.findall(r'python -c "(.*)"\.$', str(error.value))
    subprocess.run([sys.executable, "-c", code], check=True)
    mask = read_mask(file)
    check_mask_size(file, mask, tmp_path / "rgb.png", rgb)
    np.testing.assert_array_equal(mask, np.kron(DEFECT, np.ones((2, 2))) > 0)
    with pytest.raises(UserError, match=sentences.SIZES_DIFFER.format(file="s.png", size="24x40")) as error:
        check_mask_size(file, mask.T, tmp_path / "rgb.png", rgb)
    assert "python" not in str(error.value)
