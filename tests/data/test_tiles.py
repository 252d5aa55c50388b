"""Tiles of images: what the network sees of them, and how their maps become one."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax.config import check, small
from iumad_jax.data.prepared.good_images import (
    CalibrationImages,
    good_images,
    odd_images,
    quality_shifts,
    several_kinds,
)
from iumad_jax.data.prepared.kept import keep, load
from iumad_jax.data.prepared.squash import describe_squash
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.folder import Folder
from iumad_jax.data.region import Box, cut
from iumad_jax.data.tiles import Tiling, rows_of, stitch, stitch_for_metrics
from iumad_jax.errors import UserError
from iumad_jax.runtime.shared_arrays import SharedArrays
from iumad_jax.shapes import Batch
from tests import sentences
from tests.data.prepared.sets import PROCESSING, RGB, make_root, quarters, store
from tests.data.test_region import scene

TILED = dataclasses.replace(RGB, tiles="2x3", overlap=0.2)


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


def test_tiles_cover_the_image_and_overlap():
    """Three tiles of width w that overlap by half of it cover 2 w = 1."""
    tiling = Tiling.of("1x3", 0.5)
    assert (tiling.count, tiling.share) == (3, (1, pytest.approx(0.5)))
    for box, left in zip(tiling.boxes, (0, 0.25, 0.5), strict=True):
        assert tuple(box) == pytest.approx((left, 0, left + 0.5, 1))
    without = Tiling.of("2x2", 0.0).boxes
    assert [tuple(box)[:2] for box in without] == [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    assert Tiling.of("1x1", 0.5).boxes == [Box(0, 0, 1, 1)]


@pytest.mark.parametrize("tiles", ["", "2", "2x", "0x3", "-1x2", "2x2x2", "1.5x2", "17x17"])
def test_tiles_that_are_no_numbers_are_refused(tiles):
    config = small("1-0")
    config.input.tiles = tiles
    with pytest.raises(UserError, match=sentences.TILES_WRONG.format(tiles)):
        check(config)


def test_a_tile_is_prepared_like_an_image_of_it_but_for_its_heights():
    """Heights and normals are those that the whole image tells, whose edge shows the table."""
    whole = dataclasses.replace(PROCESSING, depth_encoding="height+normals")
    sample = scene()
    arrays = dataclasses.replace(whole, tiles="2x2", overlap=0.25)(sample)
    height, width = sample.depth.shape
    down, right = round(height / 1.75), round(width / 1.75)
    corners = [(0, 0), (0, width - right), (height - down, 0), (height - down, width - right)]
    encoded = whole._measure(sample)["encoded"]
    resized = dataclasses.replace(whole, modalities=("rgb",))
    for tile, (top, left) in enumerate(corners):
        box = Box(left / width, top / height, (left + right) / width, (top + down) / height)
        np.testing.assert_array_equal(arrays["images_rgb"][tile], resized(cut(sample, box))["images_rgb"])
        expected = resized._resized(encoded[top : top + down, left : left + right]).astype(np.float16)
        np.testing.assert_array_equal(arrays["images_depth"][tile], expected)
    for name in ("mask", "thumbnail", "height", "object", "workpiece"):
        np.testing.assert_array_equal(arrays[name], whole(sample)[name])


def test_maps_are_blended_where_tiles_overlap():
    """Two tiles of 6 columns share 3 of 9: weights of the second rise by 1/3 per column, from its first at 1/6."""
    first, second = (np.full((4, 4), value, np.float32) for value in (1, 4))
    stitched = stitch(np.stack([first, second]), Tiling.of("1x2", 0.5), (5, 9))
    expected = [1, 1, 1, 1 + 3 / 6, 1 + 3 / 2, 1 + 3 * 5 / 6, 4, 4, 4]
    np.testing.assert_allclose(stitched, np.tile(expected, (5, 1)), rtol=1e-6)


@pytest.mark.parametrize("overlap", [0, 0.2, 0.5])
@pytest.mark.parametrize("size", [(90, 150), (97, 41), (3, 4)])
def test_stitched_maps_have_no_seams_and_no_larger_values(overlap, size):
    tiling, rng = Tiling.of("3x4", overlap), np.random.default_rng(0)
    np.testing.assert_allclose(stitch(np.ones((12, 8, 8), np.float32), tiling, size), 1, rtol=1e-6)
    maps = rng.uniform(0, 1, (12, 8, 8)).astype(np.float32)
    stitched = stitch(maps, tiling, size)
    assert stitched.shape == size
    assert (stitched.min() >= maps.min(), stitched.max() <= maps.max() + 1e-6) == (True, True)


def test_a_plane_seen_in_tiles_is_a_plane_again():
    tiling, centre = Tiling.of("2x3", 0.3), (np.arange(224) + 0.5) / 224
    maps = [
        (box.top + centre * (box.bottom - box.top))[:, None] * 10 + (box.left + centre * (box.right - box.left))
        for box in tiling.boxes
    ]
    stitched = stitch(np.stack(maps).astype(np.float32), tiling, (300, 400))
    expected = 10 * (np.arange(300)[:, None] + 0.5) / 300 + (np.arange(400) + 0.5) / 400
    assert np.abs(stitched - expected).max() < 0.05


def test_maps_are_reduced_by_area_for_metrics():
    """Of 2 x 2 tiles without overlap, each pixel of the reduced map is the mean of four of theirs."""
    maps = np.random.default_rng(0).uniform(0, 1, (4, 224, 224)).astype(np.float32)
    joined = np.block([[maps[0], maps[1]], [maps[2], maps[3]]])
    expected = joined.reshape(224, 2, 224, 2).mean((1, 3))
    np.testing.assert_allclose(stitch_for_metrics(maps, Tiling.of("2x2", 0.0)), expected, atol=1e-6)


def test_tiles_are_rows_of_a_prepared_set(root):
    """They are encoded one by one, on disk and in memory, and named after their image."""
    opened = store(root, processing=TILED)
    test, train = (opened.get("Confetto", split) for split in ("test", "train"))
    assert (len(test.ids), len(test.truth.mask), len(test.batch.object_id)) == (11, 11, 66)
    assert (train.tile_ids[0], train.tile_ids[7]) == (f"{train.ids[0]} tile 1", f"{train.ids[1]} tile 2")
    samples = [opened.reader.read("Confetto", "test", id_) for id_ in test.ids]
    images = np.concatenate([TILED(sample)["images_rgb"] for sample in samples])
    np.testing.assert_array_equal(test.batch.images["rgb"], images)
    expected = quarters(images.astype(np.float32)).reshape(66, 4, 3).astype(np.float16)
    np.testing.assert_array_equal(test.batch.features["rgb"], expected)
    jax.tree.map(np.testing.assert_array_equal, opened.encode(samples)[:2], test[:2])
    assert isinstance(test.batch.features["rgb"], np.memmap)


def test_the_tiles_of_an_image_are_divided_together(tmp_path):
    """One image in five calibrates, with all of its tiles: those of another would show it in part."""
    rng, folder = np.random.default_rng(0), tmp_path / "objects/bolt/good"
    folder.mkdir(parents=True)
    for number in range(25):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)).save(folder / f"{number:02d}.png")
    reader = Folder(tmp_path / "objects")
    count = len(reader.ids("bolt", "train"))  # the others test
    opened = Store(tmp_path / "prepared", reader, TILED, quarters, {})
    divided, training = good_images(opened, "bolt"), opened.get("bolt", "train").batch
    fifth = np.arange(count) % 5 == 4
    assert count >= 20
    for part, chosen in ((divided.learned, ~fifth), (divided.calibrating.images, fifth)):
        expected = np.asarray(training.images["rgb"]).reshape(count, 6, 20, 20, 3)[chosen].reshape(-1, 20, 20, 3)
        np.testing.assert_array_equal(part.images["rgb"], expected)


def test_altered_tiles_are_compared_with_their_own(root):
    """Copies without any fault would not differ: here each copy's shift is that of its tile."""
    opened = store(root, processing=TILED)
    shifts = quality_shifts(opened, "Confetto")["rgb"]
    degraded, originals = opened.mean_tokens("Confetto")["rgb"], opened.get("Confetto", "train").batch.features["rgb"]
    means = np.asarray(originals).mean(1, dtype=np.float64).reshape(3, 6, 3)
    copies = np.arange(20) % 3
    np.testing.assert_allclose(shifts, degraded - means[copies].reshape(-1, 3))
    assert len(shifts) == 20 * 6


def test_an_image_is_strange_only_if_all_of_its_tiles_are(root):
    images = store(root, processing=TILED).get("Confetto", "train")
    pixels = np.array(images.batch.images["rgb"])
    pixels[[0, 3, 6, 7, 8, 9, 10]] = 0
    dark = images._replace(batch=images.batch._replace(images={"rgb": pixels}))
    assert list(odd_images(dark, "Confetto", "training")) == []
    pixels[11] = 0  # the last tile of the second image
    (told,) = odd_images(dark, "Confetto", "training")
    assert sentences.BLACK_IMAGE.format(id=images.ids[1]) in told


def test_tiles_of_one_image_are_no_two_kinds(root):
    images, rng = store(root, processing=TILED).get("Confetto", "train"), np.random.default_rng(0)
    features = np.tile([0, 9, 0, 9, 0, 9], 10)[:, None, None] + rng.normal(size=(60, 4, 3))
    batch = Batch({"rgb": features.astype(np.float16)}, {}, np.zeros(60, np.int32))
    assert several_kinds(images._replace(batch=batch, ids=tuple("abcdefghij")), "bolt") is None
    features[30:] += 20
    two = images._replace(batch=batch._replace(features={"rgb": features}), ids=tuple("abcdefghij"))
    assert all(kind in several_kinds(two, "bolt") for kind in ("5 like a", "5 like f"))


def test_all_tiles_of_an_image_are_kept(tmp_path):
    shared, numbers = SharedArrays(tmp_path), np.arange(30)
    features = {"rgb": np.broadcast_to(numbers[:, None, None], (30, 4, 2)).astype(np.float16)}
    images = {"rgb": np.zeros((30, 2, 2, 3), np.uint8)}
    good = CalibrationImages(Batch(features, images, np.zeros(30, np.int32)), np.zeros(30, bool))
    kept = load(shared, keep(shared, good, 3, tiles=3), 0)
    expected = [0, 1, 2, 12, 13, 14, 27, 28, 29]  # of the images 0, 4 and 9
    assert kept.images.features["rgb"][:, 0, 0].tolist() == expected
    more = load(shared, keep(shared, good, 12, kept, tiles=3), 0)
    assert more.images.features["rgb"][:, 0, 0].tolist() == [*range(30), 0, 1, 2, 27, 28, 29]
    assert rows_of(np.array([2, 0]), 2).tolist() == [4, 5, 0, 1]


def test_the_size_of_tiles_is_told(root):
    """Tiles of 48 x 16 pixels are three times as wide as tall; the mask of 2 x 3 pixels is 6 / 768 of its tile."""
    strips = dataclasses.replace(RGB, tiles="2x1", overlap=0.0)
    opened = dataclasses.replace(store(root, processing=strips), settings={"grid": 10})
    told = describe_squash(opened, ("Confetto",))
    assert sentences.SMALLEST_DEFECT_OF_TILES.format(size="48x16", share=0.39, tokens=0.78) in told
