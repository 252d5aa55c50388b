"""A run stops at a prepared image with NaN, names it and keeps the earlier step."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import experiment
from iumad_jax.config import small
from iumad_jax.data import readers
from iumad_jax.data.prepared import records
from iumad_jax.data.prepared.store import open_store
from iumad_jax.errors import UserError
from iumad_jax.runtime import snapshots
from tests import sentences
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.slow

KEYS = SMALL | {
    "dataset.name": "folder",
    "modality": "rgb",
    "method": "uniad",
    "baselines": "",
    "train.epochs": 1,
    "train.batch_size": 4,
}


@pytest.fixture(autouse=True)
def _compiled_without_optimisation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_an_image_with_nan_stops_the_run_and_is_named(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("nut", "bolt"):
        folder = tmp_path / "objects" / name / "train" / "good" / "rgb"
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    config, workdir = small("1-1"), tmp_path / "run"
    root = {"dataset.root": str(tmp_path / "objects"), "dataset.objects": "nut,bolt"}
    config.update_from_flattened_dict(KEYS | root)

    store = open_store(config, readers.open_reader(config), workdir)
    manifest = store.prepare("bolt", "train")
    (folder,) = (workdir / "prepared").glob("bolt-*")
    features = np.load(folder / manifest["rows"] / "features_rgb.npy", mmap_mode="r+")
    features[5, 3, 2] = np.nan
    features.flush()
    arrays = {name: np.load(folder / manifest["rows"] / f"{name}.npy") for name in ("features_rgb", "images_rgb")}
    manifest["images"][5]["crc32"] = records.checksum(records.row(arrays, 5))
    records.write_manifest(folder, manifest)

    causes = {}
    for nans in (False, True):  # the second run resumes the first and searches for the operation
        config.debug.nans = nans
        with pytest.raises(UserError) as error:
            experiment.run(config, workdir)
        expected = sentences.IN_STEP.format(what="(.*?)", step=1, epoch=0, update=r"\d+", images="([^;]*)")
        causes[nans], images = re.match(expected, str(error.value)).groups()
        assert "bolt/train/5" in images.split(", ")
        assert len(images.split(", ")) == 4
        assert snapshots.read(workdir).position.step == 0
        events = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "epoch"] == [0]
        assert not (workdir / "results.json").exists()
    assert causes == {
        False: sentences.LOSS_NOT_FINITE.format(term="reconstruction_rgb", value="nan"),
        True: sentences.INPUT_NOT_FINITE.format("images/features/rgb"),
    }
