"""Stored summaries of test images: they are read back unchanged and are close to the original maps."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from iumad_jax.errors import UserError
from iumad_jax.metrics import pro_curve
from iumad_jax.report import samples
from iumad_jax.report.samples import RATES
from tests import sentences

SIZE, COUNT = 64, 6
IDS, DEFECTS = ["0", "1", "2", "3", "4", "ü/5"], ["good", "good", "bump", "bump", "dent", "good"]
ANOMALOUS = [0, 0, 1, 1, 1, 0]


def smooth(seed):
    """Return maps that are interpolated from 16 x 16 tokens, like those of methods."""
    tokens = np.random.default_rng(seed).gamma(1, size=(COUNT, 17, 17))
    positions = np.linspace(0, 15.999, SIZE)
    low, part = positions.astype(int), positions % 1
    rows = tokens[:, low] * (1 - part)[:, None] + tokens[:, low + 1] * part[:, None]
    return (rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part).astype(np.float32)


@pytest.fixture
def masks():
    masks = np.zeros((COUNT, SIZE, SIZE), bool)
    masks[2:5, 10:30, 20:40] = True
    return masks


@pytest.fixture
def maps(masks):
    return {"ours": smooth(0) + masks, "baseline": smooth(1)}


def summarise(masks, maps):
    scores = {name: values.max(axis=(1, 2)) for name, values in maps.items()}
    alarm = scores["ours"] > 1
    return samples.summarise(IDS, DEFECTS, ANOMALOUS, masks, scores, maps, alarm, np.linspace(0, 1, COUNT))


def test_saved_and_read_back(tmp_path, masks, maps):
    stored = summarise(masks, maps)
    samples.save(tmp_path, 2, "ant", stored)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step2_ant.npz"]
    loaded = samples.load(tmp_path, 2, "ant")
    assert (loaded.ids, loaded.defects, loaded.low, loaded.high) == (
        tuple(IDS),
        tuple(DEFECTS),
        stored.low,
        stored.high,
    )
    assert loaded.anomalous.tolist() == [False, False, True, True, True, False]
    np.testing.assert_array_equal(loaded.maps, stored.maps)
    np.testing.assert_array_equal(loaded.alarm, maps["ours"].max((1, 2)) > 1)
    np.testing.assert_array_equal(loaded.pixel_threshold, np.linspace(0, 1, COUNT, dtype=np.float32))
    for name, values in maps.items():
        np.testing.assert_array_equal(loaded.scores[name], values.max(axis=(1, 2)))
        overlap, thresholds = pro_curve(masks, values, RATES)
        np.testing.assert_array_equal(loaded.overlap[name], overlap)
        np.testing.assert_array_equal(loaded.thresholds[name], thresholds)
    assert list(loaded.scores) == ["ours", "baseline"]


def test_small_maps_are_means_of_the_original_maps(masks, maps):
    """Every value is the mean of 4 x 4 pixels, up to half of one of 255 levels."""
    stored = summarise(masks, maps)
    assert stored.maps.shape == (COUNT, SIZE // 4, SIZE // 4)
    for image, y, x in ((0, 0, 0), (3, 5, 7), (5, 15, 15)):
        expected = maps["ours"][image, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
        value = stored.low + stored.maps[image, y, x] / 255 * (stored.high - stored.low)
        assert value == pytest.approx(expected, abs=0.51 * (stored.high - stored.low) / 255)
    assert (stored.maps.min(), stored.maps.max()) == (0, 255)


def test_flat_maps(masks, maps):
    stored = summarise(masks, {"ours": np.full_like(maps["ours"], 3)})
    assert (stored.low, stored.high) == (3, 3)
    assert not stored.maps.any()


def test_without_masks_thresholds_come_from_good_images(maps):
    stored = summarise(None, maps)
    good = np.sort(maps["ours"][[0, 1, 5]].ravel())
    assert np.isnan(stored.overlap["ours"]).all()
    for rate, threshold in zip(RATES, stored.thresholds["ours"], strict=True):
        assert (good > threshold).mean() <= rate * (1 + 1e-9) < (good >= threshold).mean() + 1e-9


def test_missing_damaged_and_foreign_files_are_reported(tmp_path, masks, maps):
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("step0_ant.npz"))):
        samples.load(tmp_path, 0, "ant")
    samples.save(tmp_path, 0, "ant", summarise(masks, maps))
    path = tmp_path / "samples" / "step0_ant.npz"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:300] + bytes(200) + content[500:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("step0_ant.npz"))):
            samples.load(tmp_path, 0, "ant")
    np.savez(path, ids=[1])
    with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format("step0_ant.npz"))):
        samples.load(tmp_path, 0, "ant")


def test_a_folder_that_cannot_be_created_is_reported(tmp_path, masks, maps):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format("")):
        samples.save(tmp_path, 0, "ant", summarise(masks, maps))


def test_pictures_are_read_back(tmp_path, masks):
    """WebP loses little. The relief is brighter where heights are larger; without heights no relief is made."""
    y, x = np.indices((SIZE, SIZE))
    rgb = np.repeat(np.stack([y, x, y + x], axis=-1)[None].astype(np.uint8), COUNT, axis=0)
    heights = np.full((COUNT, SIZE, SIZE), np.nan, np.float32)
    heights[1] = np.where(x < 32, 0, 0.02)
    name = samples.save_pictures(tmp_path, "ant", rgb, heights, masks, height_scale=0.02)
    assert samples.save_pictures(tmp_path, "ant", 255 - rgb, heights, masks, height_scale=0.02) != name
    pictures = samples.load_pictures(tmp_path, name)
    assert len(pictures) == COUNT
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture.rgb))).astype(int)
        assert picture.size == pixels.shape[:2] == (SIZE, SIZE)
        assert np.abs(pixels - rgb[0]).mean() < 4
    assert [bool(picture.relief) for picture in pictures] == [False, True, False, False, False, False]
    relief = np.asarray(Image.open(io.BytesIO(pictures[1].relief))).astype(int)[..., 0]
    assert relief[:, 48:].mean() > relief[:, :16].mean() + 60
    assert [bool(picture.outline) for picture in pictures] == [False, False, True, True, True, False]


def test_pictures_of_the_same_images_are_written_once(tmp_path, masks):
    rgb, heights = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8), np.zeros((COUNT, SIZE, SIZE), np.float32)
    name = samples.save_pictures(tmp_path, "ant", rgb, heights, masks, height_scale=1)
    written = (tmp_path / "samples" / name).stat()
    assert samples.save_pictures(tmp_path, "ant", rgb, heights, masks, height_scale=1) == name
    assert (tmp_path / "samples" / name).stat().st_ino == written.st_ino
    for other in ((rgb, heights + 1, masks, 1), (rgb, heights, ~masks, 1), (rgb, heights, masks, 2)):
        assert samples.save_pictures(tmp_path, "ant", *other) != name


def test_missing_and_damaged_pictures_are_reported(tmp_path, masks):
    rgb, heights = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8), np.zeros((COUNT, SIZE, SIZE), np.float32)
    name = samples.save_pictures(tmp_path, "ant", rgb, heights, masks, height_scale=1)
    path = tmp_path / "samples" / name
    content = path.read_bytes()
    path.unlink()
    for damage in (lambda: None, lambda: path.write_bytes(content[:-200])):
        damage()
        with pytest.raises(UserError, match=re.escape(sentences.FILE_UNREADABLE.format(name))):
            samples.load_pictures(tmp_path, name)
    np.savez(path, content=np.zeros(3, np.uint8), lengths=[1, 1, 5], size=[SIZE, SIZE])
    with pytest.raises(UserError, match=sentences.PICTURES_MISSING):
        samples.load_pictures(tmp_path, name)
