"""Photographs, depth and masks whose names differ in their endings belong together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax import errors
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.readers.unlabelled import photographs
from iumad_jax.data.sample import DepthFormat
from iumad_jax.errors import UserError
from tests import sentences

GOOD = "bolt/train/good"
CUT = "bolt/test/cut"


def write(root: Path, *paths: str) -> None:
    """Write photographs, depth in millimetres and masks, as the paths say; the name's first digit is in the pixels."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        number = int(Path(path).name[2])
        photograph = np.full((8, 8), 100 + number, np.uint8)
        mask = 255 * np.eye(8, k=number, dtype=np.uint8)
        name = path.lower()
        depth = "/depth/" in name or ("_depth." in name and "/rgb/" not in name and not name.endswith(".webp"))
        is_mask = "_mask." in name or "/mask/" in name
        pixels = mask if is_mask else np.full((8, 8), 500 + number, np.uint16) if depth else photograph
        Image.fromarray(pixels).save(root / path)
    (root / "dataset.yaml").write_text("unit: mm")


BELONG = {
    "depth with an ending": (f"{GOOD}/rgb/000.png", f"{GOOD}/depth/000_depth.png"),
    "photographs with an ending": (f"{GOOD}/rgb/000_rgb.png", f"{GOOD}/depth/000.png"),
    "both with an ending": (f"{GOOD}/rgb/000_color.png", f"{GOOD}/depth/000_depth.png"),
    "as RealSense's viewer names them": (f"{GOOD}/rgb/000_Color.png", f"{GOOD}/depth/000_Depth.png"),
    "in subfolders": (f"{GOOD}/rgb/a/000_rgb.png", f"{GOOD}/depth/a/000_depth.png"),
    "in one folder": (f"{GOOD}/000.png", f"{GOOD}/000_depth.png"),
    "in one folder, both with an ending": (f"{GOOD}/000_rgb.png", f"{GOOD}/000_depth.png"),
}


@pytest.mark.parametrize("name", BELONG)
def test_names_that_differ_in_their_endings_belong_together(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr(errors, "_told", set())
    paths = *BELONG[name], *(path.replace("000", "001") for path in BELONG[name])
    write(tmp_path, *paths)
    reader = Folder(tmp_path)
    samples = [reader.read("bolt", "train", id_) for id_ in reader.ids("bolt", "train")]
    assert [sample.rgb[0, 0, 0] for sample in samples] == [100, 101]
    np.testing.assert_allclose([np.unique(sample.depth) for sample in samples], [[0.5], [0.501]])
    assert capsys.readouterr().err.count(sentences.ENDINGS_DIFFER) == 1
    found = list(
        photographs(tmp_path / Path(paths[0]).parent, True, (tmp_path / paths[1]).parent, DepthFormat(0.001), None)
    )
    monkeypatch.setattr(errors, "_told", set())
    assert [image.read()[0][0, 0, 0] for image in found] == [100, 101]
    assert capsys.readouterr().err.count(sentences.ENDINGS_DIFFER) == 1
    np.testing.assert_allclose([np.unique(image.read()[1]) for image in found], [[0.5], [0.501]])


def test_masks_of_photographs_with_an_ending(tmp_path: Path) -> None:
    masks = f"{CUT}/mask/000.png", f"{CUT}/mask/001_mask.png"
    write(tmp_path, f"{GOOD}/000.png", f"{CUT}/rgb/000_rgb.png", f"{CUT}/rgb/001_rgb.png", *masks)
    reader = Folder(tmp_path)
    for number, id_ in enumerate(reader.ids("bolt", "test")):
        np.testing.assert_array_equal(reader.read("bolt", "test", id_).mask, np.eye(8, k=number, dtype=bool))


def test_the_same_name_counts_most(tmp_path: Path) -> None:
    """Photographs called depth are no depth, and 000 and 000_rgb may have depth of their own names."""
    rgb = [f"{GOOD}/rgb/{name}.png" for name in ("000", "000_rgb", "001_depth")]
    write(tmp_path, *rgb, *(path.replace("/rgb/", "/depth/") for path in rgb))
    for id_, millimetres in (("000", 500), ("000_rgb", 500), ("001_depth", 501)):
        np.testing.assert_allclose(Folder(tmp_path).read("bolt", "train", id_).depth, millimetres / 1000)
    write(tmp_path, "rgb/002_depth.png")
    assert [image.name for image in photographs(tmp_path / "rgb", False, None, DepthFormat(), None)] == ["002_depth"]


REFUSED = {
    "two depth images": (
        (f"{GOOD}/rgb/000.png", f"{GOOD}/depth/000.png", f"{GOOD}/depth/000_depth.png"),
        "depth/000_depth.png and 000.png both belong to {root}/bolt/train/good/rgb/000.png; keep one.",
    ),
    "two photographs": (
        (f"{GOOD}/rgb/000_rgb.png", f"{GOOD}/rgb/000_color.png", f"{GOOD}/depth/000_depth.png"),
        "depth/000_depth.png may belong to {root}/bolt/train/good/rgb/000_color.png or 000_rgb.png; rename it like",
    ),
    "another ending": (
        (f"{GOOD}/rgb/000.png", f"{GOOD}/rgb/001.png", f"{GOOD}/depth/001_z.png"),
        "depth/001_z.png has no image of its name, the nearest is {root}/bolt/train/good/rgb/001.png; rename either",
    ),
    "depth beside photographs as a bitmap": (
        (f"{GOOD}/000.png", f"{GOOD}/000_depth.webp"),
        "000_depth.webp does not end in one of .png .tiff",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_do_not_tell_are_refused(tmp_path: Path, refused, name: str) -> None:
    paths, expected = REFUSED[name]
    write(tmp_path, *paths)
    refused(lambda: Folder(tmp_path), str(tmp_path), expected.format(root=tmp_path))


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        ("depth/000_z.png", "depth has no depth of 000 (nearest: 000_z.png); add a file of its name, ending in .png"),
        ("depth/000.npy", "depth/000.png and 000.npy both are the depth of 000; keep one."),
    ],
)
def test_predictions_without_one_depth_image_name_it(tmp_path: Path, depth: str, expected: str) -> None:
    write(tmp_path, "rgb/000.png", *(["depth/000.png"] if depth.endswith("npy") else [depth]))
    if depth.endswith("npy"):
        (tmp_path / depth).touch()
    (image,) = photographs(tmp_path / "rgb", True, tmp_path / "depth", DepthFormat(0.001), None)
    with pytest.raises(UserError) as error:
        image.read()
    assert expected in str(error.value)
