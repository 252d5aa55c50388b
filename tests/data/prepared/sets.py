"""Small datasets for tests of prepared sets, and an encoder that counts the images it encodes."""

import dataclasses
import shutil

import jax
import numpy as np
import yaml
from PIL import Image

from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.eyecandies import Eyecandies

HEIGHT, WIDTH, SIZE, TEST_IMAGES = 32, 48, 20, 11
SPLITS = {"train": 3, "val": 1, "test_public": TEST_IMAGES}
BELT = 2.0  # distance from the camera in metres; the camera looks straight down at the belt


def scene(seed):
    """Make RGB, depth and mask of a box on the belt, 3 to 20 cm high, and a wall at the left edge of the image."""
    rng = np.random.default_rng(seed)
    depth = np.full((HEIGHT, WIDTH), BELT)
    top, left = rng.integers(8, 14), rng.integers(12, 24)
    depth[top : top + 9, left : left + 12] -= rng.uniform(0.03, 0.2)
    depth[10:22, :2] -= 0.5
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + 2, left : left + 3] = seed % 2
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8), depth, mask


def make_root(tmp_path):
    """Write the scenes in the Eyecandies format."""
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
    """Encode images as the mean colour of each quarter."""
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
    """Resize to 224 x 224 by looking up the source pixel at each pixel's centre."""
    result = np.empty((224, 224), array.dtype)
    for row in range(224):
        for column in range(224):
            result[row, column] = array[int((row + 0.5) * HEIGHT / 224), int((column + 0.5) * WIDTH / 224)]
    return result


def with_rim(mask):
    """Dilate a mask by 3 pixels, by shifting it by every offset within this distance."""
    padded, result = np.pad(mask, 3), np.zeros_like(mask)
    for y in range(-3, 4):
        for x in range(-3, 4):
            if x * x + y * y <= 9:
                result |= padded[3 + y : 3 + y + 224, 3 + x : 3 + x + 224]
    return result


def resized(channel, size):
    return np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BILINEAR))


class Counting:
    """Encoder that counts the images it has encoded; `stop` is called before the second chunk."""

    def __init__(self, stop=None):
        self.images, self.shapes, self._stop = 0, [], stop

    def __call__(self, images):
        if self._stop and self.images:
            self._stop()
        self.images += int((images.reshape(len(images), -1).max(1) > 0).sum())
        self.shapes.append(images.shape)
        return quarters(images)


RGB = dataclasses.replace(PROCESSING, modalities=("rgb",))


def prepare_counted(root, split, stop=None):
    """Get a prepared set as arrays in memory, and the number of images encoded for it."""
    encoder = Counting(stop)
    return in_memory(store(root, processing=RGB, encoder=encoder).get("Confetto", split)), encoder.images


def in_memory(prepared):
    return jax.tree.map(np.array, (prepared.batch, prepared.truth)), prepared.defects, prepared.ids


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def prepare_afresh(root, split):
    """Prepare a set in an empty folder."""
    fresh_store = store(root, processing=RGB, encoder=Counting(), folder=root.parent / "afresh")
    shutil.rmtree(fresh_store.folder, ignore_errors=True)
    return in_memory(fresh_store.get("Confetto", split))
