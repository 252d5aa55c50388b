"""The Eyecandies reader on synthetic samples, and bad input."""

import contextlib
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from iumad_jax.data.readers.eyecandies import OBJECTS, Eyecandies
from iumad_jax.errors import UserError
from tests import sentences

WIDTH, HEIGHT = 24, 16
FOLDERS = {"train": "train", "calibration": "val", "test": "test_public"}


def write_sample(
    root: Path, folder: str = "test_public", id_: str = "00", object_: str = "Confetto", kinds: str = ""
) -> None:
    """Write one sample of 24 x 16 pixels; depth rises from 1 m to 3 m along the columns."""
    data = root / object_ / folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    levels = np.tile(np.linspace(0, 65535, WIDTH).round().astype(np.uint16), (HEIGHT, 1))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:5, 3:9] = 255 if kinds else 0
    rgb = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint32).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(rgb).save(data / f"{id_}_image_4.png")
    Image.fromarray(255 - rgb).save(data / f"{id_}_image_0.png")
    Image.fromarray(levels).save(data / f"{id_}_depth.png")
    Image.fromarray(mask).save(data / f"{id_}_mask.png")
    (data / f"{id_}_info_depth.yaml").write_text("normalization:\n  max: 3.0\n  min: 1.0\n")
    flags = {f"anomalous_{kind}": int(kind in kinds.split()) for kind in ("bumps", "dents", "colors", "normals")}
    (data / f"{id_}_metadata.yaml").write_text(yaml.safe_dump({"anomalous": int(bool(kinds)), **flags}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Create a dataset with one sample of Confetto in each split."""
    root = tmp_path / "dataset"
    for folder in FOLDERS.values():
        write_sample(root, folder)
    return root


def test_samples_are_read_as_written(root: Path) -> None:
    write_sample(root, id_="01", kinds="dents")
    reader = Eyecandies(root, "Confetto")
    assert reader.ids("Confetto", "test") == ("00", "01")
    sample = reader.read("Confetto", "test", "01")
    assert (sample.object, sample.id, sample.defect, sample.anomalous) == ("Confetto", "01", "dents", True)
    assert sample.rgb.dtype == np.uint8
    assert sample.rgb[1, 2].tolist() == [(WIDTH + 2) * 3 + channel for channel in range(3)]
    assert sample.depth.dtype == np.float32
    np.testing.assert_allclose(sample.depth, np.tile(np.linspace(1, 3, WIDTH), (HEIGHT, 1)), atol=2 / 65535)
    assert sample.mask.dtype == bool
    assert np.argwhere(sample.mask).min(0).tolist() == [2, 3]
    assert np.argwhere(sample.mask).max(0).tolist() == [4, 8]
    good = reader.read("Confetto", "train", "00")
    assert (good.defect, good.anomalous, good.mask.any()) == ("good", False, False)


def test_light_selects_the_image(root: Path) -> None:
    bright = Eyecandies(root, "Confetto").read("Confetto", "test", "00").rgb
    other = Eyecandies(root, "Confetto", light="0").read("Confetto", "test", "00").rgb
    np.testing.assert_array_equal(other, 255 - bright)


def test_focal_length_scales_with_the_width(root: Path) -> None:
    camera = Eyecandies(root, "Confetto").read("Confetto", "test", "00").camera
    assert camera.fx == camera.fy == pytest.approx(711.11 * WIDTH / 512, rel=1e-5)
    assert (camera.cx, camera.cy) == (11.5, 7.5)  # midway between the centres of the first and the last pixel


def test_several_kinds_are_combined(root: Path) -> None:
    write_sample(root, id_="07", kinds="bumps normals")
    assert Eyecandies(root, "Confetto").read("Confetto", "test", "07").defect == "combined"


def test_a_depth_of_zero_is_missing(root: Path) -> None:
    (root / "Confetto/test_public/data/00_info_depth.yaml").write_text("normalization: {min: 0, max: 2}\n")
    measured = Eyecandies(root, "Confetto").read("Confetto", "test", "00").depth
    assert np.isnan(measured[:, 0]).all()
    assert np.isfinite(measured[:, 1:]).all()


@pytest.mark.parametrize("value", [1, 255])
def test_any_other_value_than_zero_marks_a_defect(root: Path, value: int) -> None:
    Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8) * value).save(root / "Confetto/test_public/data/00_mask.png")
    mask = Eyecandies(root, "Confetto").read("Confetto", "test", "00").mask
    np.testing.assert_array_equal(mask, np.eye(HEIGHT, WIDTH))


def test_ids_are_in_the_order_of_numbers(root: Path) -> None:
    for id_ in ("100", "20", "3"):
        write_sample(root, "train", id_)
    (root / "Confetto/train/data/.DS_Store").write_bytes(b"x")
    assert Eyecandies(root, "Confetto").ids("Confetto", "train") == ("00", "3", "20", "100")


def test_objects_keep_the_selected_order(root: Path) -> None:
    for name in OBJECTS:
        for folder in FOLDERS.values():
            write_sample(root, folder, object_=name)
    assert Eyecandies(root).objects == tuple(sorted(OBJECTS))
    assert Eyecandies(root, "Lollipop, CandyCane").objects == ("Lollipop", "CandyCane")


def test_only_the_listed_files_are_read(root: Path) -> None:
    reader = Eyecandies(root, "Confetto")
    before = reader.read("Confetto", "test", "00")
    listed = reader.files("Confetto", "test", "00")
    for file in root.rglob("*.*"):
        if file not in listed:
            file.unlink()
    np.testing.assert_array_equal(reader.read("Confetto", "test", "00").depth, before.depth)


@pytest.mark.parametrize(("light", "expected"), [("all", range(6)), ("2", [2])])
def test_all_lights_are_six_training_images(root: Path, light: str, expected: list[int]) -> None:
    for folder in FOLDERS.values():
        for number in range(6):
            rgb = np.full((HEIGHT, WIDTH, 3), number, np.uint8)
            Image.fromarray(rgb).save(root / "Confetto" / folder / f"data/00_image_{number}.png")
    reader = Eyecandies(root, "Confetto", light)
    ids = reader.ids("Confetto", "train")
    assert len(set(ids)) == len(expected)
    samples = [reader.read("Confetto", "train", id_) for id_ in ids]
    assert [sample.rgb.max() for sample in samples] == list(expected)
    assert len({sample.depth.tobytes() for sample in samples}) == 1
    for split in ("calibration", "test"):
        assert reader.ids("Confetto", split) == ("00",)
        assert (reader.read("Confetto", split, "00").rgb == (2 if light == "2" else 4)).all()


def test_training_on_all_lights_needs_all_images(root: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentences.SAMPLE_FILE_MISSING.format("train/data/00_image_1.png"))):
        Eyecandies(root, "Confetto", "all")


def test_unlabelled_images_have_neither_mask_nor_labels(root: Path) -> None:
    assert Eyecandies(root, "Confetto").ids("Confetto", "unlabelled") == ()
    write_sample(root, "test_private", "03")
    for ending in ("mask.png", "metadata.yaml"):
        (root / f"Confetto/test_private/data/03_{ending}").unlink()
    reader = Eyecandies(root, "Confetto")
    assert reader.ids("Confetto", "unlabelled") == ("03",)
    sample = reader.read("Confetto", "unlabelled", "03")
    assert (sample.defect, sample.mask, sample.anomalous) == ("unknown", None, False)
    assert sample.rgb.shape == (*sample.depth.shape, 3)


def test_official_normals(root: Path) -> None:
    """The files have red to the right, green up, blue to the camera; in `Camera` axes, y points down and z away."""
    for folder in FOLDERS.values():
        normals = np.full((HEIGHT, WIDTH, 3), [128, 128, 255], np.uint8)
        normals[0, 0] = [204, 230, 128]  # (0.6, 0.8, 0) and rounding
        Image.fromarray(normals).save(root / "Confetto" / folder / "data/00_normals.png")
    reader = Eyecandies(root, "Confetto", normals=True)
    normals = reader.read("Confetto", "test", "00").normals
    np.testing.assert_allclose(normals[0, 0], [0.6, -0.8, 0], atol=0.01)
    np.testing.assert_allclose(normals[5, 5], [0, 0, -1], atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, rtol=1e-6)
    file = root / "Confetto/test_public/data/00_normals.png"
    assert file in reader.files("Confetto", "test", "00")
    assert Eyecandies(root, "Confetto").read("Confetto", "test", "00").normals is None
    Image.fromarray(np.zeros((HEIGHT, 9, 3), np.uint8)).save(file)
    with pytest.raises(UserError, match=re.escape(sentences.SIZES_DIFFER.format(file="00_normals.png", size="9x16"))):
        reader.read("Confetto", "test", "00")
    file.unlink()
    with pytest.raises(UserError, match=re.escape(sentences.SAMPLE_FILE_MISSING.format("00_normals.png"))):
        Eyecandies(root, "Confetto", normals=True)


# Bad input


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    """Encode the start of an 8-bit RGB PNG of any size."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def png_without_pixels(width: int, height: int) -> bytes:
    return png_header(width, height) + chunk(b"IDAT", b"")


def save(image: np.ndarray, **kwargs: str) -> Callable[[Path], None]:
    return lambda file: Image.fromarray(image).save(file, **kwargs)


def write(content: str | bytes) -> tuple[str, str | bytes]:
    return "write", content


def case(file: str, damage: object, sentence: str, *facts: object, **named: object) -> tuple[str, object, str]:
    """Return a damage to a file, and the sentence about it, which names the file unless other facts are given."""
    return file, damage, sentence.format(*(facts or [file]), file=file, **named)


AT_OPENING = {
    "no RGB": case("image_4.png", "unlink", sentences.SAMPLE_FILE_MISSING),
    "no depth": case("depth.png", "unlink", sentences.SAMPLE_FILE_MISSING),
    "no range": case("info_depth.yaml", "unlink", sentences.SAMPLE_FILE_MISSING),
    "no mask": case("mask.png", "unlink", sentences.SAMPLE_FILE_MISSING),
    "no labels": case("metadata.yaml", "unlink", sentences.SAMPLE_FILE_MISSING),
    "a folder for a file": case("mask.png", "fold", sentences.NOT_A_FILE),
    "a link to itself": case("mask.png", "loop",
        sentences.FILE_UNREADABLE_WITH_REASON, reason="Too many levels of symbolic links"),
    "zero bytes of RGB": case("image_4.png", write(b""), sentences.FILE_EMPTY),
    "zero bytes of YAML": case("metadata.yaml", write(b""), sentences.FILE_EMPTY),
    "a link out of the root": case("depth.png", "move_out", sentences.LEADS_OUT_OF_ROOT),
}  # fmt: skip
GREY = np.zeros((HEIGHT, WIDTH), np.uint8)
NOT_YAML = {  # file, content
    "Python tag": ("info_depth.yaml", "!!python/object/apply:os.system ['touch hacked']"),
    "Python tag within": ("metadata.yaml", "anomalous: !!python/name:os.getcwd"),
    "broken YAML": ("info_depth.yaml", "normalization: {min: 1"),
    "binary YAML": ("info_depth.yaml", b"\xff\xfe\x00\x01\x02"),
    "a date that is none": ("metadata.yaml", "anomalous: 2020-13-45"),
}  # fmt: skip
WRONG_SETTINGS = {  # file, content, value found, key
    "no normalization": ("info_depth.yaml", "min: 1", "None", "normalization: min"),
    "normalization is a number": ("info_depth.yaml", "normalization: 3", "None", "normalization: min"),
    "no maximum": ("info_depth.yaml", "normalization: {min: 1}", "None", "normalization: max"),
    "range in words": ("info_depth.yaml", "normalization: {min: near, max: 3}", "'near'", "normalization: min"),
    "range is yes": ("info_depth.yaml", "normalization: {min: yes, max: 3}", "True", "normalization: min"),
    "range is NaN": ("info_depth.yaml", "normalization: {min: .nan, max: 3}", "nan", "normalization: min"),
    "range is infinite": ("info_depth.yaml", "normalization: {min: 1, max: .inf}", "inf", "normalization: max"),
    "millimetres": ("info_depth.yaml", "normalization: {min: 2311, max: 4903}", "2311", "normalization: min"),
    "range is negative": ("info_depth.yaml", "normalization: {min: -1, max: 3}", "-1", "normalization: min"),
    "no label": ("metadata.yaml", "anomalous_bumps: 1", "None", "anomalous"),
    "label of 2": ("metadata.yaml", "{anomalous: 2}", "2", "anomalous"),
    "a kind is missing": ("metadata.yaml", "{anomalous: 0, anomalous_bumps: 0}", "None", "anomalous_dents"),
}  # fmt: skip
AT_READING = {
    "truncated RGB": case("image_4.png", "truncate", sentences.FILE_UNREADABLE),
    "truncated depth": case("depth.png", "truncate", sentences.FILE_UNREADABLE),
    "truncated header": case("depth.png", write(png_header(9, 9)[:20]), sentences.FILE_UNREADABLE),
    "a chunk without a name": case("image_4.png", write(png_header(WIDTH, HEIGHT) + chunk(b"\0\0\0\0", b"")),
        sentences.FILE_DAMAGED),
    "a chunk too short": case("image_4.png", write(png_header(WIDTH, HEIGHT) + chunk(b"gAMA", b"1")),
        sentences.FILE_DAMAGED),
    "only a header": case("image_4.png", write(png_header(WIDTH, HEIGHT)), sentences.FILE_UNREADABLE),
    "no rows": case("image_4.png", write(png_without_pixels(WIDTH, HEIGHT)), sentences.FILE_UNREADABLE),
    "no pixels": case("image_4.png", write(png_header(0, 0)), sentences.FILE_UNREADABLE),
    "a text called PNG": case("mask.png", write("no image, but long enough to be one"),
        sentences.NOT_AN_IMAGE, "00_mask.png"),
    "too wide": case("image_4.png", write(png_without_pixels(8193, 4)),
        sentences.TOO_MANY_PIXELS, size="8193x4", most="8192x8192"),
    "a decompression bomb": case("image_4.png", write(png_without_pixels(2**31 - 1, 2**31 - 1)),
        sentences.TOO_MANY_PIXELS, size=f"{2**31 - 1}x{2**31 - 1}", most="8192x8192"),
    "8-bit depth": case("depth.png", save(GREY), sentences.WRONG_PIXELS, found="8-bit grey", needed="16-bit grey"),
    "grey RGB": case("image_4.png", save(GREY), sentences.WRONG_PIXELS, found="8-bit grey", needed="8-bit RGB"),
    "RGB with alpha": case("image_4.png", save(np.zeros((HEIGHT, WIDTH, 4), np.uint8)),
        sentences.WRONG_PIXELS, found="8-bit RGB with alpha", needed="8-bit RGB"),
    "small RGB": case("image_4.png", save(np.zeros((HEIGHT, 9, 3), np.uint8)),
        sentences.SIZES_DIFFER.format(file="depth.png", size="24x16")),
    "small depth": case("depth.png", save(np.full((8, WIDTH), 9, np.uint16)), sentences.SIZES_DIFFER, size="24x8"),
    "small mask": case("mask.png", save(GREY[:, :5]), sentences.SIZES_DIFFER, size="5x16"),
    "no valid depth": case("info_depth.yaml", write("normalization: {min: 0, max: 0}"),
        sentences.DEPTH_ALL_MISSING, "00_depth.png"),
    "deep YAML": case("metadata.yaml", write("[" * 30_000), sentences.YAML_NESTED_TOO_DEEPLY),
    "endless YAML": case("metadata.yaml", write("a" * 70_000), sentences.FILE_TOO_LARGE, most=65536),
    "YAML without keys": case("metadata.yaml", write("- 1"), sentences.YAML_WITHOUT_KEYS),
    "far too small": case("info_depth.yaml", write("normalization: {min: 0.002, max: 0.004}"),
        sentences.UNIT_WRONG_BY, median=0.003, times=1000, size="small"),
    "range is upside down": case("info_depth.yaml", write("normalization: {min: 3, max: 1}"),
        sentences.RANGE_REVERSED, low=3.0, high=1.0),
    "anomalous without a kind": case("metadata.yaml",
        write("{anomalous: 1, anomalous_bumps: 0, anomalous_dents: 0, anomalous_colors: 0, anomalous_normals: 0}"),
        sentences.LABELS_DISAGREE),
    **{name: case(file, write(text), sentences.YAML_REFUSED) for name, (file, text) in NOT_YAML.items()},
    **{
        name: case(file, write(text), sentences.SETTING_WRONG, found=found, key=key)
        for name, (file, text, found, key) in WRONG_SETTINGS.items()
    },
}  # fmt: skip


def assert_one_sentence(message: str, file: str, expected: str) -> None:
    assert file in message
    assert expected in message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize(("ending", "damage", "expected"), AT_OPENING.values(), ids=AT_OPENING)
def test_cheap_checks_are_made_at_opening(root: Path, spoil, ending: str, damage, expected: str) -> None:
    spoil.apply(damage, root / f"Confetto/test_public/data/00_{ending}")
    with pytest.raises(UserError) as error:
        Eyecandies(root, "Confetto")
    assert_one_sentence(str(error.value), ending, expected)


@pytest.mark.parametrize(("ending", "damage", "expected"), AT_READING.values(), ids=AT_READING)
def test_bad_file(root: Path, spoil, monkeypatch: pytest.MonkeyPatch, ending: str, damage, expected: str) -> None:
    monkeypatch.chdir(root)
    spoil.apply(damage, root / f"Confetto/test_public/data/00_{ending}")
    reader = Eyecandies(root, "Confetto")
    with pytest.raises(UserError) as error:
        reader.read("Confetto", "test", "00")
    assert_one_sentence(str(error.value), ending, expected)
    assert not (root / "hacked").exists()


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_a_defect_among_good_images_is_refused(root: Path, split: str) -> None:
    write_sample(root, FOLDERS[split], id_="01", kinds="dents")
    sentence = sentences.LABELLED_DEFECT_OUTSIDE_TEST.format(file="01_metadata.yaml", split=split, defect="dents")
    with pytest.raises(UserError, match=re.escape(sentence)):
        Eyecandies(root, "Confetto").read("Confetto", split, "01")


def test_multiplying_aliases_are_refused_without_being_expanded(root: Path) -> None:
    """Each level repeats the level before ten times, so the expanded text would fill the memory."""
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'])}]" for i in range(12)]
    file = root / "Confetto/test_public/data/00_metadata.yaml"
    file.write_text("\n".join([*levels, "anomalous: *a11"]))
    with pytest.raises(UserError, match=re.escape(sentences.YAML_WITH_ALIAS.format("00_metadata.yaml"))):
        Eyecandies(root, "Confetto").read("Confetto", "test", "00")


@pytest.mark.parametrize("ending", ["image_4.png", "depth.png", "mask.png", "info_depth.yaml", "metadata.yaml"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(root: Path, ending: str, data: st.DataObject) -> None:
    file = root / f"Confetto/test_public/data/00_{ending}"
    original = file.read_bytes()
    start = data.draw(st.integers(0, len(original) - 1))
    cut = data.draw(st.integers(0, 8))
    damaged = original[:start] + data.draw(st.binary(max_size=8)) + original[start + cut :]
    reader = Eyecandies(root, "Confetto")
    file.write_bytes(damaged)
    with contextlib.suppress(UserError):  # any other error would be a traceback for the user
        sample = reader.read("Confetto", "test", "00")
        assert sample.rgb.shape == (*sample.depth.shape, 3)
        assert sample.depth.shape == sample.mask.shape
    file.write_bytes(original)


def test_files_removed_or_emptied_after_opening(root: Path) -> None:
    reader = Eyecandies(root, "Confetto")
    depth_file = root / "Confetto/test_public/data/00_depth.png"
    depth_file.write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(sentences.FILE_EMPTY.format("00_depth.png"))):
        reader.read("Confetto", "test", "00")
    depth_file.unlink()
    sentence = sentences.FILE_UNREADABLE_WITH_REASON.format(file="00_depth.png", reason="No such file or directory")
    with pytest.raises(UserError, match=re.escape(sentence)):
        reader.read("Confetto", "test", "00")


@pytest.mark.parametrize(
    ("objects", "light", "expected"),
    [
        ("Candycane", "4", sentences.UNKNOWN_OBJECT.format(name="Candycane", known="CandyCane, ChocolateCookie")),
        ("Confetto,", "4", sentences.UNKNOWN_OBJECT.format(name="", known="CandyCane, ChocolateCookie")),
        ("Confetto,Confetto", "4", sentences.OBJECT_NAMED_TWICE.format("Confetto")),
        ("all", "4", sentences.SPLIT_OF_EYECANDIES_MISSING.format(path="CandyCane/train/data", object="CandyCane")),
        ("Confetto", "6", sentences.LIGHT_UNKNOWN.format(6)),
        ("Confetto", "1", sentences.SAMPLE_FILE_MISSING.format("00_image_1.png")),
    ],
)
def test_invalid_options(root: Path, objects: str, light: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        Eyecandies(root, objects, light)
    assert_one_sentence(str(error.value), "", expected)


def test_missing_and_empty_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(sentences.ROOT_NOT_A_FOLDER.format(tmp_path / "nowhere"))):
        Eyecandies(tmp_path / "nowhere", "Confetto")
    with pytest.raises(UserError, match=re.escape(sentences.ROOT_EMPTY.format(tmp_path))):
        Eyecandies(tmp_path, "Confetto")


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_empty_split(root: Path, folder: str) -> None:
    data = root / "Confetto" / folder / "data"
    shutil.rmtree(data)
    data.mkdir()
    with pytest.raises(UserError, match=sentences.SPLIT_WITHOUT_SAMPLES.format(f"{folder}/data")):
        Eyecandies(root, "Confetto")


def test_folder_that_leads_out_of_the_root(root: Path) -> None:
    shutil.move(root / "Confetto", root.parent / "elsewhere")
    (root / "Confetto").symlink_to(root.parent / "elsewhere")
    (root / "README").touch()
    with pytest.raises(UserError, match=re.escape(sentences.LEADS_OUT_OF_ROOT.format("train/data"))):
        Eyecandies(root, "Confetto")


def test_links_within_the_root_and_to_it_are_followed(root: Path) -> None:
    (root / "Lollipop").symlink_to("Confetto")
    link = root.parent / "link"
    link.symlink_to(root)
    assert Eyecandies(link, "Lollipop").read("Lollipop", "test", "00").object == "Lollipop"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_folder(root: Path) -> None:
    (root / "Confetto/train/data").chmod(0)
    with pytest.raises(
        UserError,
        match=re.escape(sentences.FILE_UNREADABLE_WITH_REASON.format(file="train/data", reason="Permission denied")),
    ):
        Eyecandies(root, "Confetto")
