"""Prepared images against an independent computation from the raw files; and when they are prepared again."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from scipy import ndimage

from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.errors import UserError
from tests import sentences
from tests.data.prepared.sets import (
    BELT,
    PROCESSING,
    RGB,
    SIZE,
    SPLITS,
    TEST_IMAGES,
    WIDTH,
    Counting,
    assert_same,
    in_memory,
    make_root,
    nearest,
    prepare_afresh,
    prepare_counted,
    quarters,
    resized,
    scene,
    store,
    with_rim,
)


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path)


def test_prepared_arrays_match_the_raw_files(root):
    test = store(root).get("Confetto", "test")
    assert test.ids == tuple(f"{i:02d}" for i in range(TEST_IMAGES))
    assert test.defects == tuple("dents" if i % 2 else "good" for i in range(TEST_IMAGES))
    np.testing.assert_array_equal(test.truth.anomalous, np.arange(TEST_IMAGES) % 2 == 1)
    np.testing.assert_array_equal(test.batch.object_id, np.zeros(TEST_IMAGES))
    for i in range(TEST_IMAGES):
        rgb, depth, mask = scene(i)
        np.testing.assert_array_equal(test.truth.mask[i], nearest(mask))
        np.testing.assert_allclose(test.truth.height[i], nearest(BELT - depth), atol=2e-5)
        np.testing.assert_array_equal(test.truth.thumbnail[i], resized(rgb, 224))
        raised = depth < BELT - 0.008
        box = raised & (np.arange(WIDTH) >= 2)
        np.testing.assert_array_equal(test.truth.object[i], with_rim(nearest(raised)))
        np.testing.assert_array_equal(test.truth.workpiece[i], with_rim(nearest(box)))
        small = resized(rgb, SIZE)
        np.testing.assert_array_equal(test.batch.images["rgb"][i], small)
        height = resized(((BELT - depth) * 255).astype(np.float32), SIZE)
        for channel in range(3):
            np.testing.assert_allclose(test.batch.images["depth"][i, ..., channel], height, atol=0.05)
        for images, features in [(small, "rgb"), (np.stack([height] * 3, -1), "depth")]:
            half = SIZE // 2
            means = [images[y : y + half, x : x + half].mean((0, 1), dtype=float) for y in (0, half) for x in (0, half)]
            np.testing.assert_allclose(test.batch.features[features][i], means, rtol=1e-3, atol=0.05)
            assert test.batch.features[features].dtype == np.float16


def test_training_images_have_no_truth_and_arrays_stay_on_disk(root):
    opened = store(root)
    train = opened.get("Confetto", "train")
    assert train.truth is None
    for array in [*train.batch.features.values(), *train.batch.images.values()]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert len(array) == 3
    assert {p.stem for p in opened.folder.glob("*/*/*.npy")} == {
        f"{kind}_{m}" for kind in ("features", "images") for m in ("rgb", "depth")
    }


def test_samples_in_memory_are_prepared_like_those_on_disk(root):
    opened = store(root)
    stored = opened.get("Confetto", "test")
    samples = [opened.reader.read("Confetto", "test", id_) for id_ in opened.reader.ids("Confetto", "test")]
    encoded = opened.encode(iter(samples))
    assert (encoded.ids, encoded.defects) == (stored.ids, stored.defects)
    for actual, expected in zip(*map(jax.tree.leaves, (encoded, stored)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_digests_depend_only_on_file_contents(root):
    before = store(root).digests("Confetto", "train")
    opened = store(root)
    opened.prepare("Confetto", "train")
    file = root / "Confetto/train/data/01_image_4.png"
    os.utime(file, (1, 1))
    assert opened.digests("Confetto", "train") == before
    shutil.copy(root / "Confetto/train/data/02_image_4.png", file)
    after = opened.digests("Confetto", "train")
    assert [id_ for id_ in before if before[id_] != after[id_]] == ["01"]
    assert opened.digests("Confetto", "unlabelled") == {}


def test_object_id_is_the_index_of_the_object(root):
    for split in SPLITS:
        (root / "GummyBear" / split).mkdir(parents=True)
        (root / "GummyBear" / split / "data").symlink_to(root / "Confetto" / split / "data")
    reader = Eyecandies(root, "Confetto,GummyBear")
    assert store(root, reader=reader).get("GummyBear", "train").batch.object_id.tolist() == [1, 1, 1]


class Unlabelled(Eyecandies):
    """Reader that offers the test images without labels as the unlabelled split."""

    def ids(self, object, split):
        return super().ids(object, "test" if split == "unlabelled" else split)

    def files(self, object, split, id):
        return super().files(object, "test" if split == "unlabelled" else split, id)

    def read(self, object, split, id):
        return dataclasses.replace(super().read(object, "test", id), defect="unknown", mask=None, anomalous=False)


def test_unlabelled_images_have_the_arrays_for_figures(root):
    test = store(root).get("Confetto", "test")
    unlabelled = store(root, reader=Unlabelled(root, "Confetto")).get("Confetto", "unlabelled")
    assert not unlabelled.truth.masked.any()
    for name in ("thumbnail", "height", "object", "workpiece"):
        np.testing.assert_array_equal(getattr(unlabelled.truth, name), getattr(test.truth, name))
    jax.tree.map(np.testing.assert_array_equal, unlabelled.batch, test.batch)


def test_images_are_encoded_once_in_batches_of_one_size(root):
    """A second call, and another store with the same settings, reuse the images."""
    encoder = Counting()
    opened = store(root, processing=RGB, encoder=encoder)
    first = opened.get("Confetto", "test")
    assert encoder.shapes == [(2, SIZE, SIZE, 3)] * 6  # 11 images, padded
    opened.get("Confetto", "test")
    assert encoder.images == TEST_IMAGES
    again, encoded = prepare_counted(root, "test")
    assert encoded == 0
    assert_same(again, in_memory(first))


NAMES = ["image_4.png", "depth.png", "info_depth.yaml", "mask.png", "metadata.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_image_of_a_changed_file_is_prepared_again(root, name):
    """The change is detected even if the file's size and mtime stay the same."""
    before, _ = prepare_counted(root, "test")
    file = root / "Confetto" / "test_public" / "data" / f"02_{name}"
    stat, content = file.stat(), file.read_bytes()
    other = file.with_name(f"03_{name}").read_bytes().replace(b"min: 1.5", b"min: 1.4")
    file.write_bytes(other)
    assert content != other
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, encoded = prepare_counted(root, "test")
    assert encoded == 1
    assert_same(after, prepare_afresh(root, "test"))
    assert (after[1] != before[1]) == ("meta" in name)
    (home,) = (root.parent / "prepared").iterdir()
    assert len(list(home.glob("rows-*"))) == 1  # the outdated rows are removed


def test_a_newer_file_with_the_same_content_changes_nothing(root):
    prepare_counted(root, "train")
    (manifest,) = (root.parent / "prepared").glob("*/manifest.json")
    arrays = {file: file.stat().st_mtime_ns for file in root.parent.glob("prepared/*/*/*.npy")}
    file = root / "Confetto" / "train" / "data" / "01_image_4.png"
    os.utime(file, ns=(0, 12345))
    _, encoded = prepare_counted(root, "train")
    assert encoded == 0
    assert {file: file.stat().st_mtime_ns for file in root.parent.glob("prepared/*/*/*.npy")} == arrays
    source = json.loads(manifest.read_text())["manifest"]["images"][1]["sources"][str(file)]
    assert source["stamp"][1] == 12345  # so that the file is not hashed again


def test_a_set_is_readable_without_write_access(root, files_no_larger_than):
    prepare_counted(root, "train")
    os.utime(root / "Confetto" / "train" / "data" / "01_image_4.png", ns=(0, 12345))
    with files_no_larger_than(0):
        _, encoded = prepare_counted(root, "train")
    assert encoded == 0


def test_images_are_added_and_removed(root):
    """Only added images are prepared, whatever their position."""
    prepare_counted(root, "test")
    data = root / "Confetto" / "test_public" / "data"
    for file in data.glob("05_*"):
        file.rename(file.with_name(file.name.replace("05_", "5000_")))
    for file in data.glob("03_*"):
        file.unlink()
    after, encoded = prepare_counted(root, "test")
    assert encoded == 1  # the renamed image
    assert after[2] == ("00", "01", "02", "04", "06", "07", "08", "09", "10", "5000")
    assert_same(after, prepare_afresh(root, "test"))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 10},
        {"depth_encoding": "normals"},
        {"modalities": ("rgb",)},
        {"object_height": 0.1},
        {"region": "0,0,0.5,1"},
        {},
    ],
    ids=lambda change: next(iter(change), "backbone"),
)
def test_a_changed_setting_is_detected(root, change):
    opened, other = store(root), store(root, processing=dataclasses.replace(PROCESSING, **change))
    if not change:
        other = store(root, settings={"backbone": "halves"})
    opened.get("Confetto", "train")
    changed = other.get("Confetto", "train")
    assert len(list(opened.folder.iterdir())) == 2
    alone = dataclasses.replace(other, folder=root.parent / "alone").get("Confetto", "train")
    jax.tree.map(np.testing.assert_array_equal, changed.batch, alone.batch)


def test_features_too_large_for_their_type_are_refused(root):
    with pytest.raises(UserError, match=sentences.FEATURES_TOO_LARGE.format("float16")):
        store(root, lambda images: quarters(images) * 1e4).get("Confetto", "train")


def test_a_split_without_images_is_refused(root):
    class Empty(Eyecandies):
        def ids(self, object, split):
            return ()

    with pytest.raises(UserError, match=sentences.SPLIT_WITHOUT_IMAGES.format(object="Confetto", split="calibration")):
        store(root, reader=Empty(root, "Confetto")).get("Confetto", "calibration")


def test_an_unwritable_folder_is_refused(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentences.PREPARED_FOLDER_UNUSABLE.format("Not a directory")):
        store(root, folder=tmp_path / "file" / "prepared").get("Confetto", "train")


def test_training_images_tell_on_request_where_defects_may_lie(root):
    """On the box that stands on the belt, without the wall that the image's edge cuts off."""
    plain, keeping = store(root), store(root, keeps_foreground=True)
    kept = keeping.get("Confetto", "train").batch
    for i in range(SPLITS["train"]):
        raised = nearest(scene(i)[1] < BELT - 0.008)
        raised[:, :20] = False
        np.testing.assert_array_equal(kept.foreground[i], ndimage.binary_erosion(with_rim(raised), disc(3)))
    assert plain.get("Confetto", "train").batch.foreground is None
    assert keeping.get("Confetto", "test").batch.foreground is None
    tiled = store(root, keeps_foreground=True, processing=dataclasses.replace(PROCESSING, tiles="1x2"))
    halves = tiled.get("Confetto", "train").batch.foreground
    assert halves.shape == (2 * SPLITS["train"], 224, 224)
    left = kept.foreground[0][:, :112]
    assert halves[0].mean() == pytest.approx(left.mean(), abs=0.01)


def disc(radius):
    return np.hypot(*np.ogrid[-radius : radius + 1, -radius : radius + 1]) <= radius
