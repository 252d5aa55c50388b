"""Fuzz targets that read untrusted datasets, each with valid inputs to mutate."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import yaml
from PIL import Image

from iumad_jax.data.formats.archives import unpack
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.images import read_mask, read_photograph
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.data.sample import Camera, DepthFormat, Reader, Split
from iumad_jax.shapes import Modality
from tests.data.formats import test_archives, test_depth_files, test_images

HEIGHT, WIDTH = 24, 32
CONFIG = Path(__file__).parents[2] / "configs" / "folder.py"


@dataclass(frozen=True)
class Target:
    """A part of the code to be fuzzed.

    Attributes:
        seeds: Valid inputs by name.
        read: Function of (name, content) that reads a mutated input and returns or raises UserError.
    """

    seeds: dict[str, bytes]
    read: Callable[[str, bytes], None]


# ---- a dataset ----


def _scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return RGB, an organised cloud in metres with holes, and a mask of a box on a plane."""
    rng = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    z = 0.5 + 2e-4 * rng.standard_normal((HEIGHT, WIDTH))
    z[8:16, 8:20] -= 0.03
    z[rng.random(z.shape) < 0.05] = 0
    cloud = np.stack([(columns - 15.5) / 40 * z, (rows - 11.5) / 40 * z, z], -1).astype(np.float32)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:13, 10:14] = 255
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8), cloud, mask


def _encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(stream, kind, **options)
    return stream.getvalue()


RGB, CLOUD, MASK = _scene()
LEVELS = np.round(CLOUD[..., 2] * 10_000).astype(np.uint16)


def images(folder: Path) -> Target:
    """Return a target that reads photographs and masks in every format."""
    grey, image = RGB[..., 0], Image.fromarray(RGB)
    turned = Image.Exif()
    turned[0x0112] = 6
    seeds = {
        "rgb.png": _encode(RGB, "PNG"),
        "levels.png": _encode(LEVELS, "PNG"),
        "rgb.jpg": _encode(RGB, "JPEG"),
        "progressive.jpg": _encode(RGB, "JPEG", progressive=True),
        "grey.bmp": _encode(grey, "BMP"),
        "rgb.tiff": _encode(RGB, "TIFF"),
        "lzw.tiff": _encode(RGB, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": _encode(RGB, "TIFF", compression="tiff_deflate"),
        "jpeg.tiff": _encode(RGB, "TIFF", compression="jpeg"),
        "lossy.webp": _encode(RGB, "WEBP"),
        "lossless.webp": _encode(RGB, "WEBP", lossless=True, exif=turned),
        "turned.jpg": _encode(RGB, "JPEG", exif=turned),
        "turned.png": _encode(RGB, "PNG", exif=turned),
        "palette.png": _encode(image.quantize(16), "PNG"),
        "alpha.png": _encode(Image.fromarray(grey).convert("LA"), "PNG"),
        "cmyk.jpg": _encode(image.convert("CMYK"), "JPEG"),
        "deep.png": test_images.png_of_16_bits(RGB.astype(np.uint16) * 257),
        "deep.tiff": test_depth_files.tiff(RGB.astype(np.uint16) * 257),
        "mask.png": _encode(MASK, "PNG"),
        "mask.jpg": _encode(MASK, "JPEG"),
        "mask_alpha.png": _encode(np.dstack([MASK] * 4), "PNG"),
    }

    def read(name: str, content: bytes) -> None:
        file = folder / name
        file.write_bytes(content)
        read_mask(file) if name.startswith("mask") else read_photograph(file, 16)

    return Target(seeds, read)


def depth(folder: Path) -> Target:
    """Return a target that reads depth images and clouds in every format."""
    encoders = [*test_depth_files.FORMATS.values(), ("png", test_depth_files.png)]
    seeds = {f"{i}.{ending}": encode(CLOUD) for i, (ending, encode) in enumerate(encoders)}
    seeds |= {
        f"levels {i}.{ending}": encode(LEVELS) for i, (ending, encode) in enumerate(test_depth_files.INTEGERS.values())
    }
    with contextlib.suppress(ImportError):
        import OpenEXR  # noqa: F401

        seeds["z.exr"] = test_depth_files.exr(Z=CLOUD[..., 2])
        seeds["rgb.exr"] = test_depth_files.exr(**dict.fromkeys("RGB", CLOUD[..., 2].astype(np.float16)))
    seeds["deflated.tiff"] = test_depth_files.tiff(CLOUD[..., 2], compression="zlib")
    seeds["tiles.tiff"] = test_depth_files.tiff(CLOUD[..., 2], tile=(16, 16))

    def read(name: str, content: bytes) -> None:
        file = folder / name
        file.write_bytes(content)
        integers = name.endswith(".png") or name.startswith("levels")
        camera = Camera(40, 40, 15.5, 11.5) if content[-1:] > b"\x80" else None  # for clouds in no order
        read_depth(file, DepthFormat(0.0001 if integers else 1.0), (HEIGHT, WIDTH), "give the unit", camera)

    return Target(seeds, read)


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _dataset(
    folder: Path,
    files: dict[str, bytes],
    open_: Callable[[Path], Reader],
    modalities: tuple[Modality, ...] = ("rgb", "depth"),
) -> Target:
    """Return a target that opens a dataset with one mutated file, and reads and processes a sample with this file."""
    root = folder / "dataset"
    write(root, files)

    def read(name: str, content: bytes) -> None:
        (root / name).write_bytes(content)
        try:
            reader = open_(root)
            key = next(key for key in _sample_keys(reader) if root / name in reader.files(*key))
            processing = Processing(modalities, 16, "normals", reader.height_range, reader.object_height, 3)
            processing(reader.read(*key))
        finally:
            (root / name).write_bytes(files[name])

    return Target(files, read)


def _sample_keys(reader: Reader) -> Iterator[tuple[str, Split, str]]:
    for name in reader.objects:
        for split in get_args(Split):
            for id_ in reader.ids(name, split):
                yield name, split, id_


def _eyecandies_files() -> dict[str, bytes]:
    z = np.where(CLOUD[..., 2] > 0, CLOUD[..., 2], 0.5)
    levels = np.round((z - z.min()) / (z.max() - z.min()) * 65535).astype(np.uint16)
    flags = ("anomalous", *(f"anomalous_{kind}" for kind in ("bumps", "dents", "colors", "normals")))
    files = {}
    for split in ("train", "val", "test_public"):
        anomalous = split == "test_public"
        files |= {
            f"Confetto/{split}/data/00_{name}": content
            for name, content in {
                "image_4.png": _encode(RGB, "PNG"),
                "depth.png": _encode(levels, "PNG"),
                "normals.png": _encode(np.full((HEIGHT, WIDTH, 3), (128, 128, 255), np.uint8), "PNG"),
                "mask.png": _encode(MASK * anomalous, "PNG"),
                "info_depth.yaml": yaml.safe_dump(
                    {"normalization": {"max": float(z.max()), "min": float(z.min())}}
                ).encode(),
                "metadata.yaml": yaml.safe_dump(
                    {flag: int(anomalous and flag in flags[:2]) for flag in flags}
                ).encode(),
            }.items()
        }
    return files


def eyecandies(folder: Path) -> Target:
    """Return a target that reads Eyecandies with a mutated file."""
    return _dataset(folder, _eyecandies_files(), lambda root: Eyecandies(root, "Confetto", normals=True))


def mvtec3d(folder: Path) -> Target:
    """Return a target that reads MVTec 3D-AD with a mutated file."""
    files = {}
    for images_folder in ("train/good", "validation/good", "test/good", "test/hole"):
        files[f"bagel/{images_folder}/rgb/000.png"] = _encode(RGB, "PNG")
        files[f"bagel/{images_folder}/xyz/000.tiff"] = test_depth_files.tiff(CLOUD)
        files[f"bagel/{images_folder}/gt/000.png"] = _encode(MASK * (images_folder == "test/hole"), "PNG")
    return _dataset(folder, files, lambda root: MVTec3D(root, "bagel", needs_depth=True))


def folder_files() -> dict[str, bytes]:
    files = {"dataset.yaml": b"unit: 0.0001\ncamera: {fx: 40, fy: 40.5, cx: 15.5, cy: 11.5}\nobject_height: 0.004\n"}
    for images_folder in ("train/good", "val/good", "test/good", "test/scratch", "unlabelled"):
        files[f"bolt/{images_folder}/rgb/a b.png"] = _encode(RGB, "PNG")
        files[f"bolt/{images_folder}/depth/a b.png"] = _encode(LEVELS, "PNG")
    files["bolt/test/scratch/mask/a b.png"] = _encode(MASK, "PNG")
    return files


def height_maps(folder: Path) -> Target:
    """Return a target that reads height maps without photographs, with a mutated file."""
    files = {"dataset.yaml": b"kind: height\npitch: [0.1, 0.25]\nunit: 0.5e-6\nmissing: [-9999]\n"}
    for images_folder in ("train/good", "test/good", "unlabelled"):
        files[f"part/{images_folder}/depth/a b.png"] = _encode(LEVELS, "PNG")
    return _dataset(folder, files, lambda root: Folder(root, needs_depth=True), ("depth",))


def aligned(folder: Path) -> Target:
    """Return a target that reads custom objects, whose depth is of another camera, with a mutated file."""
    settings = (
        b"unit: 0.0001\ncamera: {fx: 40, fy: 40.5, cx: 15.5, cy: 11.5}\n"
        b"align:\n  camera: {fx: 20, fy: 20, cx: 7, cy: 5}\n"
        b"  matrix: [[1, 0, 0, 0.01], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]\n"
    )
    files = folder_files() | {"dataset.yaml": settings}
    return _dataset(folder, files, lambda root: Folder(root, needs_depth=True))


def folder(folder: Path) -> Target:
    """Return a target that reads custom objects with a mutated file."""
    return _dataset(folder, folder_files(), lambda root: Folder(root, needs_depth=True))


_NAMES = (
    "..",
    "good",
    "depth",
    "rgb",
    "train",
    "test",
    "0",
    "00_x.png",
    "a\nb",
    ".hidden",
    "Ω",
    "b.PNG",
    "x" * 300,
    "",
    "OK",
    "normal",
    "ground_truth",
    "mask",
    "00_x_mask.png",
    "__MACOSX",
    "a b_depth.png",
    "a b_rgb.png",
    "0_color.png",
    "0_depth.png",
)


def _disarrange(paths: list[Path], draw: Iterator[int]) -> None:
    """Make one random change to a tree, unless the system refuses it."""
    path, other = paths[(next(draw) * 256 + next(draw)) % len(paths)], paths[next(draw) % len(paths)]
    with contextlib.suppress(OSError, ValueError):
        new = path.with_name(_NAMES[next(draw) % len(_NAMES)]) if next(draw) % 2 else other
        match next(draw) % 6:
            case 0:
                path.rename(new)
            case 1:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            case 2:
                new.symlink_to(path.name)
            case 3:
                new.symlink_to("/etc")
            case 4:
                os.mkfifo(new)
            case 5:
                new.mkdir()


def _mvtec_files() -> dict[str, bytes]:
    photograph = _encode(RGB, "PNG")
    files = {f"bolt/{path}.png": photograph for path in ("train/good/0", "test/good/0", "test/cut/0", "test/dent/a/0")}
    masks = {f"bolt/ground_truth/{path}_mask.png": _encode(MASK, "PNG") for path in ("cut/0", "dent/a/0")}
    return files | masks


def _visa_files() -> dict[str, bytes]:
    images = {f"bolt/Data/Images/{path}.JPG": _encode(RGB, "JPEG") for path in ("Normal/0", "Normal/1", "Anomaly/0")}
    rows = [f"bolt,{split},normal,bolt/Data/Images/Normal/{i}.JPG," for i, split in enumerate(("train", "test"))]
    table = "\r\n".join(["object,split,label,image,mask", *rows]).encode()
    return images | {"bolt/Data/Masks/Anomaly/0.png": _encode(MASK, "PNG"), "split_csv/1cls.csv": table}


def visa(folder: Path) -> Target:
    """Return a target that reads VisA with a mutated table, or with settings in place of one."""
    root, files = folder / "dataset", _visa_files()
    table = "split_csv/1cls.csv"
    settings = "normal: Data/Images/Normal\nabnormal: [Data/Images/Anomaly]\nmasks: Data/Masks/Anomaly\nbits: 12\n"
    seeds = {table: files[table], "dataset.yaml": settings.encode()}

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(root, ignore_errors=True)
        write(root, files | {name: content})
        reader = Folder(root)
        for key in _sample_keys(reader):
            reader.read(*key)

    return Target(seeds, read)


def layout(folder: Path) -> Target:
    """Return a target that reads datasets whose files and folders are renamed, removed, linked or moved."""
    templates: dict[str, tuple[dict[str, bytes], Callable[[Path], Reader]]] = {
        "eyecandies": (_eyecandies_files(), lambda root: Eyecandies(root, "Confetto")),
        "folder": (folder_files(), lambda root: Folder(root)),
        "mvtec": (_mvtec_files(), lambda root: Folder(root)),
        "visa": (_visa_files(), lambda root: Folder(root)),
    }

    def read(name: str, content: bytes) -> None:
        files, open_ = templates[name]
        root = folder / "dataset"
        shutil.rmtree(root, ignore_errors=True)
        write(root, files)
        draw = iter(content[:200])  # changing a tree takes longer than reading it
        with contextlib.suppress(StopIteration):
            while paths := sorted(root.rglob("*")):
                _disarrange(paths, draw)
        reader = open_(root)
        for key in _sample_keys(reader):
            reader.read(*key)

    seeds = {name: bytes(range(7, 28)) for name in templates}
    return Target(seeds, read)


def store(folder: Path) -> Target:
    """Return a target that reads a prepared set with a mutated file, which must lead to the original arrays."""
    root, prepared = folder / "dataset", folder / "prepared"
    write(root, folder_files())
    processing = Processing(("rgb", "depth"), 16, "height", 0.1, 0.005, 3)

    def get(split: str) -> list[np.ndarray]:
        prepared_set = Store(prepared, Folder(root), processing, lambda x: x.reshape(len(x), 4, 4, -1), {}).get(
            "bolt", split
        )
        batch, truth = prepared_set.batch, prepared_set.truth or ()
        return [*batch.features.values(), *batch.images.values(), *truth]

    expected = {split: [np.array(array) for array in get(split)] for split in ("train", "test")}
    files = {str(file.relative_to(prepared)): file.read_bytes() for file in prepared.rglob("*") if file.is_file()}
    seeds = {name: content for name, content in files.items() if not name.endswith("lock")}
    home = next(iter(seeds)).partition("/")[0]
    seeds[f"{home}/{next(prepared.rglob('rows-*')).name}/journal"] = b"\n0badf00d [0, 1, {}]\n"

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(prepared)
        write(prepared, files | {name: content})
        with contextlib.redirect_stderr(io.StringIO()):  # warnings about damaged images
            for split, arrays in expected.items():
                for array, original in zip(get(split), arrays, strict=True):
                    np.testing.assert_array_equal(array, original)

    return Target(seeds, read)


# ---- archives, weights ----


def archive(folder: Path) -> Target:
    """Return a target that unpacks archives in every format; nothing may be written outside of the target folder."""
    seeds = {}
    for kind in test_archives.FORMATS:
        file = test_archives.write(folder / f"a.{kind}", test_archives.FILES.items())
        seeds[file.name] = file.read_bytes()
        file.unlink()

    def read(name: str, content: bytes) -> None:
        inside = folder / "inside"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        (inside / name).write_bytes(content)
        try:
            unpack(inside / name, inside / "root", test_archives.LIMITS)
        finally:
            assert {path.name for path in inside.iterdir()} <= {name, "root", "root.lock"}
            assert [path.name for path in folder.iterdir()] == ["inside"]
            size = sum(path.stat().st_size for path in (inside / "root").rglob("*"))
            assert size <= test_archives.LIMITS.bytes + 2**20
            assert not any(path.is_symlink() for path in inside.rglob("*"))

    return Target(seeds, read)
