"""Datasets as people have them on disk: the folder reader finds each image's split, defect and mask."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iumad_jax import errors
from iumad_jax.config import paper
from iumad_jax.data import readers
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.readers.mvtec3d import MVTec3D
from iumad_jax.data.readers.unlabelled import depth_files, photographs
from iumad_jax.data.sample import Camera, DepthFormat
from iumad_jax.errors import UserError
from iumad_jax.runtime import workdir as workdirs
from tests import sentences

TRAIN, TEST = "bolt/train/good", "bolt/test/scratch"
# Photographs, and by split and id the photograph and its mask, if any
TREES: dict[str, tuple[tuple[str, ...], dict[tuple[str, str], tuple[str, ...]]]] = {
    "MVTec AD": (
        ("bolt/license.txt", "bolt/readme.txt"),
        {
            ("train", "000"): ("bolt/train/good/000.png",),
            ("test", "good/000"): ("bolt/test/good/000.png",),
            ("test", "scratch/000"): ("bolt/test/scratch/000.png", "bolt/ground_truth/scratch/000_mask.png"),
        },
    ),
    "MVTec 3D-AD": (
        (),
        {
            ("train", "000"): ("bolt/train/good/rgb/000.png",),
            ("calibration", "000"): ("bolt/validation/good/rgb/000.png",),
            ("test", "cut/000"): ("bolt/test/cut/rgb/000.png", "bolt/test/cut/gt/000.png"),
        },
    ),
    "MVTec LOCO AD": (
        ("bolt/defects_config.json",),
        {
            ("train", "000"): ("bolt/train/good/000.png",),
            ("calibration", "000"): ("bolt/validation/good/000.png",),
            ("test", "good/000"): ("bolt/test/good/000.png",),
            ("test", "logical_anomalies/000"): (
                "bolt/test/logical_anomalies/000.png",
                "bolt/ground_truth/logical_anomalies/000/000.png",
                "bolt/ground_truth/logical_anomalies/000/001.png",
            ),
            ("test", "structural_anomalies/000"): (
                "bolt/test/structural_anomalies/000.png",
                "bolt/ground_truth/structural_anomalies/000/000.png",
            ),
        },
    ),
    "one object": ((), {("train", "000"): ("train/good/rgb/000.png",)}),
    "no good": ((), {("train", "000"): ("bolt/train/rgb/000.png",)}),
    "no train": ((), {("train", "000"): ("bolt/000.png",)}),
    "capital letters": (
        (),
        {
            ("train", "A"): ("bolt/Train/Good/RGB/A.PNG",),
            ("test", "NG/A"): ("bolt/TEST/NG/Images/A.PNG", "bolt/Ground_Truth/NG/A_mask.png"),
        },
    ),
    "nested": (
        (),
        {
            ("train", "left/000"): (f"{TRAIN}/rgb/left/000.png",),
            ("train", "right/000"): (f"{TRAIN}/rgb/right/000.png",),
            ("test", "scratch/left/000"): (f"{TEST}/rgb/left/000.png", f"{TEST}/mask/left/000_mask.png"),
        },
    ),
    "masks beside photographs": (
        (),
        {
            ("train", "000"): (f"{TRAIN}/000.png",),
            ("test", "scratch/000"): (f"{TEST}/000.jpg", f"{TEST}/000_mask.png"),
        },
    ),
    "a photograph called mask": ((), {("train", "a_mask"): (f"{TRAIN}/a_mask.png",)}),
    "a photograph and a folder of its name": (
        (),
        {("train", "000"): (f"{TRAIN}/000.png",), ("train", "000/0"): (f"{TRAIN}/000/0.png",)},
    ),
}


def write(root: Path, *paths: str, size: int = 8) -> None:
    """Write photographs, and masks of one pixel where a path says so; they differ from file to file."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        marked = re.search(r"mask\b|masks/|/gt/|ground_truth", path, re.IGNORECASE) and "a_mask" not in path
        pixels = np.zeros((size, size), np.uint8)
        pixels.flat[sum(path.encode()) % pixels.size] = 200
        Image.fromarray(pixels if marked else pixels + 9).save(root / path)


def contents(root: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the files of each sample by split and id, after reading all samples."""
    reader, found = Folder(root), {}
    (name,) = reader.objects
    for split in ("train", "calibration", "test", "unlabelled"):
        for id_ in reader.ids(name, split):
            own = tuple(file for file in reader.files(name, split, id_) if file.name != "dataset.yaml")
            found[split, id_] = tuple(str(file.relative_to(root)) for file in own)
            sample = reader.read(name, split, id_)
            if len(own) > 1:
                masks = [np.asarray(Image.open(file)) > 0 for file in own[1:]]
                np.testing.assert_array_equal(sample.mask, np.any(masks, axis=0))
            assert sample.anomalous == (split == "test" and not id_.startswith("good/"))
    return found


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    others, expected = TREES[name]
    root = tmp_path / "bolt"
    write(root, *(path for paths in expected.values() for path in paths))
    for path in others:
        (root / path).touch()
    assert contents(root) == expected
    assert Folder(root).objects == ("bolt",)
    config = paper("open")
    config.dataset.name, config.dataset.root, config.modality = "folder", str(root), "rgb"
    assert readers.objects(config) == readers.available(config) == ("bolt",)


@pytest.mark.parametrize("name", ["OK", "Good", "normal"])
def test_other_words_for_good_are_told_once(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    monkeypatch.setattr(errors, "_told", set())
    write(
        tmp_path,
        f"bolt/train/{name}/rgb/0.png",
        f"bolt/test/{name}/0.png",
        "bolt/test/NG/0.png",
        "nut/train/good/0.png",
    )
    reader = Folder(tmp_path)
    defects = {id_: reader.read("bolt", "test", id_).defect for id_ in reader.ids("bolt", "test")}
    assert defects == {f"{name}/0": "good", "NG/0": "NG"}
    assert reader.ids("bolt", "train") == ("0",)
    assert capsys.readouterr().err.count(sentences.GOOD_TOLD.format(name)) == 1


# Good and anomalous folders without splits

NORMAL = tuple(f"{i:03}" for i in range(60))


def test_a_fifth_of_the_good_images_tests(tmp_path: Path, monkeypatch, capsys) -> None:
    """Images that come later do not change what tests."""
    monkeypatch.setattr(errors, "_told", set())
    write(tmp_path, *(f"bolt/normal/{name}.png" for name in NORMAL[:40]))
    assert len(Folder(tmp_path).ids("bolt", "train")) == 40
    write(tmp_path, "bolt/abnormal/7.png", "bolt/mask/7.png")
    before = contents(tmp_path)
    testing = {id_ for split, id_ in before if split == "test"}
    assert before["test", "abnormal/7"] == ("bolt/abnormal/7.png", "bolt/mask/7.png")
    assert 4 <= len(testing) <= 13
    write(tmp_path, *(f"bolt/normal/{name}.png" for name in NORMAL[40:]))
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert capsys.readouterr().err.count(sentences.TESTING_TOLD) == 1


def test_the_settings_name_the_folders(tmp_path: Path) -> None:
    write(tmp_path, *(f"bolt/pass/a/{name}.png" for name in NORMAL), *(f"bolt/pass/b/{name}.png" for name in NORMAL))
    write(tmp_path, "bolt/fail/dent/1.png", "bolt/fail/rust/1.png", "bolt/labels/rust/1.png", "bolt/unsorted/1.png")
    named = "normal: [pass/a, pass/b]\nabnormal: [fail/dent, fail/rust]\nmasks: labels\n"
    (tmp_path / "dataset.yaml").write_text(named)
    found = contents(tmp_path)
    assert len(found) == 122
    assert found["test", "dent/1"] == ("bolt/fail/dent/1.png",)
    assert Folder(tmp_path).read("bolt", "test", "rust/1").mask is not None
    assert {id_.split("/")[-2] for split, id_ in found if split == "train"} == {"a", "b"}
    for settings, expected in (
        ("normal: passed", sentences.FOLDER_NAMED_MISSING.format("bolt/passed")),
        ("normal: ../..", sentences.LEADS_OUT_OF_ROOT.format("")),
        ("normal: [1]", sentences.SETTING_WRONG.format(found=re.escape("[1]"), key="normal")),
        ("abnormal: fail", sentences.NORMAL_NOT_NAMED),
    ):
        (tmp_path / "dataset.yaml").write_text(settings)
        with pytest.raises(UserError, match=expected):
            Folder(tmp_path)


VISA = "bolt/Data/Images"


def test_the_table_of_visa_says_what_tests(tmp_path: Path) -> None:
    normal = [f"{VISA}/Normal/{i:04}.JPG" for i in range(4)]
    write(tmp_path, *normal, f"{VISA}/Anomaly/000.JPG", "bolt/Data/Masks/Anomaly/000.png")
    table = tmp_path / "split_csv" / "1cls.csv"
    table.parent.mkdir()
    rows = [f"bolt,{split},normal,{path}," for split, path in zip(("train", "test") * 2, normal, strict=True)]
    table.write_text("\n".join(["object,split,label,image,mask", *rows]))
    assert contents(tmp_path) == {
        ("train", "0000"): (normal[0],),
        ("train", "0002"): (normal[2],),
        ("test", "Anomaly/000"): (f"{VISA}/Anomaly/000.JPG", "bolt/Data/Masks/Anomaly/000.png"),
        ("test", "good/0001"): (normal[1],),
        ("test", "good/0003"): (normal[3],),
    }
    assert Folder(tmp_path / "bolt").objects == ("bolt",)  # without the table
    for content, expected in (
        ("\n".join(["object,split,label,image,mask", *rows[1:]]), sentences.SPLIT_UNKNOWN.format(normal[0])),
        ("image,mask\na,b\n", sentences.TABLE_DAMAGED),
        ("image,split\n\x80\n", sentences.TABLE_DAMAGED),
    ):
        table.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=expected):
            Folder(tmp_path)


# What is left out, and what is refused


def test_clutter_is_skipped_everywhere(tmp_path: Path) -> None:
    expected = TREES["MVTec AD"][1]
    write(tmp_path, *(path for paths in expected.values() for path in paths))
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for folder in folders:
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png", "000.json", "000.xml"):
            (folder / name).write_bytes(b"x")
        (folder / "__MACOSX").mkdir()
        shutil.copy(tmp_path / "bolt/train/good/000.png", folder / "__MACOSX/000.png")
    assert contents(tmp_path) == expected
    names = {image.name for image in photographs(tmp_path, False, None, DepthFormat(), None)}
    assert names == {"bolt/train/good/000", "bolt/test/good/000", "bolt/test/scratch/000"}


def claim(workdir: Path) -> None:
    """Make a folder the workdir of a run that has drawn a picture."""
    with workdirs.claimed(workdir, paper("6-1")):
        write(workdir, "pictures/0.png")


RESULTS = {  # what commands write, given a path and the folder that it belongs to
    "a run": lambda root: claim(root / "run"),
    "default runs": lambda root: (claim(root / "runs/folder_open"), write(root, "runs/candies/a/train/0.png")),
    "runs of several seeds": lambda root: (claim(root / "seeds/0"), claim(root / "seeds/1")),
    "predictions": lambda root: (
        write(root, "out/masks/0.png"),
        touch(root / "out", "predictions.json", "predictions.csv"),
    ),
    "an evaluation": lambda root: (write(root, "out/pictures/0.png"), (root / "out/ledger.jsonl").touch()),
    "prepared images": lambda root: touch(root / "runs/x/prepared/a", "0.png", "lock", "manifest.json"),
    "shared prepared images": lambda root: (
        touch(root / "prep/a", "lock", "manifest.json"),
        write(root, "prep/contact_sheets/0.png"),
    ),
}


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize("standing", ["bolt", "."])
@pytest.mark.parametrize("name", RESULTS)
def test_what_commands_wrote_into_a_dataset_is_no_part_of_it(
    tmp_path: Path, monkeypatch, capsys, name: str, standing: str
) -> None:
    """The commands ran in the folder of all objects, or in that of an object."""
    monkeypatch.setattr(errors, "_told", set())
    write(tmp_path, f"{TRAIN}/0.png", f"{TEST}/0.png", "nut/0.png")
    before = {image.name for image in photographs(tmp_path, False, None, DepthFormat(), None)}
    RESULTS[name](tmp_path / standing)
    monkeypatch.chdir(tmp_path)
    assert Folder(Path()).objects == ("bolt", "nut")
    assert sentences.RESULTS_NO_PART in capsys.readouterr().err
    assert {image.name for image in photographs(Path(), False, None, DepthFormat(), None)} == before
    monkeypatch.chdir("bolt")  # an object itself
    assert contents(Path()) == {
        ("train", "0"): ("train/good/0.png",),
        ("test", "scratch/0"): ("test/scratch/0.png",),
    }
    assert Folder(Path()).objects == ("bolt",)


def test_an_object_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path, "train/train/good/0.png", "train/test/good/0.png", "bolt/train/good/0.png")
    assert Folder(tmp_path).objects == ("bolt", "train")


def test_an_object_is_not_taken_for_results(tmp_path: Path) -> None:
    """Whatever it is called, and if a run lies beside its images."""
    write(tmp_path, "lock/0.png", "runs/train/good/0.png", "prepared/train/good/lock/0.png", "ledger.jsonl/good/0.png")
    write(tmp_path, "bolt/train/good/0.png")
    claim(tmp_path / "bolt/run")
    assert Folder(tmp_path).objects == ("bolt", "ledger.jsonl", "lock", "prepared", "runs")


def test_files_of_a_user_do_not_make_results(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(errors, "_told", set())
    for name in ("bolt", "nut", "zip"):
        write(tmp_path, f"{name}/train/good/0.png", f"{name}/test/good/0.png", f"{name}/test/cut/0.png")
    touch(tmp_path / "nut", "lock")
    touch(tmp_path / "zip", "predictions.json", "manifest.json")
    touch(tmp_path / "bolt/test/cut", "predictions.json", "lock.json")
    touch(tmp_path / "bolt/train", "manifest.json")
    reader = Folder(tmp_path)
    assert reader.objects == ("bolt", "nut", "zip")
    assert reader.ids("bolt", "test") == ("cut/0", "good/0")
    touch(tmp_path / "nut/test/cut", "ledger.jsonl")
    with pytest.raises(UserError, match=r"nut/test/cut/ledger\.jsonl does not end in"):  # its images are not left out
        Folder(tmp_path)
    (tmp_path / "nut/test/cut/ledger.jsonl").unlink()
    claim(tmp_path / "first")
    claim(tmp_path / "second")
    capsys.readouterr()
    assert Folder(tmp_path).objects == ("bolt", "nut", "zip")
    assert capsys.readouterr().err.count(sentences.RESULTS_NO_PART) == 2


def test_masks_and_depth_beside_photographs_are_not_predicted(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(errors, "_told", set())
    write(tmp_path, "a.png", "a_mask.png", "b_mask.jpg", "x/rgb/c.png", "x/mask/c.png", "x/depth/c.png", "x/GT/d/c.png")
    names = {image.name for image in photographs(tmp_path, False, None, DepthFormat(), None)}
    assert names == {"a", "b_mask", "x/rgb/c"}
    assert sentences.MASKS_NOT_PREDICTED in capsys.readouterr().err
    assert [image.name for image in photographs(tmp_path / "a_mask.png", False, None, DepthFormat(), None)] == [
        "a_mask"
    ]


def test_depth_of_eyecandies_has_no_unit_for_all_images(tmp_path: Path) -> None:
    write(tmp_path, "000_image_4.png", "000_depth.png")
    (tmp_path / "000_info_depth.yaml").write_text("normalization: {min: 1.0, max: 2.0}")
    rgb, depth = tmp_path / "000_image_4.png", tmp_path / "000_depth.png"
    for (image,) in (
        photographs(rgb, True, depth, DepthFormat(0.001), None),
        depth_files(depth, DepthFormat(0.001), None, lambda width: Camera(width, width, 0, 0)),
    ):
        with pytest.raises(UserError, match=sentences.DEPTH_WITH_OWN_RANGE.format("000_info_depth.yaml")):
            image.read()


REFUSED = {
    "two folders of a split": (
        ("bolt/Train/good/0.png", "bolt/train/good/0.png"),
        sentences.SAME_MEANING.format("Train"),
    ),
    "two good folders": (("bolt/train/good/0.png", "bolt/train/OK/0.png"), sentences.BOTH_GOOD),
    "two folders of masks": (
        (f"{TRAIN}/0.png", f"{TEST}/0.png", f"{TEST}/mask/0.png", f"{TEST}/gt/0.png"),
        sentences.SAME_KIND.format("mask"),
    ),
    "unlabelled test images": ((f"{TRAIN}/0.png", "bolt/test/rgb/0.png"), sentences.WITHOUT_LABELS.format("test/rgb")),
    "folders of unknown meaning": (
        ("bolt/0.png", "bolt/rejected/0.png"),
        sentences.GOOD_OR_NOT.format("bolt/rejected"),
    ),
    "masks of unlabelled images": (
        (f"{TRAIN}/0.png", "bolt/unlabelled/0.png", "bolt/unlabelled/mask/0.png"),
        sentences.UNKNOWN_NAME.format(path="mask", known="rgb, depth"),
    ),
    "no image to learn from": (("bolt/ok/1.png", "bolt/ng/1.png"), sentences.NOTHING_TO_LEARN_FROM),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_ambiguous_is_refused(tmp_path: Path, monkeypatch, refused, name: str) -> None:
    paths, expected = REFUSED[name]
    write(tmp_path, *paths)
    if name == "no image to learn from":
        monkeypatch.setattr("iumad_jax.data.readers.arrangements._TESTING_SHARE", 1)
    refused(lambda: Folder(tmp_path), str(tmp_path), expected)


def test_mvtec_ad_is_no_mvtec_3d_ad(tmp_path: Path) -> None:
    write(tmp_path, *(path for paths in TREES["MVTec AD"][1].values() for path in paths))
    with pytest.raises(UserError, match=sentences.MVTEC_WITHOUT_DEPTH):
        MVTec3D(tmp_path)
