"""With few or odd training images, a run reports them and ends with a usable model without NaN."""

import sys

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import Detector, experiment, prepare
from iumad_jax.config import small
from iumad_jax.runtime import snapshots
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]
KEYS = SMALL | {
    "dataset.name": "folder",
    "dataset.root": "objects",
    "modality": "rgb",
    "backbone.grid": 4,
    "train.batch_size": 4,
    "memory_bank.megabytes": 0.02,
    "continual.replay.rank": 2,
    "continual.replay.image_size": 8,
}


def draw(seed, number, hole=False):
    """Draw stripes, whose width depends on the object, with noise and a shift, which differ between images."""
    rng = np.random.default_rng([seed, number])
    stripes = 100 + 60 * ((np.arange(64) + rng.integers(3)) // (2 + 3 * seed) % 2)
    pixels = stripes[None, :, None] + rng.normal(0, 8, (64, 64, 3))
    if hole:
        pixels[20:44, 20:44] = 250
    return pixels.round().clip(0, 255).astype(np.uint8)


def save(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def add_object(root, name, seed, training):
    save(root / name / "train/good/rgb", training)
    save(root / name / "test/good/rgb", [draw(seed, number) for number in range(100, 104)])
    save(root / name / "test/hole/rgb", [draw(seed, number, hole=True) for number in range(200, 204)])


def config(**changes):
    config = small("1-1")
    config.update_from_flattened_dict(KEYS | changes)
    return config


@pytest.mark.parametrize(("count", "method"), [(1, "ib_iumad"), (4, "feature_norm")])
def test_a_second_object_with_few_images(tmp_path, monkeypatch, capsys, count, method):
    """The model detects its defects without a bound on false alarms, and recognises the first object as before."""
    monkeypatch.chdir(tmp_path)
    add_object(tmp_path / "objects", "bolt", 0, [draw(0, number) for number in range(20)])
    add_object(tmp_path / "objects", "nut", 1, [draw(1, number) for number in range(count)])
    results = experiment.run(config(method=method), tmp_path / "run")
    message = sentences.BATCHES_OF_ONE.format(1) + "\n"
    assert (message in capsys.readouterr().err) == (method == "ib_iumad")
    first, last = (step["objects"] for step in results["decisions"])
    assert last["nut"]["image"]["false_alarm_bound"] is None
    assert last["bolt"]["test"]["recognised"] == last["nut"]["test"]["recognised"] == 1
    assert last["bolt"]["test"]["taken_as_unknown"] <= first["bolt"]["test"]["taken_as_unknown"]
    detector = Detector.load(tmp_path / "run")
    good, hole = (detector(np.stack([draw(1, n, hole) for n in range(300, 306)])) for hole in (False, True))
    assert good.object.tolist() == ["nut"] * 6
    assert not good.unknown.any()
    assert good.anomalous.mean() < 0.5 < hole.anomalous.mean()
    assert np.isfinite(good.score).all()


def test_a_single_training_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_object(tmp_path / "objects", "bolt", 0, [draw(0, 0)])
    results = experiment.run(config(protocol="1-0", method="feature_norm"), tmp_path / "run")
    decisions = results["decisions"][0]["objects"]["bolt"]
    assert decisions["test"]["recognised"] == 1
    assert decisions["test"]["taken_as_unknown"] < 1
    assert decisions["test"]["false_alarms"] < 1
    assert decisions["image"]["false_alarm_bound"] is None


BLACK, WHITE, GREY = (np.full((64, 64, 3), value, np.uint8) for value in (0, 255, 90))
ODD = {
    "black": ([draw(0, 0), BLACK], sentences.IMAGES_BLACK.format(count=1, object="bolt", all=8, which="001")),
    "saturated": (
        [WHITE, draw(0, 0)],
        sentences.IMAGES_SATURATED.format(count=1, object="bolt", all=8, which="000"),
    ),
    "constant": (
        [GREY, GREY + 1],
        sentences.IMAGES_OF_ONE_COLOUR.format(count=2, object="bolt", all=8, which="000, 001"),
    ),
    "identical": (
        [draw(0, 1)] * 2,
        sentences.IMAGES_IDENTICAL.format(count=1, object="bolt", all=8, which="001"),
    ),
}


@pytest.mark.parametrize(("images", "message"), ODD.values(), ids=ODD)
def test_odd_images_are_reported_and_learned(tmp_path, monkeypatch, capsys, images, message):
    monkeypatch.chdir(tmp_path)
    add_object(tmp_path / "objects", "bolt", 0, images + [draw(0, number) for number in range(10, 16)])
    experiment.run(config(protocol="1-0", method="feature_norm"), tmp_path / "run")
    assert message in capsys.readouterr().err.splitlines()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads a config
def test_training_images_that_set_or_test_thresholds_are_reported(tmp_path, monkeypatch, capsys):
    """A photograph with another name, but the same content, is the same; an image of another object is another."""
    monkeypatch.chdir(tmp_path)
    training = [draw(0, number) for number in range(8)]
    add_object(tmp_path / "objects", "bolt", 0, training)
    save(tmp_path / "objects/bolt/val/good/rgb", [draw(0, 20), training[5], training[0]])
    save(tmp_path / "objects/bolt/test/good/rgb", [draw(0, 100), training[3]])
    save(tmp_path / "objects/bolt/test/good/mask", [np.zeros((64, 64), np.uint8)] * 4)
    add_object(tmp_path / "objects", "nut", 1, [draw(1, number) for number in range(8)])
    save(tmp_path / "objects/nut/val/good/rgb", [training[1]])

    def told():
        return [line for line in capsys.readouterr().err.splitlines() if "training images too" in line]

    experiment.run(config(protocol="2-0", method="feature_norm"), tmp_path / "run")
    by_run = told()
    flags = ["prepare", "--config=folder:2-0", "--workdir=prepared", *as_flags(KEYS)]
    monkeypatch.setattr(sys, "argv", flags)  # config_flags reads the keys from here
    assert prepare.main(flags) == 0
    assert told() == by_run
    assert by_run == [
        sentences.VALIDATION_REUSES.format(count=2, object="bolt", which="001, 002"),
        sentences.TEST_REUSES.format(count=1, object="bolt", which="good/001"),
    ]


@pytest.mark.parametrize(
    ("image", "method"), [(BLACK, "ib_iumad"), (draw(0, 0), "feature_norm")], ids=["black", "stripes"]
)
def test_identical_training_images(tmp_path, monkeypatch, image, method):
    """Nothing varies between the images, so every variance is 0."""
    monkeypatch.chdir(tmp_path)
    add_object(tmp_path / "objects", "bolt", 0, [image] * 6)
    experiment.run(config(protocol="1-0", method=method), tmp_path / "run")
    for array in jax.tree.leaves(snapshots.read(tmp_path / "run").variables):
        assert np.isfinite(array).all()
    detection = Detector.load(tmp_path / "run")(draw(0, 5))
    numbers = (
        detection.score,
        detection.distance,
        detection.probability,
        detection.image_threshold,
        detection.unknown_threshold,
    )
    assert np.isfinite(numbers).all()
