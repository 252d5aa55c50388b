"""Links in datasets and among images to predict: within them, out of them, and into folders that are trusted."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax import errors
from iumad_jax.config import paper
from iumad_jax.data import readers
from iumad_jax.data.readers.unlabelled import depth_files, photographs
from iumad_jax.data.sample import Camera, DepthFormat
from iumad_jax.errors import UserError
from tests import sentences

DATASETS = {
    "folder": ("bolt/train/good/rgb/0.png", "bolt/test/good/rgb/0.png", "bolt/test/cut/rgb/0.png"),
    "mvtec3d": tuple(f"bolt/{split}/good/rgb/0.png" for split in ("train", "validation", "test")),
    "eyecandies": tuple(
        f"Confetto/{split}/data/0_{ending}"
        for split in ("train", "val", "test_public")
        for ending in ("image_4.png", "depth.png", "info_depth.yaml", "mask.png", "metadata.yaml")
    ),
}


def write(root: Path, *paths: str) -> None:
    """Write photographs that differ from path to path, and other files of Eyecandies."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((8, 8), np.uint8)
        if path.endswith(".yaml"):
            kinds = "anomalous", *(f"anomalous_{kind}" for kind in ("bumps", "dents", "colors", "normals"))
            content = "\n".join(f"{kind}: 0" for kind in kinds)
            (root / path).write_text(f"normalization: {{min: 1.9, max: 2.0}}\n{content}")
        elif path.endswith("mask.png"):
            Image.fromarray(pixels).save(root / path)
        elif path.endswith("depth.png"):
            Image.fromarray(pixels.astype(np.uint16) + 9).save(root / path)
        else:
            Image.fromarray(np.full((8, 8, 3), sum(path.encode()) % 251, np.uint8)).save(root / path)


def content(root: Path, name: str, trust: str = "") -> dict:
    """Return the photographs of a dataset by split and id."""
    config = paper("open")
    config.dataset.update({"name": name, "root": str(root), "trust": trust, "validation": "calibration"})
    config.dataset.objects, config.modality = DATASETS[name][0].split("/")[0], "rgb"
    reader = readers.open_reader(config)
    (object_,) = reader.objects
    splits = ("train", "calibration", "test")
    return {(s, id_): reader.read(object_, s, id_).rgb.tolist() for s in splits for id_ in reader.ids(object_, s)}


def link(path: Path, target: Path) -> Path:
    """Move a file or folder and link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    path.symlink_to(target)
    return target


LINKED = {
    "an object": lambda file: file.parents[len(file.parts) - 2],
    "a folder of images": lambda file: file.parent,
    "an image": lambda file: file,
}


@pytest.mark.parametrize("what", LINKED)
@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_of_links_into_a_trusted_folder_is_read_as_if_the_files_were_there(
    tmp_path: Path, name: str, what: str
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "nas" / "images"
    write(root, *DATASETS[name])
    expected = content(root, name)
    assert len(expected) == 3
    path = LINKED[what](Path(DATASETS[name][0]))
    target = link(root / path, elsewhere / path.name)
    named = target if target.is_dir() else target.parent
    for trust in ("", f"{tmp_path / 'na'}", f"{root},{elsewhere}2"):  # neither is above the target
        with pytest.raises(UserError, match=f"{sentences.LEADS_OUT_OF_ROOT.format('')}{root}") as error:
            content(root, name, trust)
        refused = target / "train" / "data" if (what, name) == ("an object", "eyecandies") else target
        assert f" to {refused}; " in str(error.value)
        assert str(error.value).endswith(f" --config.dataset.trust={refused if refused.is_dir() else named}.")
    for trust in (str(named), f"{root}/none, {elsewhere}", str(tmp_path / "nas"), os.path.relpath(elsewhere)):
        assert content(root, name, trust) == expected


def test_a_link_to_a_link_is_judged_by_where_it_ends(tmp_path: Path) -> None:
    write(tmp_path / "root", *DATASETS["folder"])
    first = link(tmp_path / "root/bolt/test/cut/rgb/0.png", tmp_path / "trusted/0.png")
    second = link(first, tmp_path / "other/0.png")
    with pytest.raises(UserError, match=re.escape(f"--config.dataset.trust={second.parent}.")):
        content(tmp_path / "root", "folder", str(first.parent))
    assert len(content(tmp_path / "root", "folder", str(second.parent))) == 3


def test_settings_and_the_table_of_visa_may_be_links_into_trusted_folders(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "nas"
    images = [f"bolt/Data/Images/Normal/{i}.png" for i in range(2)]
    write(root, *images, "bolt/Data/Images/Anomaly/0.png")
    rows = (f"bolt,{split},normal,{path}," for split, path in zip(("train", "test"), images, strict=True))
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(["object,split,label,image,mask", *rows]))
    (root / "dataset.yaml").write_text("bits: 8")
    expected = content(root, "folder")
    assert set(expected) == {("train", "0"), ("test", "good/1"), ("test", "Anomaly/0")}
    for file in ("split_csv/1cls.csv", "dataset.yaml"):
        link(root / file, elsewhere / file)
        with pytest.raises(UserError, match=re.escape(sentences.LEADS_OUT_OF_ROOT.format(file))):
            content(root, "folder")
        assert content(root, "folder", str(elsewhere)) == expected


def listed(root: Path, *trusted: Path, depth: Path | None = None) -> dict:
    """Return the images of --input by name: a pixel of each, or why it cannot be read."""
    found = {}
    for image in photographs(root, depth is not None, depth, DepthFormat(0.001), None, trusted=trusted):
        try:
            found[image.name] = int(image.read()[0][0, 0, 0])
        except UserError as error:
            found[image.name] = str(error)
    return found


def test_images_to_predict_may_be_links_into_trusted_folders(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "input", tmp_path / "nas"
    write(root, "a.png", "b.png")
    expected = listed(root)
    link(root / "b.png", elsewhere / "b.png")
    (root / "c.png").symlink_to(root / "a.png")
    (root / "d.png").symlink_to("gone.png")
    (root / "e.png").symlink_to("e.png")
    found = listed(root)
    assert found.pop("e").startswith(str(root / "e.png"))
    (root / "e.png").unlink()
    assert found.pop("b").startswith(f"{root / 'b.png'} leads out of {root} to {elsewhere / 'b.png'}; ")
    assert re.match(sentences.FILE_UNREADABLE_WITH_REASON.format(file=root / "d.png", reason=".*"), found.pop("d"))
    assert found == {"a": expected["a"], "c": expected["a"]}
    assert listed(root, elsewhere) | {"d": ""} == expected | {"c": expected["a"], "d": ""}
    assert listed(root / "b.png") == {"b": expected["b"]}  # named by the user


def test_folders_to_predict_may_be_links_into_trusted_folders(tmp_path: Path, monkeypatch, capsys) -> None:
    """Folders within the input are listed once, and links that lead round do no harm."""
    monkeypatch.setattr(errors, "_told", set())
    root, elsewhere = tmp_path / "input", tmp_path / "nas"
    write(root, "here/a.png")
    write(elsewhere, "deep/b.png")
    (root / "again").symlink_to(root / "here")
    (root / "here/round").symlink_to(root)
    assert set(listed(root)) == {"here/a"}
    (root / "there").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    with pytest.raises(UserError, match=re.escape(sentences.LEADS_OUT_OF_ROOT.format("there"))):
        listed(root)
    assert set(listed(root, elsewhere)) == {"here/a", "there/deep/b"}
    assert sentences.LINK_BEHIND_LINK in capsys.readouterr().err


def test_depth_to_predict_may_be_links_into_trusted_folders(tmp_path: Path) -> None:
    elsewhere = tmp_path / "nas"
    write(tmp_path, "input/a.png", "depth/a.png")
    Image.fromarray(np.full((8, 8), 500, np.uint16)).save(tmp_path / "depth/a.png")
    expected = listed(tmp_path / "input", depth=tmp_path / "depth")
    link(tmp_path / "depth/a.png", elsewhere / "a.png")
    message = sentences.LEADS_OUT_OF_ROOT.format(tmp_path / "depth/a.png")
    assert listed(tmp_path / "input", depth=tmp_path / "depth")["a"].startswith(message)
    assert listed(tmp_path / "input", elsewhere, depth=tmp_path / "depth") == expected
    assert expected["a"] == sum(b"input/a.png") % 251

    (alone,) = depth_files(tmp_path / "depth", DepthFormat(0.001), None, lambda width: Camera(9, 9, 4, 4))
    with pytest.raises(UserError, match=re.escape(message)):
        alone.read()
    (alone,) = depth_files(tmp_path / "depth", DepthFormat(0.001), None, lambda width: Camera(9, 9, 4, 4), [elsewhere])
    np.testing.assert_allclose(alone.read()[1], 0.5)
