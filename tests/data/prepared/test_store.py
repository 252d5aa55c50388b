"""Prepared images against the raw files, computed another way; and when they are prepared anew."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.eyecandies import Eyecandies
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
        "encoder": encoder,
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
    one = store(root)
    train = one.get("Confetto", "train")
    assert train.truth is None
    for array in [*train.batch.features.values(), *train.batch.images.values()]:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert len(array) == 3
    assert {p.stem for p in one.folder.glob("*/*/*.npy")} == {
        f"{kind}_{m}" for kind in ("features", "images") for m in ("rgb", "depth")
    }


def test_samples_that_are_not_kept_are_prepared_as_those_that_are(root):
    opened = store(root)
    kept = opened.get("Confetto", "test")
    read = [opened.reader.read("Confetto", "test", id_) for id_ in opened.reader.ids("Confetto", "test")]
    found = opened.encode(iter(read))
    assert (found.ids, found.defects) == (kept.ids, kept.defects)
    for one, other in zip(*map(jax.tree.leaves, (found, kept)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_digests_follow_the_content_of_files_alone(root):
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


def test_an_object_is_known_by_its_place(root):
    for split in SPLITS:
        (root / "GummyBear" / split).mkdir(parents=True)
        (root / "GummyBear" / split / "data").symlink_to(root / "Confetto" / split / "data")
    reader = Eyecandies(root, "Confetto,GummyBear")
    assert store(root, reader=reader).get("GummyBear", "train").batch.object_id.tolist() == [1, 1, 1]


class Unlabelled(Eyecandies):
    """The test images, as somebody has them who does not know their defects."""

    def ids(self, object, split):
        return super().ids(object, "test" if split == "unlabelled" else split)

    def files(self, object, split, id):
        return super().files(object, "test" if split == "unlabelled" else split, id)

    def read(self, object, split, id):
        return dataclasses.replace(super().read(object, "test", id), defect="unknown", mask=None, anomalous=False)


def test_of_unlabelled_images_there_is_what_pictures_show(root):
    test = store(root).get("Confetto", "test")
    found = store(root, reader=Unlabelled(root, "Confetto")).get("Confetto", "unlabelled")
    assert not found.truth.masked.any()
    for name in ("thumbnail", "height", "object", "workpiece"):
        np.testing.assert_array_equal(getattr(found.truth, name), getattr(test.truth, name))
    jax.tree.map(np.testing.assert_array_equal, found.batch, test.batch)


class Counting:
    """An encoder that knows how many images it has encoded; `stop` is called before the second chunk."""

    def __init__(self, stop=None):
        self.images, self.shapes, self._stop = 0, [], stop

    def __call__(self, images):
        if self._stop and self.images:
            self._stop()
        self.images += int((images.reshape(len(images), -1).max(1) > 0).sum())
        self.shapes.append(images.shape)
        return quarters(images)


RGB = dataclasses.replace(PROCESSING, modalities=("rgb",))


def counted(root, split, stop=None):
    """A prepared set as arrays in memory, and how many images had to be encoded for it."""
    encoder = Counting(stop)
    return copied(store(root, processing=RGB, encoder=encoder).get("Confetto", split)), encoder.images


def copied(prepared):
    return jax.tree.map(np.array, (prepared.batch, prepared.truth)), prepared.defects, prepared.ids


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def afresh(root, split):
    """The same set, prepared in an empty folder."""
    one = store(root, processing=RGB, encoder=Counting(), folder=root.parent / "afresh")
    shutil.rmtree(one.folder, ignore_errors=True)
    return copied(one.get("Confetto", split))


def test_images_are_encoded_once_in_batches_of_one_size(root):
    """The second time, and another store of the same settings, find what is there."""
    encoder = Counting()
    one = store(root, processing=RGB, encoder=encoder)
    first = one.get("Confetto", "test")
    assert encoder.shapes == [(2, SIZE, SIZE, 3)] * 6  # of 11 images
    one.get("Confetto", "test")
    assert encoder.images == TEST_IMAGES
    again, encoded = counted(root, "test")
    assert encoded == 0
    assert_same(again, copied(first))


NAMES = ["image_4.png", "depth.png", "info_depth.yaml", "mask.png", "metadata.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_image_of_a_changed_file_is_prepared_anew(root, name):
    """Noticed even if its size and the time of its last change stay what they were."""
    before, _ = counted(root, "test")
    file = root / "Confetto" / "test_public" / "data" / f"02_{name}"
    stat, content = file.stat(), file.read_bytes()
    other = file.with_name(f"03_{name}").read_bytes().replace(b"min: 1.5", b"min: 1.4")
    file.write_bytes(other)
    assert content != other
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, encoded = counted(root, "test")
    assert encoded == 1
    assert_same(after, afresh(root, "test"))
    assert (after[1] != before[1]) == ("meta" in name)
    (home,) = (root.parent / "prepared").iterdir()
    assert len(list(home.glob("rows-*"))) == 1  # what it took the place of is gone


def test_a_file_that_is_merely_newer_changes_nothing(root):
    counted(root, "train")
    (manifest,) = (root.parent / "prepared").glob("*/manifest.json")
    arrays = {file: file.stat().st_mtime_ns for file in root.parent.glob("prepared/*/*/*.npy")}
    file = root / "Confetto" / "train" / "data" / "01_image_4.png"
    os.utime(file, ns=(0, 12345))
    _, encoded = counted(root, "train")
    assert encoded == 0
    assert {file: file.stat().st_mtime_ns for file in root.parent.glob("prepared/*/*/*.npy")} == arrays
    noted = json.loads(manifest.read_text())["manifest"]["images"][1]["sources"][str(file)]
    assert noted["stamp"][1] == 12345  # its hash need not be taken again


def test_a_set_is_read_where_nothing_can_be_written(root, files_no_larger_than):
    counted(root, "train")
    os.utime(root / "Confetto" / "train" / "data" / "01_image_4.png", ns=(0, 12345))
    with files_no_larger_than(0):
        _, encoded = counted(root, "train")
    assert encoded == 0


def test_images_come_and_go(root):
    """Only those that come are prepared, wherever they stand among the others."""
    counted(root, "test")
    data = root / "Confetto" / "test_public" / "data"
    for file in data.glob("05_*"):
        file.rename(file.with_name(file.name.replace("05_", "5000_")))
    for file in data.glob("03_*"):
        file.unlink()
    after, encoded = counted(root, "test")
    assert encoded == 1  # of another name
    assert after[2] == ("00", "01", "02", "04", "06", "07", "08", "09", "10", "5000")
    assert_same(after, afresh(root, "test"))


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


def test_an_interrupted_preparation_goes_on(root):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counted(root, "test", interrupted)
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    after, encoded = counted(root, "test")
    assert encoded == 9  # the first two stayed
    assert_same(after, afresh(root, "test"))


def prepare_in_a_process(root, then):
    """Another process that prepares the test images; before the second chunk it dies, or waits for a file."""
    return subprocess.Popen(
        [sys.executable, __file__, root, then], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_preparation_goes_on(root):
    """Also where the kill left the middle of a line in its journal and of a row in its arrays."""
    with prepare_in_a_process(root, "die") as process:
        assert process.wait() == -signal.SIGKILL
    (journal,) = root.parent.glob("prepared/*/rows-*/journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines)[:-20])
    with journal.with_name("images_rgb.npy").open("r+b") as file:
        file.seek(128 + 2 * SIZE * SIZE * 3)
        file.write(b"half a row")
    after, encoded = counted(root, "test")
    assert encoded == 10  # of the first two, one is not known to be whole
    assert_same(after, afresh(root, "test"))


def test_two_processes_prepare_at_once(root):
    """One waits and finds what the other has prepared."""
    with prepare_in_a_process(root, "wait") as first:
        while not any(journal.stat().st_size > 99 for journal in root.parent.glob("prepared/*/rows-*/journal")):
            assert first.poll() is None
            time.sleep(0.01)
        with prepare_in_a_process(root, "wait") as second:
            told = second.stderr.readline()
            assert re.fullmatch(r".*Confetto-test-\w+: another process prepares this; waiting for it\.\n", told)
            (root / "go").touch()
            assert first.communicate() == (str(TEST_IMAGES), "")
            assert second.communicate() == ("0", "")
    after, encoded = counted(root, "test")
    assert encoded == 0
    assert_same(after, afresh(root, "test"))


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def respell(file):
    """The header as valid as before but in other letters, and the first row harmed."""
    file.write_bytes(file.read_bytes().replace(b"'descr': ", b"'descr' :", 1))
    flip(file, 128)


DAMAGE = {
    "a bit of an image": ("images_rgb.npy", lambda file: flip(file, 128 + SIZE * SIZE * 3 * 4 + 77), 1),
    "a bit of the last features": ("features_rgb.npy", lambda file: flip(file, -1), 1),
    "a bit of a mask": ("mask.npy", lambda file: flip(file, 128), 1),
    "a type": ("features_rgb.npy", lambda file: file.write_bytes(file.read_bytes().replace(b"<f2", b"<i2", 1)), 11),
    "a header, and a row": ("anomalous.npy", respell, 11),
    "half a file": ("features_rgb.npy", lambda file: os.truncate(file, file.stat().st_size // 2), 11),
    "an empty file": ("thumbnail.npy", lambda file: os.truncate(file, 0), 11),
    "a missing file": ("height.npy", Path.unlink, 11),
    "a missing folder": ("height.npy", lambda file: shutil.rmtree(file.parent), 11),
    "a letter of the manifest": (
        "../manifest.json",
        lambda file: file.write_text(file.read_text().replace('"defect": "good"', '"defect": "hood"', 1)),
        11,
    ),
    "half a manifest": ("../manifest.json", lambda file: os.truncate(file, 100), 11),
}


@pytest.mark.parametrize(("name", "harm", "lost"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_repaired(root, capfd, name, harm, lost):
    before, _ = counted(root, "test")
    (folder,) = root.parent.glob("prepared/*/rows-*")
    harm(folder / name)
    capfd.readouterr()
    after, encoded = counted(root, "test")
    assert encoded == lost
    assert_same(after, before)
    told = capfd.readouterr().err
    if "json" not in name and folder.exists() and lost < 11:
        assert f"{lost} of 11 images are damaged and prepared again." in told
    assert counted(root, "test")[1] == 0


def test_a_bad_image_leaves_no_set_but_those_before_it(root):
    file = root / "Confetto" / "test_public" / "data" / "09_depth.png"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"09_depth\.png cannot be read"):
        counted(root, "test")
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    file.write_bytes(content)
    after, encoded = counted(root, "test")
    assert encoded in (3, 5, 7, 9, 11)  # of the first eight, pairs were done while the ninth was read
    assert_same(after, afresh(root, "test"))


@pytest.mark.parametrize("size", [0, 20_000, 100_000, 1_000_000])
def test_a_full_disk_is_told_and_nothing_lost(root, files_no_larger_than, size):
    with (
        files_no_larger_than(size),
        pytest.raises(UserError, match=r"cannot be prepared \(File too large\); make room .* is kept\."),
    ):
        counted(root, "test")
    assert not list(root.parent.glob("prepared/*/manifest.json"))
    assert_same(counted(root, "test")[0], afresh(root, "test"))


def test_features_too_large_for_their_type_are_refused(root):
    with pytest.raises(UserError, match="features do not fit float16"):
        store(root, lambda images: quarters(images) * 1e4).get("Confetto", "train")


def test_a_split_without_images_is_refused(root):
    class Empty(Eyecandies):
        def ids(self, object, split):
            return ()

    with pytest.raises(UserError, match="Confetto has no calibration images; add some"):
        store(root, reader=Empty(root, "Confetto")).get("Confetto", "calibration")


def test_a_place_that_cannot_be_written(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be prepared \(Not a directory\).* --config\.dataset\.prepared"):
        store(root, folder=tmp_path / "file" / "prepared").get("Confetto", "train")


if __name__ == "__main__":  # the other process of some tests

    def wait():
        latest = time.monotonic() + 60
        while not (Path(sys.argv[1]) / "go").exists() and time.monotonic() < latest:
            time.sleep(0.01)

    counting = Counting({"die": lambda: os.kill(os.getpid(), signal.SIGKILL), "wait": wait}[sys.argv[2]])
    store(Path(sys.argv[1]), processing=RGB, encoder=counting).get("Confetto", "test")
    print(counting.images, end="")
