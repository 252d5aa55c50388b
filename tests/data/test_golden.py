"""Rendered and prepared images against a golden file.

After an intended change, renumber the changed versions in `candies.draw.VERSIONS` or raise `prepared.store.FORMAT`, so
that old and new images are not mixed, and rewrite the golden file: python -m tests.data.test_golden
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest

from iumad_jax.config import small
from iumad_jax.data.candies import render
from iumad_jax.data.candies.draw import VERSIONS
from iumad_jax.data.degradation import degrade, vary
from iumad_jax.data.prepared.store import FORMAT, open_store
from iumad_jax.data.readers.eyecandies import Eyecandies

GOLDEN = Path(__file__).with_name("golden.npz")
NAMES = ("rgb", "depth", "mask")  # arrays of the sample; all others are prepared arrays


def rendered(folder, version):
    """Render an object; return its reader and its last test image, which has a defect."""
    counts = {"train": 1, "val": 1, "test": 4}
    root = render(
        folder / f"candies{version}", **counts, size=96, version=version, objects="LicoriceSandwich", progress=False
    )
    reader = Eyecandies(root, "LicoriceSandwich")
    return reader, reader.read("LicoriceSandwich", "test", reader.ids("LicoriceSandwich", "test")[-1])


def prepared(reader, sample, folder, levels=""):
    """Prepare the image and altered copies of it."""
    config = small("1-0")
    config.backbone.levels = levels
    config.input.size, config.backbone.grid = 64, 4  # smaller than the image, so that it is resized
    store = open_store(config, reader, folder)
    altered = [alter(sample, number, reader.object_height) for alter in (degrade, vary) for number in range(2)]
    encoded = store.encode([sample, *altered])
    features = {f"features_{m}": array for m, array in encoded.batch.features.items()}
    images = {f"images_{m}": array[:1, ::2, ::2] for m, array in encoded.batch.images.items()}
    truth = {name: getattr(encoded.truth, name)[:1, ::4, ::4] for name in ("height", "object", "workpiece", "mask")}
    return features | images | truth


@pytest.fixture(scope="module")
def renderings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return {version: rendered(folder, version) for version in VERSIONS}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_candies_are_unchanged(version, renderings, golden):
    _, sample = renderings[version]
    expected = {name: golden[f"candies{version}_{name}"] for name in NAMES}
    difference = np.abs(sample.rgb.astype(int) - expected["rgb"])
    assert difference.mean() < 0.1
    assert np.isfinite(sample.depth).all()
    assert (np.abs(sample.depth - expected["depth"]) < 1e-4).mean() > 0.999
    assert (sample.mask != expected["mask"]).mean() < 0.001


def test_prepared_images_are_unchanged(renderings, golden, tmp_path):
    """The golden sample is prepared, so that the renderer has no influence; sums may differ between processors."""
    reader, sample = renderings[1]
    assert golden["format"] == FORMAT
    sample = dataclasses.replace(sample, **{name: golden[f"candies1_{name}"] for name in NAMES})
    for name, array in prepared(reader, sample, tmp_path).items():
        expected = golden[name].astype(np.float64)
        difference = np.abs(np.nan_to_num(array.astype(np.float64)) - np.nan_to_num(expected))
        assert difference.mean() < 2e-3 * np.nanstd(expected), name


def test_features_of_chosen_levels_are_among_those_of_all(renderings, tmp_path):
    every, chosen = (prepared(*renderings[1], tmp_path, levels) for levels in ("", "8,16"))
    expected = every["features_rgb"][..., 40:]
    # Values near zero are differences of large ones, so their error is relative to the spread of the features.
    np.testing.assert_allclose(chosen["features_rgb"], expected, rtol=2e-3, atol=1e-4 * expected.std(dtype=np.float64))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        candies = {version: rendered(Path(folder), version) for version in VERSIONS}
        arrays = prepared(*candies[1], Path(folder))
    for version, (_, sample) in candies.items():
        arrays |= {f"candies{version}_{name}": getattr(sample, name) for name in NAMES}
    np.savez_compressed(GOLDEN, format=FORMAT, **arrays)
