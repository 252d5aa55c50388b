"""A trained model as a function of images."""

import shutil

import numpy as np
import pytest
from PIL import Image

from iumad_jax import Camera, Detector
from iumad_jax.data.degradation import degrade
from iumad_jax.errors import UserError
from tests import sentences
from tests.integration.trained import LEARNED, NEVER, results_of, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


def test_a_detector_decides_as_the_run_did(home, detector, reader):
    """The run evaluated prepared images in batches; the detector sees the images themselves, one by one."""
    decided = results_of(home / "run")["decisions"][-1]
    assert detector.objects == LEARNED
    for name in LEARNED:
        found = [detector(one.rgb, one.depth) for one in samples(reader, name)]
        anomalous = np.array([one.anomalous for one in samples(reader, name)])
        alarms = np.array([one.anomalous for one in found])
        assert decided["objects"][name]["test"] == {
            "false_alarms": alarms[~anomalous].mean(),
            "misses": 1 - alarms[anomalous].mean(),
            "recognised": np.mean([one.object == name for one in found]),
            "taken_as_unknown": np.mean([one.unknown for one in found]),
        }
        calibration = detector(*stacked(samples(reader, name, "calibration")))
        image, pixel = (decided["objects"][name][kind]["threshold"] for kind in ("image", "pixel"))
        assert calibration.score.max() == pytest.approx(image, rel=1e-2)  # features are stored in 16 bits
        assert calibration.map.max() == pytest.approx(pixel, rel=1e-2)


def test_a_batch_is_its_images(detector, reader):
    some = samples(reader, "CandyCane")[:2] + samples(reader, "GummyBear")[:1] + samples(reader, NEVER)[:1]
    batch = detector(*stacked(some))
    singles = [detector(one.rgb, one.depth) for one in some]
    assert batch.object.tolist() == [one.object for one in singles]
    assert batch.decision.tolist() == [one.decision for one in singles]
    assert batch.object.tolist()[:3] == ["CandyCane", "CandyCane", "GummyBear"]
    assert batch.unknown.tolist()[3]
    assert batch.decision[3] == "unknown"
    for field in ("score", "map", "probability", "distance", "image_threshold", "pixel_threshold", "unknown_threshold"):
        np.testing.assert_allclose(
            getattr(batch, field), np.stack([getattr(one, field) for one in singles]), rtol=1e-4, atol=1e-6
        )
    for one in (batch, *singles):
        np.testing.assert_array_equal(one.mask, one.map > np.expand_dims(one.pixel_threshold, (-1, -2)))
        np.testing.assert_array_equal(one.anomalous, one.score > one.image_threshold)
        np.testing.assert_array_equal(one.unknown, one.distance > one.unknown_threshold)
    assert batch.map.shape == batch.mask.shape == (4, 224, 224)
    assert singles[0].map.shape == (224, 224)


def test_nothing_compiles_twice(home, reader):
    """Whatever the images' sizes are; another number of images is compiled once more."""
    detector = Detector.load(home / "run")
    one, other = samples(reader, "CandyCane")[:2]
    compiled = []
    for rgb, depth in [(one.rgb, one.depth), (other.rgb, other.depth), (one.rgb[:50], one.depth[:50])]:
        detector(rgb, depth)
        compiled.append(detector.function._cache_size())
    detector(one.rgb, one.depth, object="GummyBear")
    compiled.append(detector.function._cache_size())
    for _ in range(2):
        detector(*stacked([one, other]))
        compiled.append(detector.function._cache_size())
    assert compiled == [1, 1, 1, 1, 2, 2]


def test_a_given_object_is_believed_but_checked(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    found = detector(cane.rgb, cane.depth, object="CandyCane")
    assert (found.object, bool(found.unknown)) == ("CandyCane", False)
    wrong = detector(cane.rgb, cane.depth, object="GummyBear")
    assert (wrong.object, bool(wrong.unknown)) == ("GummyBear", True)
    assert wrong.image_threshold != found.image_threshold
    assert wrong.probability < found.probability


def test_the_camera_is_that_of_the_training_images(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    default, told, other = (
        detector(cane.rgb, cane.depth, camera).score for camera in (None, cane.camera, cane.camera.scaled(0.5))
    )
    assert default == told
    assert other != told
    half = cane.camera.scaled(0.5)
    x, z = 0.1, 2.0  # a point seen on column 2 i + 1/2 of an image lies on column i of one of half the size
    assert half.fx * x / z + half.cx == pytest.approx((cane.camera.fx * x / z + cane.camera.cx - 0.5) / 2)


def test_earlier_steps_can_be_loaded(home, reader):
    first = Detector.load(home / "run", step=0)
    assert first.objects == ("CandyCane",)
    bear = samples(reader, "GummyBear")[0]
    assert first(bear.rgb, bear.depth).decision == "unknown"


def test_the_workdir_alone_is_enough(home, tmp_path):
    """No dataset, nothing that training left beside it; a read-only copy is not touched."""
    for kept in ("config.json", "snapshots"):
        whole = home / "run" / kept
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / kept)
    before = sorted(tmp_path.rglob("*"))
    assert Detector.load(tmp_path).objects == LEARNED
    assert sorted(tmp_path.rglob("*")) == before


WRONG = {
    "floats": (
        lambda rgb, depth: (rgb / 255, depth),
        sentences.ARRAY_WRONG.format(name="rgb", dtype="float64", shape="(64, 64, 3)"),
    ),
    "no depth": (lambda rgb, depth: (rgb, None), sentences.DEPTH_NOT_GIVEN),
    "whole numbers": (
        lambda rgb, depth: (rgb, rgb[..., 0]),
        sentences.ARRAY_WRONG.format(name="depth", dtype="uint8", shape="(64, 64)"),
    ),
    "another size": (
        lambda rgb, depth: (rgb, depth[1:]),
        sentences.ARRAY_WRONG.format(name="depth", dtype="float32", shape="(63, 64)"),
    ),
    "nothing measured": (lambda rgb, depth: (rgb, depth * np.nan), sentences.GIVEN_DEPTH_ALL_MISSING),
    "no array": (
        lambda rgb, depth: ("cane.png", depth),
        sentences.ARRAY_NOT_GIVEN.format(name="rgb", type="str", of="uint8"),
    ),
    "a list": (
        lambda rgb, depth: (rgb.tolist(), depth),
        sentences.ARRAY_NOT_GIVEN.format(name="rgb", type="list", of="uint8"),
    ),
    "a picture": (
        lambda rgb, depth: (Image.fromarray(rgb), depth),
        sentences.ARRAY_NOT_GIVEN.format(name="rgb", type="Image", of="uint8"),
    ),
    "a list of depths": (
        lambda rgb, depth: (rgb, depth.tolist()),
        sentences.ARRAY_NOT_GIVEN.format(name="depth", type="list", of="metres"),
    ),
    "hidden pixels": (
        lambda rgb, depth: (rgb, np.ma.array(depth)),
        sentences.ARRAY_NOT_GIVEN.format(name="depth", type="MaskedArray", of="metres"),
    ),
    "no camera": (lambda rgb, depth: (rgb, depth, (1, 1, 0, 0)), sentences.CAMERA_NOT_GIVEN.format("tuple")),
    "a camera of text": (
        lambda rgb, depth: (rgb, depth, Camera("1", 1, 0, 0)),
        sentences.CAMERA_NOT_NUMBERS.format("('1', 1, 0, 0)"),
    ),
    "no image": (
        lambda rgb, depth: (rgb[None][:0], depth[None][:0]),
        sentences.NO_IMAGE_GIVEN.format("(0, 64, 64, 3)"),
    ),
}


@pytest.mark.parametrize(("spoil", "told"), WRONG.values(), ids=WRONG)
def test_a_detector_says_what_is_wrong(detector, reader, spoil, told):
    cane = samples(reader, "CandyCane")[0]
    with pytest.raises(UserError) as error:
        detector(*spoil(cane.rgb, cane.depth))
    assert str(error.value).startswith(told)


def test_a_single_image_is_made_ready_as_a_batch_of_one(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    one, batch = detector.prepare(cane.rgb, cane.depth), detector.prepare(cane.rgb[None], cane.depth[None])
    for modality in ("rgb", "depth"):
        np.testing.assert_array_equal(one[modality], batch[modality])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"foo": 9}, sentences.KEY_CANNOT_BE_CHANGED.format(key="foo", known="backbone.weights and model.scan")),
        (
            {"model.width": 9},
            sentences.KEY_CANNOT_BE_CHANGED.format(key="model.width", known="backbone.weights and model.scan"),
        ),
        ({"step": "0"}, sentences.STEP_NOT_A_NUMBER.format("str")),
        ({"workdir": None}, sentences.WORKDIR_NOT_A_PATH.format("NoneType")),
    ],
)
def test_a_detector_is_loaded_by_what_there_is(home, given, told):
    with pytest.raises(UserError, match=told):
        Detector.load(**{"workdir": home / "run"} | given)
    assert Detector.load(home / "run", np.int64(0)).objects == LEARNED[:1]


def test_a_worse_photograph_is_no_unknown_object(home, reader):
    """In the step that knows one object alone, where nothing but its own images tells what is far."""
    first = Detector.load(home / "run", step=0)
    for number, one in enumerate(samples(reader, "CandyCane", "calibration")):
        assert not first(*(getattr(degrade(one, number, 0.008), part) for part in ("rgb", "depth"))).unknown
    pop = samples(reader, NEVER)[0]
    assert first(pop.rgb, pop.depth).unknown
