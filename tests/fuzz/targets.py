"""What reads files, flags and folders that need not be trusted, each with valid inputs to start from."""

import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import yaml
from absl import flags
from PIL import Image

from iumad_jax import cli, continual, methods, protocol
from iumad_jax import config as configs
from iumad_jax.data import readers
from iumad_jax.data.formats.archives import unpack
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.formats.images import read_mask, read_photograph
from iumad_jax.data.prepared import inventory
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.data.sample import Reader, Split
from iumad_jax.models import pretrained
from iumad_jax.report import history, samples, tables
from iumad_jax.report.history import History
from iumad_jax.runtime import ledger, live, snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.progress import BEGINNING, Position
from iumad_jax.runtime.snapshots import Snapshots
from iumad_jax.shapes import Calibration
from iumad_jax.training.optimization import learning_rates, make_optimizer, of_step
from tests.data.formats import test_archives, test_depth_files
from tests.models import test_pretrained

HEIGHT, WIDTH = 24, 32
CONFIG = Path(__file__).parents[2] / "configs" / "folder.py"


@dataclass(frozen=True)
class Target:
    """A part of the code.

    Attributes:
        seeds: valid inputs, by name.
        read: (name, content): has the code read a changed input; returns, or raises UserError.
    """

    seeds: dict[str, bytes]
    read: Callable[[str, bytes], None]


# ---- a dataset ----


def _scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB, an organised cloud in metres with holes, and a mask of a box on a plane."""
    rng = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    z = 0.5 + 2e-4 * rng.standard_normal((HEIGHT, WIDTH))
    z[8:16, 8:20] -= 0.03
    z[rng.random(z.shape) < 0.05] = 0
    cloud = np.stack([(columns - 15.5) / 40 * z, (rows - 11.5) / 40 * z, z], -1).astype(np.float32)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:13, 10:14] = 255
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8), cloud, mask


def _encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


RGB, CLOUD, MASK = _scene()
LEVELS = np.round(CLOUD[..., 2] * 10_000).astype(np.uint16)


def images(folder: Path) -> Target:
    """Photographs and masks of every kind."""
    grey = RGB[..., 0]
    seeds = {
        "rgb.png": _encoded(RGB, "PNG"),
        "levels.png": _encoded(LEVELS, "PNG"),
        "rgb.jpg": _encoded(RGB, "JPEG"),
        "progressive.jpg": _encoded(RGB, "JPEG", progressive=True),
        "grey.bmp": _encoded(grey, "BMP"),
        "rgb.tiff": _encoded(RGB, "TIFF"),
        "lzw.tiff": _encoded(RGB, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": _encoded(RGB, "TIFF", compression="tiff_deflate"),
        "jpeg.tiff": _encoded(RGB, "TIFF", compression="jpeg"),
        "mask.png": _encoded(MASK, "PNG"),
    }

    def read(name: str, content: bytes) -> None:
        file = folder / name
        file.write_bytes(content)
        (read_mask if name.startswith("mask") else read_photograph)(file)

    return Target(seeds, read)


def depth(folder: Path) -> Target:
    """Depth images and clouds of every format."""
    encoders = [*test_depth_files.FORMATS.values(), ("png", test_depth_files.png)]
    seeds = {f"{i}.{ending}": encode(CLOUD) for i, (ending, encode) in enumerate(encoders)}
    seeds["deflated.tiff"] = test_depth_files.tiff(CLOUD[..., 2], compression="zlib")
    seeds["tiles.tiff"] = test_depth_files.tiff(CLOUD[..., 2], tile=(16, 16))

    def read(name: str, content: bytes) -> None:
        file = folder / name
        file.write_bytes(content)
        read_depth(file, 0.0001 if name.endswith(".png") else 1.0, (HEIGHT, WIDTH), "give the unit")

    return Target(seeds, read)


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _dataset(folder: Path, files: dict[str, bytes], open_: Callable[[Path], Reader]) -> Target:
    """A dataset with one file changed, opened, and the sample that the file belongs to read and processed."""
    root = folder / "dataset"
    _write(root, files)

    def read(name: str, content: bytes) -> None:
        (root / name).write_bytes(content)
        try:
            reader = open_(root)
            which = next(one for one in _samples(reader) if root / name in reader.files(*one))
            processing = Processing(("rgb", "depth"), 16, "normals", reader.height_range, reader.object_height, 3)
            processing(reader.read(*which))
        finally:
            (root / name).write_bytes(files[name])

    return Target(files, read)


def _samples(reader: Reader) -> Iterator[tuple[str, Split, str]]:
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
        bad = split == "test_public"
        files |= {
            f"Confetto/{split}/data/00_{name}": content
            for name, content in {
                "image_4.png": _encoded(RGB, "PNG"),
                "depth.png": _encoded(levels, "PNG"),
                "normals.png": _encoded(np.full((HEIGHT, WIDTH, 3), (128, 128, 255), np.uint8), "PNG"),
                "mask.png": _encoded(MASK * bad, "PNG"),
                "info_depth.yaml": yaml.safe_dump(
                    {"normalization": {"max": float(z.max()), "min": float(z.min())}}
                ).encode(),
                "metadata.yaml": yaml.safe_dump({flag: int(bad and flag in flags[:2]) for flag in flags}).encode(),
            }.items()
        }
    return files


def eyecandies(folder: Path) -> Target:
    """Eyecandies with a changed file."""
    return _dataset(folder, _eyecandies_files(), lambda root: Eyecandies(root, "Confetto", normals=True))


def mvtec3d(folder: Path) -> Target:
    """MVTec 3D-AD with a changed file."""
    files = {}
    for place in ("train/good", "validation/good", "test/good", "test/hole"):
        files[f"bagel/{place}/rgb/000.png"] = _encoded(RGB, "PNG")
        files[f"bagel/{place}/xyz/000.tiff"] = test_depth_files.tiff(CLOUD)
        files[f"bagel/{place}/gt/000.png"] = _encoded(MASK * (place == "test/hole"), "PNG")
    return _dataset(folder, files, lambda root: MVTec3D(root, "bagel", needs_depth=True))


def _folder_files() -> dict[str, bytes]:
    files = {"dataset.yaml": b"unit: 0.0001\ncamera: {fx: 40, fy: 40.5, cx: 15.5, cy: 11.5}\nobject_height: 0.004\n"}
    for place in ("train/good", "val/good", "test/good", "test/scratch", "unlabelled"):
        files[f"bolt/{place}/rgb/a b.png"] = _encoded(RGB, "PNG")
        files[f"bolt/{place}/depth/a b.png"] = _encoded(LEVELS, "PNG")
    files["bolt/test/scratch/mask/a b.png"] = _encoded(MASK, "PNG")
    return files


def folder(folder: Path) -> Target:
    """One's own objects with a changed file; dataset.yaml as often as all others together."""
    return _dataset(folder, _folder_files(), lambda root: Folder(root, needs_depth=True))


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
)


def _disarrange(paths: list[Path], draw: Iterator[int]) -> None:
    """One change of a tree, if the system lets it be done."""
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


def layout(folder: Path) -> Target:
    """Datasets whose files and folders have been renamed, removed, linked and put elsewhere."""
    templates: dict[str, tuple[dict[str, bytes], Callable[[Path], Reader]]] = {
        "eyecandies": (_eyecandies_files(), lambda root: Eyecandies(root, "Confetto")),
        "folder": (_folder_files(), lambda root: Folder(root)),
    }

    def read(name: str, content: bytes) -> None:
        files, open_ = templates[name]
        root = folder / "dataset"
        shutil.rmtree(root, ignore_errors=True)
        _write(root, files)
        draw = iter(content[:200])  # what takes long is to change a tree, not to read it
        with contextlib.suppress(StopIteration):
            while paths := sorted(root.rglob("*")):
                _disarrange(paths, draw)
        reader = open_(root)
        for which in _samples(reader):
            reader.read(*which)

    seeds = {name: bytes(range(7, 28)) for name in templates}
    return Target(seeds, read)


def store(folder: Path) -> Target:
    """A prepared set with a changed file, which must lead to the same images as before."""
    root, prepared = folder / "dataset", folder / "prepared"
    _write(root, _folder_files())
    processing = Processing(("rgb", "depth"), 16, "height", 0.1, 0.005, 3)

    def get(split: str) -> list[np.ndarray]:
        found = Store(prepared, Folder(root), processing, lambda x: x.reshape(len(x), 4, 4, -1), {}).get("bolt", split)
        return [*found.batch.features.values(), *found.batch.images.values(), *(found.truth or ())]

    expected = {split: [np.array(array) for array in get(split)] for split in ("train", "test")}
    files = {str(file.relative_to(prepared)): file.read_bytes() for file in prepared.rglob("*") if file.is_file()}
    seeds = {name: content for name, content in files.items() if not name.endswith("lock")}
    home = next(iter(seeds)).partition("/")[0]
    seeds[f"{home}/{next(prepared.rglob('rows-*')).name}/journal"] = b"\n0badf00d [0, 1, {}]\n"

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(prepared)
        _write(prepared, files | {name: content})
        with contextlib.redirect_stderr(io.StringIO()):  # that images are damaged
            for split, arrays in expected.items():
                for one, other in zip(get(split), arrays, strict=True):
                    np.testing.assert_array_equal(one, other)

    return Target(seeds, read)


# ---- archives, weights ----


def archive(folder: Path) -> Target:
    """Archives of every format; nothing may appear outside of the folder that they are unpacked to."""
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


def weights(folder: Path) -> Target:
    """Both kinds of .pth, and .safetensors."""
    stored = {"0": np.arange(24, dtype=np.float32).tobytes()}
    whole = test_pretrained.storage("0", 24)
    views = {
        "rows": test_pretrained.tensor(whole, 0, (4, 6), (6, 1)),
        "turned": test_pretrained.tensor(whole, 2, (2, 3), (1, 6)),
        "scalar": test_pretrained.tensor(whole, 5, (), ()),
    }
    content = test_pretrained.state_dict(**views)
    seeds = {
        "zip.pth": test_pretrained.zipped(content, stored),
        "legacy.pth": test_pretrained.legacy(content, stored),
        "x.safetensors": safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.arange(4)}),
    }

    def read(name: str, content: bytes) -> None:
        for array in pretrained.parse(content, Path(name)).values():
            array.sum()  # all of it lies in memory that is there

    return Target(seeds, read)


# ---- flags, and what runs leave ----


def config(folder: Path) -> Target:
    """--config.KEY=VALUE, one flag per line, as far as a run checks them before it writes anything."""
    root, files = folder / "dataset", _folder_files()
    _write(root, files)
    for number in range(4):  # as many as a batch
        for kind in ("rgb", "depth"):
            _write(root, {f"bolt/train/good/{kind}/{number}.png": files[f"bolt/train/good/{kind}/a b.png"]})
    keys = list(_flat(configs.paper("1-0").to_dict()).items())
    lines = [
        f"--config.{key}={value}"
        for key, value in keys
        if key not in ("dataset.root", "dataset.name", "train.batch_size")
    ]
    seeds = {str(i): "\n".join(lines[i : i + 3]).encode() for i in range(0, len(lines), 3)}
    always = (f"--config={CONFIG}:1-0", f"--config.dataset.root={root}", "--config.train.batch_size=4")

    def define(values: flags.FlagValues) -> None:
        cli.define_config(values)
        cli.define_workdir(values)

    def act(values: flags.FlagValues) -> str:
        config, _ = cli.given_config(values)
        if config.dataset.name != "candies":  # which would be rendered
            configs.check(config)
            objects = readers.objects(config)
            protocol.steps(config.protocol, objects)
            method = methods.systems(config, len(objects))[config.method]
            continual.build(config, method, len(objects))
            for step in (0, 1):
                make_optimizer(of_step(config, step))
            learning_rates(config.train, updates_per_epoch=1)
            readers.open_reader(config)
            live.check(config.report.tensorboard)
        return ""

    def read(name: str, content: bytes) -> None:
        lines = content.decode("utf8", "surrogateescape").split("\n")
        given = [line for line in lines if line.startswith("--config.") and "\0" not in line]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            sys.argv, before = ["main", *always, *given], sys.argv  # ml_collections looks there for keys
            try:
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # also its
                    code = cli.execute("", sys.argv, define, act)
            finally:
                sys.argv = before
        if code:
            raise cli.UserError(errors.getvalue().removesuffix("\n"))

    return Target(seeds, read)


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def ledger_(folder: Path) -> Target:
    """A ledger, read and opened to go on."""
    file = folder / "ledger.jsonl"
    written = ledger.Ledger(file)
    written.append("step", step=0, learned=["bolt"], images=3)
    for epoch in range(4):
        written.append("epoch", step=0, epoch=epoch, loss=0.1 * epoch, gradient_norm=1.0)
    written.append("evaluation", step=0, object="bolt", method="ib_iumad", i_auroc=0.9, aupro=None)

    def read(name: str, content: bytes) -> None:
        file.write_bytes(content)
        opened = ledger.Ledger(file)
        events = ledger.read(file)
        assert len(opened) == len(events)
        opened.append("end")
        assert ledger.read(file)[:-1] == events or events != events  # NaN

    return Target({file.name: file.read_bytes()}, read)


def workdir(folder: Path) -> Target:
    """What a finished run is read from: its config, its results, the samples of its report."""
    config = configs.small("1-1")
    with workdirs.claimed(folder, config):
        pass
    matrix = {metric: [[0.9, float("nan")], [0.8, 0.7]] for metric in tables.METRICS}
    decided = {"objects": {}, "unknown": {"threshold": 1.0}, "usual": 1.0}
    matrices = dict.fromkeys(("ib_iumad", "feature_norm"), matrix)
    told = History((("a",), ("b",)), matrices, [decided] * 2, dict.fromkeys(matrices, 8), 0)
    results = history.results(config.to_dict(), told, 1.0)
    tables.write_results(folder, results)
    rng = np.random.default_rng(0)
    maps, masks = rng.random((3, 224, 224)).astype(np.float32), np.zeros((3, 224, 224), bool)
    masks[1:, :9, :9] = True
    kept = samples.summarise(
        "abc", ("good", "x", "x"), [0, 1, 1], masks, {"m": [1.0, 2.0, 3.0]}, {"m": maps}, [0, 1, 0], [3] * 3
    )
    samples.save(folder, 0, "bolt", kept)
    noted = {"bolt": {"train": {"000": "ab", "001": None}, "test": {}}}
    (folder / "dataset.json").write_text(json.dumps(noted))
    names = ("config.json", "dataset.json", "results.json", "samples/step0_bolt.npz")
    seeds = {name: (folder / name).read_bytes() for name in names}

    def read(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        match name:
            case "config.json":
                found = workdirs.read(folder)
                methods.systems(found, 2)
                workdirs.check(folder, config)
            case "dataset.json":
                inventory.Names.of(inventory.read(folder), ["nut"], lambda names: readers.open_reader(config, names))
            case "results.json":
                found = tables.read_results(folder)
                tables.console(found, folder)
            case _:
                samples.load(folder, 0, "bolt")

    return Target(seeds, read)


def snapshot(folder: Path) -> Target:
    """A snapshot: what it holds is what was saved, or it is refused; also one whose hashes were made to fit."""
    variables = {"ib_iumad": {"params": {"kernel": np.arange(600, dtype=np.float32)}, "statistics": {}}}
    scores = np.float32([0.5, 0.25])
    saved = BEGINNING._replace(
        position=Position(0, 0, finished=True),
        objects=("bolt", "nut"),
        variables=variables,
        recognition={"count": np.ones(1, np.float32)},
        calibration={"bolt": Calibration(scores, scores, np.float32([[1, 1, np.inf]] * 2))},
        strategy={"old": {"kernel": np.ones(3, jnp.bfloat16)}, "by_object": ({"mean": np.ones(4, np.float16)},)},
        seconds=2.5,
    )
    original = folder / "original"
    with contextlib.closing(Snapshots(original)) as written:
        written.save(saved)
    files = {str(file.relative_to(original)): file.read_bytes() for file in original.rglob("*") if file.is_file()}
    damaged = folder / "run"

    def read(name: str, content: bytes) -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(original, damaged)
        kind, _, file = name.partition(" ")
        (damaged / file).write_bytes(content)
        if kind == "forged":
            folder = damaged / "snapshots" / "0"
            (folder / snapshots.MANIFEST).write_text(json.dumps(snapshots.hashes(folder)))
            snapshots.read(damaged)
        else:
            jax.tree.map(np.testing.assert_array_equal, snapshots.read(damaged), saved)

    kinds = ("damaged", "forged")
    return Target({f"{kind} {name}": content for kind in kinds for name, content in files.items() if content}, read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "images": images,
    "depth": depth,
    "eyecandies": eyecandies,
    "mvtec3d": mvtec3d,
    "folder": folder,
    "layout": layout,
    "store": store,
    "archive": archive,
    "weights": weights,
    "config": config,
    "ledger": ledger_,
    "workdir": workdir,
    "snapshot": snapshot,
}
