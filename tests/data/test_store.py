"""Prepared images against the raw files, computed another way; and when they are prepared anew."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from iumad_jax.data.eyecandies import Eyecandies
from iumad_jax.data.processing import Processing
from iumad_jax.data.store import Store
from iumad_jax.errors import UserError

HEIGHT, WIDTH, SIZE, TEST_IMAGES = 32, 48, 20, 11
SPLITS = {"train": 3, "val": 1, "test_public": TEST_IMAGES}
BELT = 2.0  # metres from the camera, which looks straight down on it


def scene(seed):
    """Raw arrays: a box on the belt, 3 to 20 cm high, and a wall at the left edge of the image."""
    rng = np.random.default_rng(seed)
    depth = np.full((HEIGHT, WIDTH), BELT)
    top, left = rng.integers(8, 14), rng.integers(12, 24)
    depth[top : top + 9, left : left + 12] -= rng.uniform(0.03, 0.2)
    depth[10:22, :2] -= 0.5
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + 2, left : left + 3] = seed % 2
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8), depth, mask


@pytest.fixture
def root(tmp_path):
    for split, count in SPLITS.items():
        data = tmp_path / "raw" / "Confetto" / split / "data"
        data.mkdir(parents=True)
        for i in range(count):
            rgb, depth, mask = scene(i)
            mask &= split == "test_public"
            low, high = depth.min(), depth.max()
            levels = np.round((depth - low) / (high - low) * 65535).astype(np.uint16)
            for name, array in {"image_4": rgb, "depth": levels, "mask": mask.astype(np.uint8) * 255}.items():
                Image.fromarray(array).save(data / f"{i:02d}_{name}.png")
            span = {"normalization": {"max": float(high), "min": float(low)}}
            (data / f"{i:02d}_info_depth.yaml").write_text(yaml.safe_dump(span))
            kinds = {f"anomalous_{kind}": 0 for kind in ("bumps", "dents", "colors", "normals")}
            labels = {"anomalous": int(mask.any()), **kinds, "anomalous_dents": int(mask.any())}
            (data / f"{i:02d}_metadata.yaml").write_text(yaml.safe_dump(labels))
    return tmp_path / "raw"


def quarters(images):
    """The encoder of these tests: the mean colour of each quarter."""
    b, s, _, c = images.shape
    return images.reshape(b, 2, s // 2, 2, s // 2, c).mean((2, 4))


PROCESSING = Processing(("rgb", "depth"), SIZE, "height", Eyecandies.height_range, Eyecandies.object_height)


def store(root, encoder=quarters, **changes):
    settings = {
        "folder": root.parent / "prepared",
        "reader": Eyecandies(root, "Confetto"),
        "processing": PROCESSING,
        "encoder": jax.jit(encoder),
        "settings": {"backbone": "quarters"},
    }
    return Store(**(settings | changes))


def nearest(array):
    """At 224 x 224, each pixel's centre looked up by itself."""
    result = np.empty((224, 224), array.dtype)
    for row in range(224):
        for column in range(224):
            result[row, column] = array[int((row + 0.5) * HEIGHT / 224), int((column + 0.5) * WIDTH / 224)]
    return result


def with_rim(mask):
    """Every pixel no more than 3 from one of the mask, by shifting the mask to all of these places."""
    padded, result = np.pad(mask, 3), np.zeros_like(mask)
    for y in range(-3, 4):
        for x in range(-3, 4):
            if x * x + y * y <= 9:
                result |= padded[3 + y : 3 + y + 224, 3 + x : 3 + x + 224]
    return result


def resized(channel, size):
    return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR))


def test_prepared_arrays_are_those_of_the_raw_files(root):
    test = store(root).get("Confetto", "test")
    assert test.ids == tuple(f"{i:02d}" for i in range(TEST_IMAGES))
    assert test.defects == tuple("dents" if i % 2 else "good" for i in range(TEST_IMAGES))
    np.testing.assert_array_equal(test.truth.anomalous, np.arange(TEST_IMAGES) % 2 == 1)
    np.testing.assert_array_equal(test.batch.object_id, np.zeros(TEST_IMAGES))
    for i in range(TEST_IMAGES):
        rgb, depth, mask = scene(i)
        np.testing.assert_array_equal(test.truth.mask[i], nearest(mask))
        np.testing.assert_allclose(test.truth.depth[i], nearest(depth), atol=2e-5)
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
            np.testing.assert_allclose(test.batch.features[features][i], means, atol=0.05)


def test_training_images_have_no_truth_and_arrays_stay_on_disk(root):
    one = store(root)
    train = one.get("Confetto", "train")
    assert train.truth is None
    for array in [*train.batch.features.values(), *train.batch.images.values()]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert len(array) == 3
    assert {p.stem for p in one.folder.glob("*/*.npy")} == {
        f"{kind}_{m}" for kind in ("features", "images") for m in ("rgb", "depth")
    }


def test_an_object_is_known_by_its_place(root):
    for split in SPLITS:
        (root / "GummyBear" / split).mkdir(parents=True)
        (root / "GummyBear" / split / "data").symlink_to(root / "Confetto" / split / "data")
    reader = Eyecandies(root, "Confetto,GummyBear")
    assert store(root, reader=reader).get("GummyBear", "train").batch.object_id.tolist() == [1, 1, 1]


def test_images_are_encoded_once_in_batches_of_one_size(root):
    """The second time, and another store of the same settings, find what is there."""
    traced, encoded = [], []

    def encoder(images):
        traced.append(images.shape)
        jax.debug.callback(lambda: encoded.append(1))
        return quarters(images)

    first = store(root, encoder, processing=dataclasses.replace(PROCESSING, modalities=("rgb",))).get(
        "Confetto", "test"
    )
    jax.effects_barrier()
    assert len(traced) == 1
    assert len(encoded) == 2  # 8 images and 3
    again = store(root, encoder, processing=dataclasses.replace(PROCESSING, modalities=("rgb",))).get(
        "Confetto", "test"
    )
    jax.effects_barrier()
    assert len(encoded) == 2
    np.testing.assert_array_equal(first.batch.features["rgb"], again.batch.features["rgb"])


def later(file: Path) -> None:
    """The same bytes, written again."""
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("name", ["image_4.png", "depth.png", "info_depth.yaml", "mask.png", "metadata.yaml"])
def test_a_changed_file_is_noticed(root, name):
    one = store(root)
    one.get("Confetto", "train")
    later(root / "Confetto" / "train" / "data" / f"01_{name}")
    one.get("Confetto", "train")
    assert len(list(one.folder.iterdir())) == 2


def test_changed_pixels_arrive(root):
    before = np.array(store(root).get("Confetto", "train").batch.images["rgb"])
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(
        root / "Confetto" / "train" / "data" / "01_image_4.png"
    )
    after = store(root).get("Confetto", "train").batch.images["rgb"]
    assert not after[1].any()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(
    "change",
    [{"size": 10}, {"depth_encoding": "normals"}, {"modalities": ("rgb",)}, {"object_height": 0.1}, {}],
    ids=lambda change: next(iter(change), "backbone"),
)
def test_a_changed_setting_is_noticed(root, change):
    one, other = store(root), store(root, processing=dataclasses.replace(PROCESSING, **change))
    if not change:
        other = store(root, settings={"backbone": "halves"})
    one.get("Confetto", "train")
    found = other.get("Confetto", "train")
    assert len(list(one.folder.iterdir())) == 2
    alone = dataclasses.replace(other, folder=root.parent / "alone").get("Confetto", "train")
    jax.tree.map(np.testing.assert_array_equal, found.batch, alone.batch)


def test_an_interrupted_preparation_is_not_taken_for_complete(root):
    def interrupted(images):
        raise KeyboardInterrupt

    def killed(folder):
        """What a killed process leaves."""
        unfinished = folder.with_name(folder.name + ".unfinished")
        folder.rename(unfinished)
        (unfinished / "images_rgb.npy").write_bytes(b"half")
        (unfinished / "junk.npy").touch()

    with pytest.raises(KeyboardInterrupt):
        store(root, interrupted).get("Confetto", "train")
    folder = store(root).folder
    assert not list(folder.iterdir())
    whole = jax.tree.map(np.array, store(root).get("Confetto", "train").batch)
    (prepared,) = folder.iterdir()
    killed(prepared)
    jax.tree.map(np.testing.assert_array_equal, store(root).get("Confetto", "train").batch, whole)
    assert list(folder.iterdir()) == [prepared]


def test_a_bad_image_leaves_nothing(root):
    file = root / "Confetto" / "test_public" / "data" / "09_depth.png"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"09_depth\.png cannot be read"):
        store(root).get("Confetto", "test")
    assert not list(store(root).folder.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(root, files_no_larger_than):
    with files_no_larger_than(100_000), pytest.raises(UserError, match=r"cannot be prepared \(File too large\); make"):
        store(root).get("Confetto", "test")
    assert not list(store(root).folder.iterdir())


def test_a_place_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be prepared \(Not a directory\).* --config\.dataset\.prepared"):
        store(root, folder=tmp_path / "file" / "prepared").get("Confetto", "train")
