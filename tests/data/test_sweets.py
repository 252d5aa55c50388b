"""Procedural sweets and changed lamps: what stays, what differs, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax.config import small
from iumad_jax.data import readers
from iumad_jax.data.candies import draw, names, render
from iumad_jax.data.candies.dataset import draw_sample, material, write_sample
from iumad_jax.data.candies.defects import NO_DEFECTS
from iumad_jax.data.candies.procedural import FORMS, sweet
from iumad_jax.data.candies.scene import compile_geometry_pass, lighting_pass
from iumad_jax.errors import UserError
from tests import sentences

pytestmark = pytest.mark.slow

SIZE = 64
SETTINGS = {"train": 1, "val": 1, "test": 2, "size": SIZE, "progress": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("sweets") / "root", objects=2, **SETTINGS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_sweet_is_the_same_whatever_their_number(root, tmp_path):
    more = render(tmp_path / "more", objects=3, **SETTINGS)
    assert sorted(folder.name for folder in more.iterdir() if folder.is_dir()) == [
        "sweet_001",
        "sweet_002",
        "sweet_003",
    ]
    for name in ("sweet_001", "sweet_002"):
        files = contents(root / name)
        assert len(files) == 4 * 17
        assert contents(more / name) == files


def described(name: str, instance: int) -> tuple[np.ndarray, np.ndarray]:
    """Describe shape and colours of a good instance whatever its pose: quantiles of its height and of its colours."""
    look = draw.instance(sweet(name), draw.VERSIONS[1], np.random.default_rng(instance))
    surface = compile_geometry_pass(name, SIZE)(look, NO_DEFECTS)
    hit = np.asarray(surface.hit)
    quantiles = np.linspace(0, 1, 9)
    heights = np.quantile(np.asarray(surface.local_point)[2][hit], quantiles)
    colours = np.quantile(np.asarray(surface.albedo)[:, hit] ** (1 / 2.2), quantiles, axis=1)
    return np.append(heights, 4 * hit.mean()), colours.ravel()


def test_sweets_of_one_form_differ_more_than_instances_of_one_sweet():
    numbers = [2 + len(FORMS) * turn for turn in range(5)]
    for values in zip(*([described(f"sweet_{number:03d}", i) for number in numbers for i in range(3)]), strict=True):
        gaps = np.abs(np.stack(values)[:, None] - np.stack(values)).mean(-1).reshape(5, 3, 5, 3)
        within = max(gaps[i, :, i].max() for i in range(5))
        between = min(gaps[i, :, j].min() for i in range(5) for j in range(i))
        assert between > 1.5 * within


def test_objects_differ_in_form_colour_and_material():
    sweets = [sweet(name) for name in names(100)]
    assert len({s.distance for s in sweets}) == len(FORMS)
    assert len({s.material for s in sweets}) == 4
    traits = np.stack([s.recipe.traits for s in sweets])
    for form in FORMS:
        same = traits[[s.distance is form for s in sweets]]
        gaps = np.abs(same[:, None] - same).max(-1) + np.eye(len(same))
        assert gaps.min() > 0.1


@pytest.mark.parametrize(("index", "kind"), [(1, "bumps"), (3, "dents"), (5, "colors"), (7, "normals")])
def test_a_defect_is_visible_where_its_mask_is(index, kind):
    name = "sweet_001"
    bad, masks, look = draw_sample(1, 0, SIZE, name, "test_public", index)
    good = compile_geometry_pass(name, SIZE)(look, NO_DEFECTS)
    mask = masks[kind]
    assert [k for k in masks if masks[k].any()] == [kind]
    assert not mask[~np.asarray(good.hit) & ~np.asarray(bad.hit)].any()
    nearer = np.asarray(good.depth - bad.depth)
    images = [np.asarray(lighting_pass(s, material(1, name), look, SIZE)[0][4], int) for s in (good, bad)]
    change = np.abs(images[0] - images[1]).max(-1).ravel()
    if kind in ("bumps", "dents"):
        assert np.median(nearer[mask]) * (1 if kind == "bumps" else -1) > 3e-3
    else:
        assert not nearer.any()
    assert change[mask].mean() > 8
    assert (change[~mask] > 12).mean() < 0.02


@pytest.mark.parametrize("name", ["Confetto", "sweet_001"])
def test_lamps_change_the_images_and_neither_geometry_nor_masks(name, tmp_path):
    lamps = (0.0, 0.5, 1.0)
    for lamp in lamps:
        write_sample(tmp_path / str(lamp), 1, 0, SIZE, name, "test_public", 1, lamp)
    usual, *changed = (contents(tmp_path / str(lamp)) for lamp in lamps)
    for files in changed:
        differing = [path for path in usual if files[path] != usual[path]]
        assert [path[-11:-5] for path in differing] == ["image_"] * 6
    images = [np.asarray(Image.open(next((tmp_path / str(lamp)).rglob("*image_4.png"))), float) for lamp in lamps]
    brightness = [image.mean() for image in images]
    assert brightness[0] > 1.05 * brightness[1] > 1.2 * brightness[2]  # dimmer
    redness = [image[..., 0].mean() / image[..., 2].mean() for image in images]
    assert redness[0] < 0.9 * redness[1] < 0.8 * redness[2]  # warmer
    greys = [image[..., 1].ravel() for image in images]
    assert np.corrcoef(greys)[0, 2] < 0.97  # from another side: not only a factor of the same image


def test_a_dataset_of_another_lamp_or_other_sweets_is_refused(root, tmp_path):
    for change, key in (({"lamp": 0.5}, "lamp"), ({"objects": 3}, "objects")):
        with pytest.raises(UserError, match=sentences.CANDIES_OF_OTHER_SETTINGS.format(key)):
            render(root, **{"objects": 2, **SETTINGS, **change})
    older = shutil.copytree(root, tmp_path / "older")  # rendered before lamps could change
    manifest = json.loads((older / "candies.json").read_text())
    assert manifest.pop("lamp") == 0
    (older / "candies.json").write_text(json.dumps(manifest))
    assert render(older, objects=2, **SETTINGS) == older
    manifest["recipes"] += 1
    (older / "candies.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=sentences.CANDIES_OF_OTHER_SETTINGS.format("recipes")):
        render(older, objects=2, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"objects": 1000}, sentences.CANDIES_NUMBER_OUT_OF_RANGE.format(key="objects", found=1000, least=1, most=999)),
        ({"objects": "0"}, sentences.CANDIES_NUMBER_OUT_OF_RANGE.format(key="objects", found=0, least=1, most=999)),
        ({"objects": "sweet_1"}, sentences.CANDIES_UNKNOWN_OBJECT.format("sweet_1")),
        ({"lamp": 1.5}, sentences.CANDIES_LAMP_OUT_OF_RANGE.format(1.5)),
        ({"lamp": float("nan")}, sentences.CANDIES_LAMP_OUT_OF_RANGE.format("nan")),
    ],
)
def test_bad_settings_are_refused(change, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        render(tmp_path / "root", **SETTINGS, **change)
    assert not list(tmp_path.iterdir())


def test_a_run_reads_the_sweets_that_its_config_counts(root):
    config = small("1-1")
    config.dataset.update(name="sweets", root=str(root))
    config.dataset.render.update(objects=2, train=1, val=1, test=2, size=SIZE)
    readers.render(config)  # of the same settings: leaves the files as they are
    reader = readers.open_reader(config)
    assert reader.objects == readers.objects(config) == ("sweet_001", "sweet_002")
    sample = reader.read("sweet_002", "test", "01")
    assert sample.anomalous
    assert sample.mask.any()
    config.dataset.objects = "sweet_003"
    with pytest.raises(
        UserError, match=sentences.UNKNOWN_OBJECT.format(name="sweet_003", known="sweet_001, sweet_002")
    ):
        readers.objects(config)
    config.dataset.update(name="candies", objects="all")
    assert len(readers.objects(config)) == 10
