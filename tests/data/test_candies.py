"""The embedded dataset: its files compared with real ones, and its pictures with independently computed geometry."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from iumad_jax.data.candies import OBJECTS, draw, render
from iumad_jax.data.candies.__main__ import main
from iumad_jax.data.candies.dataset import defect_kinds, draw_sample, material, write_sample
from iumad_jax.data.candies.defects import KINDS, NO_DEFECTS
from iumad_jax.data.candies.scene import FOCAL, PLATE, POSE, compile_geometry_pass, lighting_pass
from iumad_jax.data.candies.sweets import SWEETS
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.errors import UserError
from tests import sentences

pytestmark = pytest.mark.slow

SIZE = 96
SMALL = {"seed": 3, "train": 2, "val": 1, "test": 10, "size": SIZE, "objects": "CandyCane,GummyBear", "progress": False}
REAL_SETS = {"train": ("000", "001"), "test_public": ("05", "06", "13", "26", "43")}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("candies") / "root", **SMALL)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def read(directory: Path, prefix: str) -> dict:
    """Read all files of a sample, by name: PNG and TXT files as arrays, YAML files as mappings."""
    files = {}
    for path in sorted(directory.glob(f"{prefix}_*")):
        name = path.stem.removeprefix(f"{prefix}_")
        match path.suffix:
            case ".png":
                files[name] = np.asarray(Image.open(path))
            case ".yaml":
                files[name] = yaml.safe_load(path.read_text())
            case _:
                files[name] = np.loadtxt(path)
    return files


def points_of(files: dict) -> np.ndarray:
    """Compute the world coordinates (h, w, 3) of all pixels from depth, focal length and pose, in float64."""
    limits = files["info_depth"]["normalization"]
    depth = files["depth"] / 65535 * (limits["max"] - limits["min"]) + limits["min"]
    size = len(depth)
    row, column = np.mgrid[:size, :size]
    focal, centre = 711.11 * size / 512, (size - 1) / 2
    camera = np.stack([(column - centre) * depth / focal, (centre - row) * depth / focal, -depth], -1)
    return camera @ files["pose"][:3, :3].T + files["pose"][:3, 3]


# ---- the files -----------------------------------------------------------------------------------------------------


def test_a_sample_has_the_same_kinds_of_files_as_real_ones(root, eyecandies_root):
    for split, prefixes in REAL_SETS.items():
        real_folder = eyecandies_root / "CandyCane" / split / "data"
        rendered_folder = root / "CandyCane" / split / "data"
        for prefix in prefixes:
            real = {p.name.removeprefix(prefix): p for p in real_folder.glob(f"{prefix}_*")}
            rendered = {p.name[len(prefix) :]: p for p in rendered_folder.glob(f"{'1'.zfill(len(prefix))}_*")}
            assert rendered.keys() == real.keys()
            assert len(rendered) == 17
            for name, path in real.items():
                if path.suffix == ".png":
                    a, b = Image.open(path), Image.open(rendered[name])
                    assert (a.mode, a.format) == (b.mode, b.format), name
                    assert np.asarray(a).dtype == np.asarray(b).dtype
                elif path.suffix == ".yaml":
                    a, b = (yaml.safe_load(p.read_text()) for p in (path, rendered[name]))
                    assert list(a) == list(b), name
                    for key in a.keys() - {"object"}:  # the parameters in it depend on the object
                        assert type(a[key]) is type(b[key])
                        assert not isinstance(a[key], dict) or a[key].keys() == b[key].keys()
                else:
                    np.testing.assert_allclose(np.loadtxt(rendered[name]), np.loadtxt(path), atol=1e-12)


def test_values_have_the_same_meaning_as_in_real_files(root, eyecandies_root):
    real = read(eyecandies_root / "CandyCane" / "test_public" / "data", "26")
    rendered = read(root / "CandyCane" / "test_public" / "data", "01")
    for files in (real, rendered):
        assert (files["depth"].min(), files["depth"].max()) == (0, 65535)
        assert set(np.unique(files["mask"])) == {0, 255}
        kinds = np.any([files[f"{kind}_mask"] > 0 for kind in KINDS], axis=0)
        np.testing.assert_array_equal(files["mask"] > 0, kinds)
        flags = [files["metadata"][f"anomalous_{kind}"] for kind in KINDS]
        assert flags == [int(files[f"{kind}_mask"].any()) for kind in KINDS]
        assert files["metadata"]["anomalous"] == max(flags)
        assert 2.2 < files["info_depth"]["normalization"]["min"] < 2.4
        assert 4.8 < files["info_depth"]["normalization"]["max"] < 5.1
        # Normals in the camera's frame: x right, y up, z towards the camera.
        points = points_of(files)
        across = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
        from_depth = across / np.linalg.norm(across, axis=-1, keepdims=True) @ files["pose"][:3, :3]
        written = files["normals"] / 127.5 - 1
        assert np.median(np.abs(from_depth - written)) < 0.01


def test_ids_and_labels(root):
    reader = Eyecandies(root, "GummyBear")
    assert reader.ids("GummyBear", "train") == ("000", "001")
    assert reader.ids("GummyBear", "calibration") == ("00",)
    test = [reader.read("GummyBear", "test", i) for i in reader.ids("GummyBear", "test")]
    assert [s.anomalous for s in test] == [False, True] * 5
    assert sorted(s.defect for s in test[1::2]) == ["bumps", "colors", "combined", "dents", "normals"]
    assert all(s.mask.any() == s.anomalous for s in test)


def test_defect_kinds_are_equally_frequent_in_the_default_test_split():
    kinds = [defect_kinds(name, "test_public", i) for name in OBJECTS for i in range(16)]
    assert kinds.count(()) == 80
    assert {kind: kinds.count(kind) for kind in {*kinds} - {()}} == {**{(k,): 16 for k in KINDS}, KINDS: 16}
    assert not any(defect_kinds(name, split, i) for name in OBJECTS for split in ("train", "val") for i in range(24))


def test_lights_differ_and_the_default_light_is_bright_enough(root):
    files = read(root / "GummyBear" / "train" / "data", "000")
    brightness = [files[f"image_{light}"].mean() for light in range(6)]
    assert max(brightness[1:4]) < min(brightness[0], brightness[4], brightness[5])
    assert brightness[4] > 70
    assert len({files[f"image_{light}"].tobytes() for light in range(6)}) == 6


# ---- reproducibility and resuming ----------------------------------------------------------------------------------


def test_a_sample_depends_only_on_seed_object_split_and_index(root, tmp_path):
    write_sample(tmp_path, 1, 3, SIZE, "GummyBear", "test_public", 5)
    files = contents(tmp_path)
    assert len(files) == 17
    assert all((root / path).read_bytes() == data for path, data in files.items())
    instances = {
        tuple(draw_sample(1, seed, SIZE, name, split, index)[2].shape)
        for seed, name, split, index in (
            (3, "GummyBear", "train", 0),
            (4, "GummyBear", "train", 0),
            (3, "CandyCane", "train", 0),
            (3, "GummyBear", "val", 0),
            (3, "GummyBear", "train", 1),
        )
    }
    assert len(instances) == 5


def test_an_interrupted_rendering_resumes_and_creates_the_dataset_only_when_complete(root, tmp_path):
    unfinished = tmp_path / "root.partial"
    shutil.copytree(root, unfinished)
    data = unfinished / "GummyBear" / "test_public" / "data"
    modified = (data / "08_depth.png").stat().st_mtime_ns
    (data / "09_metadata.yaml").unlink()  # written last: without it, the sample is incomplete
    (data / "09_image_2.png").write_bytes((data / "09_image_2.png").read_bytes()[:100])
    obstacle = data / "09_depth.png"
    obstacle.unlink()
    obstacle.mkdir()  # stops the run, as a full disk would
    with pytest.raises(UserError, match=sentences.CANDIES_NOT_WRITTEN.format(r"09_depth\.png")):
        render(tmp_path / "root", **SMALL)
    assert not (tmp_path / "root").exists()
    obstacle.rmdir()
    render(tmp_path / "root", **SMALL)
    assert contents(tmp_path / "root") == contents(root)
    assert (tmp_path / "root/GummyBear/test_public/data/08_depth.png").stat().st_mtime_ns == modified
    assert not unfinished.exists()


def test_a_complete_dataset_is_left_unchanged(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    render(root, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 4}, sentences.CANDIES_OF_OTHER_SETTINGS.format("seed")),
        ({"train": 3, "objects": "all"}, sentences.CANDIES_OF_OTHER_SETTINGS.format("train, objects")),
        ({"objects": "CandyCane,Gummibear"}, sentences.CANDIES_UNKNOWN_OBJECT.format("Gummibear")),
        ({"size": 32}, sentences.CANDIES_NUMBER_OUT_OF_RANGE.format(key="size", found=32, least=64, most=1024)),
        ({"version": 2}, sentences.CANDIES_OF_OTHER_SETTINGS.format("renderer")),
        ({"version": 3}, sentences.CANDIES_UNKNOWN_VERSION.format(found=3, known="1, 2")),
        ({"test": 0}, sentences.CANDIES_NUMBER_OUT_OF_RANGE.format(key="test", found=0, least=1, most=100)),
        ({"seed": -1}, sentences.CANDIES_NUMBER_OUT_OF_RANGE.format(key="seed", found=-1, least=0, most=4294967295)),
    ],
)
def test_bad_settings_are_refused_and_files_are_left_unchanged(root, change, sentence):
    before = contents(root)
    with pytest.raises(UserError, match=sentence):
        render(root, **{**SMALL, **change})
    assert contents(root) == before


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=sentences.CANDIES_MISSING):
        render(tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], sentences.SEE_HELP.format("the following arguments are required: --root")),
        (["--root=a", "--size=big"], sentences.SEE_HELP.format("argument --size: invalid int value: 'big'")),
        (["--root=a", "--objects=Toffee"], sentences.CANDIES_UNKNOWN_OBJECT.format("Toffee")),
        (["--root=a", "--version=3"], sentences.CANDIES_UNKNOWN_VERSION.format(found=3, known="1, 2")),
    ],
)
def test_the_command_reports_a_mistake_in_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["candies", *flags])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- rendered content ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split", "prefix"), [("CandyCane", "train", "000"), ("GummyBear", "val", "00")])
def test_the_belt_is_a_plane_to_a_millimetre(root, name, split, prefix):
    height = points_of(read(root / name / split / "data", prefix))[..., 2]
    on_belt, on_plate = np.abs(height) < 1e-3, np.abs(height - PLATE) < 1e-3
    sweet = height > 8e-3
    assert on_belt.mean() > 0.5
    assert 0.03 < sweet.mean() < 0.25
    assert (on_belt | on_plate | sweet).mean() > 0.995
    assert height.max() < 0.6
    assert not sweet.sum() - sweet[2:-2, 2:-2].sum()  # the sweet does not touch the border


@pytest.mark.parametrize("name", OBJECTS)
def test_depth_agrees_with_a_search_along_the_ray(name):
    """The search advances in 4 mm steps and uses only the sign of the distance."""
    size, sweet = 64, SWEETS[name]
    rng = np.random.default_rng(7)
    look = draw.instance(sweet, draw.VERSIONS[1], rng)
    surface = compile_geometry_pass(name, size)(look, NO_DEFECTS)
    hit = np.asarray(surface.hit)
    assert 0.03 < hit.mean() < 0.25

    pixels = rng.choice(size * size, 256, replace=False)
    x, y = pixels % size - (size - 1) / 2, (size - 1) / 2 - pixels // size
    ray = POSE[:3, :3] @ np.stack([x / (FOCAL * size), y / (FOCAL * size), -np.ones(256)])
    depths = np.arange(1.5, 5.1, 0.004)
    world = POSE[:3, 3, None, None] + ray[:, :, None] * depths
    c, s = np.cos(look.rotation), np.sin(look.rotation)
    x, y = world[0] - look.position[0], world[1] - look.position[1]
    local = np.stack([c * x + s * y, c * y - s * x, world[2]]) / look.scale
    distance = np.asarray(sweet.distance(local.reshape(3, -1).astype(np.float32), look)).reshape(256, -1)
    inside = (distance < 0) & (world[2] > 0)
    entry = np.where(inside.any(1), depths[inside.argmax(1)], np.nan)
    hit = hit[pixels]
    disagree = hit != ~np.isnan(entry)
    assert disagree.mean() < 0.03  # grazing rays
    both = hit & ~disagree
    error = np.asarray(surface.depth)[pixels][both] - entry[both]
    assert np.percentile(error, 5) > -0.008
    assert np.percentile(error, 95) < 0.002


@pytest.mark.parametrize("index", [1, 3, 5, 7, 9])
def test_masks_cover_what_defects_change(index):
    """Only masked pixels differ from the same instance without defects, and each kind changes its own property."""
    name, seed = "CandyCane", 3
    bad, masks, look = draw_sample(1, seed, SIZE, name, "test_public", index)
    good = compile_geometry_pass(name, SIZE)(look, NO_DEFECTS)
    kinds = {kind for kind, mask in masks.items() if mask.any()}
    assert kinds == set(defect_kinds(name, "test_public", index))
    images, normals = {}, {}
    for key, surface in (("good", good), ("bad", bad)):
        image, normal = lighting_pass(surface, SWEETS[name].material, look, SIZE)
        images[key] = np.asarray(image, int).reshape(6, -1, 3)
        normals[key] = np.asarray(normal).reshape(-1, 3)
    nearer = np.asarray(good.depth) - np.asarray(bad.depth)
    bent = np.degrees(np.arccos(np.clip((normals["good"] * normals["bad"]).sum(1), -1, 1)))
    recoloured = np.abs(np.asarray(good.albedo) - np.asarray(bad.albedo)).max(0)
    geometry = masks["bumps"] | masks["dents"]
    masked = np.any(list(masks.values()), axis=0)

    assert np.abs(nearer[~geometry]).max() < 2e-3
    assert recoloured[~masked & np.asarray(good.hit)].max() < (0.1 if geometry.any() else 1e-6)
    assert np.percentile(bent[~masked], 99.9) < (3 if geometry.any() else 0.1)
    if kinds == {"bumps"}:
        assert np.median(nearer[masks["bumps"]]) > 5e-3
    if kinds == {"dents"}:
        assert np.median(nearer[masks["dents"]]) < -3e-3
    if kinds == {"colors"}:
        assert np.median(recoloured[masks["colors"]]) > 0.05
        assert bent.max() < 0.1
        assert not nearer.any()
    if kinds == {"normals"}:
        assert np.median(bent[masks["normals"]]) > 5
        assert not nearer.any()
    # The defect is visible in the default picture. Outside of the mask, only its shadow may be.
    change = np.abs(images["good"][4] - images["bad"][4]).max(-1)
    assert change[masked].mean() > 8
    assert (change[~masked] > 12).mean() < 0.01


def test_mask_sizes_are_within_limits(root, monkeypatch):
    constants = draw.VERSIONS[1]._replace(area=(0.0002, 0.06))  # defects with masks outside the limits are drawn again
    monkeypatch.setitem(draw.VERSIONS, 1, constants)
    masks = [draw_sample(1, seed, SIZE, "CandyCane", "test_public", 1)[1]["bumps"] for seed in range(20)]
    masks += [np.asarray(Image.open(p)) > 0 for p in root.glob("*/test_public/data/?[13579]_mask.png")]
    assert len(masks) == 30
    shares = [mask.mean() for mask in masks]
    assert min(shares) >= 0.0005
    assert max(shares) <= 0.03


def test_good_instances_vary_moderately_in_position_shape_and_colour():
    rng = np.random.default_rng(0)
    looks = [draw.instance(SWEETS["GummyBear"], draw.VERSIONS[1], rng) for _ in range(64)]
    for field in ("position", "rotation", "scale", "shape", "phase", "belt_shift"):
        values = np.stack([getattr(look, field) for look in looks])
        assert (values.std(0) > 0.01).all(), field
    assert np.abs([look.position for look in looks]).max() < 0.1
    colours = np.stack([look.palette[0] for look in looks])
    assert 0.01 < colours.std(0).max() < 0.15


# ---- version 2 -----------------------------------------------------------------------------------------------------


def image_change(version: int, index: int) -> float:
    """Return by how much the defect of a test sample changes the default picture within its mask, 0..255."""
    bad, masks, look = draw_sample(version, 3, SIZE, "CandyCane", "test_public", index)
    good = compile_geometry_pass("CandyCane", SIZE)(look, NO_DEFECTS)
    images = [np.asarray(lighting_pass(s, material(version, "CandyCane"), look, SIZE)[0][4], int) for s in (good, bad)]
    mask = np.any(list(masks.values()), axis=0).reshape(SIZE, SIZE)
    return np.abs(images[0] - images[1]).max(-1)[mask].mean()


def test_images_of_version_2_show_less_of_relief_and_stains_but_stains_remain_visible():
    relief, stain = (1, 3), 5
    assert sum(image_change(2, i) for i in relief) < 0.6 * sum(image_change(1, i) for i in relief)
    assert 20 < image_change(2, stain) < 0.8 * image_change(1, stain)


@pytest.mark.parametrize(("index", "kind"), [(1, "bumps"), (3, "dents"), (5, "colors"), (7, "normals")])
def test_depth_files_of_version_2_show_relief_and_nothing_of_stains_and_creases(index, kind, tmp_path):
    """The written depth is compared with the same instance without its defect."""
    write_sample(tmp_path, 2, 3, SIZE, "CandyCane", "test_public", index)
    files = read(tmp_path / "CandyCane" / "test_public" / "data", f"{index:02d}")
    look = draw_sample(2, 3, SIZE, "CandyCane", "test_public", index)[2]
    good = np.asarray(compile_geometry_pass("CandyCane", SIZE)(look, NO_DEFECTS).depth).reshape(SIZE, SIZE)
    low, high = (files["info_depth"]["normalization"][limit] for limit in ("min", "max"))
    steps = 65535 * (good - low) / (high - low) - files["depth"]  # by which the file is nearer
    mask = files[f"{kind}_mask"] > 0
    assert mask.any()
    if kind in ("bumps", "dents"):
        assert np.median(steps[mask] * (1 if kind == "bumps" else -1)) > 50
    else:
        assert np.abs(steps).max() < 0.6  # of rounding


def test_good_instances_of_version_2_vary_more_in_colour_and_light():
    rng = np.random.default_rng(0)
    spreads = {}
    for version in (1, 2):
        looks = [draw.instance(SWEETS["GummyBear"], draw.VERSIONS[version], rng) for _ in range(64)]
        spreads[version] = [np.stack([getattr(k, f) for k in looks]).std(0) for f in ("palette", "brightness")]
    assert spreads[2][0].max() > 1.3 * spreads[1][0].max()
    assert spreads[1][1].max() < 1e-6
    assert spreads[2][1].min(0).min() > 0.01
