"""The detector: a trained model as a function of images."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from iumad_jax import Camera, Detector
from iumad_jax.data.degradation import degrade
from iumad_jax.errors import UserError
from iumad_jax.runtime.snapshots import MANIFEST
from tests import sentences
from tests.integration.trained import LEARNED, NEVER_LEARNED, results_of, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

CHANGEABLE = "backbone.weights, diffusion.weights, diffusion.autoencoder, model.scan and model.dtype"


def test_a_detector_decides_like_the_run(home, detector, reader):
    """The run evaluated prepared images in batches; the detector gets the original images one by one."""
    decisions = results_of(home / "run")["decisions"][-1]
    assert detector.objects == LEARNED
    for name in LEARNED:
        detections = [detector(sample.rgb, sample.depth) for sample in samples(reader, name)]
        anomalous = np.array([sample.anomalous for sample in samples(reader, name)])
        alarms = np.array([detection.anomalous for detection in detections])
        assert decisions["objects"][name]["test"] == {
            "false_alarms": alarms[~anomalous].mean(),
            "misses": 1 - alarms[anomalous].mean(),
            "precision": anomalous[alarms].mean() if alarms.any() else None,
            "recall": alarms[anomalous].mean(),
            "f1": pytest.approx(2 * (alarms & anomalous).sum() / (alarms.sum() + anomalous.sum())),
            "recognised": np.mean([detection.object == name for detection in detections]),
            "taken_as_unknown": np.mean([detection.unknown for detection in detections]),
        }
        calibration = detector(*stacked(samples(reader, name, "calibration")))
        image, pixel = (decisions["objects"][name][kind]["threshold"] for kind in ("image", "pixel"))
        assert calibration.score.max() == pytest.approx(image, rel=1e-2)  # features are stored in 16 bits
        assert calibration.map.max() == pytest.approx(pixel, rel=1e-2)


def test_other_weights_of_the_backbone_are_refused(home, command):
    before = (home / "run" / "config.json").read_bytes()
    code, _, error = command("learn", "--workdir=run", "--config.backbone.weights=random")
    assert (code, "are not those that this run was trained with" in error) == (2, True)
    assert (home / "run" / "config.json").read_bytes() == before
    with pytest.raises(UserError, match="the weights of efficientnet_lite0 in the file random are not those"):
        Detector.load(home / "run", **{"backbone.weights": "random"})


def test_a_batch_gives_the_results_of_its_images(detector, reader):
    images = samples(reader, "CandyCane")[:2] + samples(reader, "GummyBear")[:1] + samples(reader, NEVER_LEARNED)[:1]
    batch = detector(*stacked(images))
    singles = [detector(image.rgb, image.depth) for image in images]
    assert batch.object.tolist() == [single.object for single in singles]
    assert batch.decision.tolist() == [single.decision for single in singles]
    assert batch.object.tolist()[:3] == ["CandyCane", "CandyCane", "GummyBear"]
    assert batch.unknown.tolist()[3]
    assert batch.decision[3] == "unknown"
    for field in ("score", "map", "probability", "distance", "image_threshold", "pixel_threshold", "unknown_threshold"):
        np.testing.assert_allclose(
            getattr(batch, field), np.stack([getattr(single, field) for single in singles]), rtol=1e-4, atol=1e-6
        )
    for result in (batch, *singles):
        np.testing.assert_array_equal(result.mask, result.map > np.expand_dims(result.pixel_threshold, (-1, -2)))
        np.testing.assert_array_equal(result.anomalous, result.score > result.image_threshold)
        np.testing.assert_array_equal(result.unknown, result.distance > result.unknown_threshold)
    assert batch.map.shape == batch.mask.shape == (4, 224, 224)
    assert singles[0].map.shape == (224, 224)


def test_nothing_compiles_twice(home, reader):
    """Images of any size use the same program; another number of images is compiled once."""
    detector = Detector.load(home / "run")
    first, second = samples(reader, "CandyCane")[:2]
    programs = []
    for rgb, depth in [
        (first.rgb, first.depth),
        (second.rgb, second.depth),
        (first.rgb[:50], first.depth[:50]),
    ]:
        detector(rgb, depth)
        programs.append(detector.function._cache_size())
    detector(first.rgb, first.depth, object="GummyBear")
    programs.append(detector.function._cache_size())
    for _ in range(2):
        detector(*stacked([first, second]))
        programs.append(detector.function._cache_size())
    assert programs == [1, 1, 1, 1, 2, 2]


def test_a_given_object_is_used_but_checked(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    right = detector(cane.rgb, cane.depth, object="CandyCane")
    assert (right.object, bool(right.unknown)) == ("CandyCane", False)
    wrong = detector(cane.rgb, cane.depth, object="GummyBear")
    assert (wrong.object, bool(wrong.unknown)) == ("GummyBear", True)
    assert wrong.image_threshold != right.image_threshold
    assert wrong.probability < right.probability


def test_the_default_camera_is_that_of_the_training_images(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    default, same, half_size = (
        detector(cane.rgb, cane.depth, camera).score for camera in (None, cane.camera, cane.camera.scaled(0.5))
    )
    assert default == same
    assert half_size != same
    half = cane.camera.scaled(0.5)
    x, z = 0.1, 2.0  # column 2 i + 1/2 of an image is column i of the image of half the size
    assert half.fx * x / z + half.cx == pytest.approx((cane.camera.fx * x / z + cane.camera.cx - 0.5) / 2)


def test_earlier_steps_can_be_loaded(home, reader):
    first = Detector.load(home / "run", step=0)
    assert first.objects == ("CandyCane",)
    bear = samples(reader, "GummyBear")[0]
    assert first(bear.rgb, bear.depth).decision == "unknown"


@pytest.fixture
def growing(home, tmp_path, monkeypatch):
    """Return a workdir whose run has finished its first step only, relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    shutil.copy(home / "run" / "config.json", tmp_path / "run")
    for name in ("0", "by_object"):
        shutil.copytree(home / "run" / "snapshots" / name, tmp_path / "run" / "snapshots" / name)
    return Path("run")


def test_a_refreshed_detector_knows_what_was_learned_meanwhile(home, growing, reader, detector, monkeypatch):
    old, coarse = Detector.load(growing, 0), Detector.load(growing, **{"model.dtype": "bfloat16"})
    bear = samples(reader, "GummyBear")[0]
    before = old(bear.rgb, bear.depth)
    assert before.unknown
    assert old.refresh() is old
    shutil.copytree(home / "run" / "snapshots" / "1", growing / "snapshots" / "1.unfinished")
    assert old.refresh() is old
    (growing / "snapshots" / "1.unfinished").rename(growing / "snapshots" / "1")
    monkeypatch.chdir("/")
    new = old.refresh()
    assert (new.step, new.objects, old.objects) == (1, LEARNED, LEARNED[:1])
    assert new.refresh() is new
    after = new(bear.rgb, bear.depth)
    assert after.object == "GummyBear"
    assert not after.unknown
    for result, expected in [(after, detector(bear.rgb, bear.depth)), (old(bear.rgb, bear.depth), before)]:
        for values, references in zip(result, expected, strict=True):
            np.testing.assert_array_equal(values, references)
    coarse, arguments = coarse.refresh(), (new.prepare(bear.rgb, bear.depth), np.zeros(1, np.int32))
    assert coarse.step == 1
    assert "bf16" in str(jax.make_jaxpr(coarse.function)(coarse.state, *arguments))
    pairs = zip(jax.tree.leaves(old.state.backbone), jax.tree.leaves(new.state.backbone), strict=True)
    assert all(first is second for first, second in pairs)


def test_a_damaged_snapshot_does_not_replace_the_detector(home, growing, capsys):
    detector, folder = Detector.load(growing), growing / "snapshots"
    for name in ("1", "2"):
        shutil.copytree(home / "run" / "snapshots" / "1", folder / name)
        manifest = (folder / name / MANIFEST).read_bytes()
        (folder / name / MANIFEST).write_bytes(b"{}")
    assert detector.refresh() is detector
    error = capsys.readouterr().err
    for name in ("1", "2"):
        assert sentences.SNAPSHOT_DAMAGED.format(folder.absolute() / name) in error
    assert error.endswith(sentences.DETECTOR_KEPT.format(0))
    (folder / "1" / MANIFEST).write_bytes(manifest)
    assert detector.refresh().step == 1
    assert capsys.readouterr().err.endswith(sentences.SNAPSHOT_USED_INSTEAD.format(folder.absolute() / "1") + "\n")


def test_the_workdir_alone_is_enough(home, tmp_path):
    """The detector needs neither the dataset nor other outputs of training, and changes no file."""
    for name in ("config.json", "snapshots"):
        source = home / "run" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    assert Detector.load(tmp_path).objects == LEARNED
    assert sorted(tmp_path.rglob("*")) == before


WRONG = {
    "floats as RGB": (
        lambda rgb, depth: (rgb / 255, depth),
        sentences.ARRAY_WRONG.format(name="rgb", dtype="float64", shape="(64, 64, 3)"),
    ),
    "missing depth": (lambda rgb, depth: (rgb, None), sentences.DEPTH_ARGUMENT_MISSING),
    "integer depth": (
        lambda rgb, depth: (rgb, rgb[..., 0]),
        sentences.ARRAY_WRONG.format(name="depth", dtype="uint8", shape="(64, 64)"),
    ),
    "depth of another size": (
        lambda rgb, depth: (rgb, depth[1:]),
        sentences.ARRAY_WRONG.format(name="depth", dtype="float32", shape="(63, 64)"),
    ),
    "depth in millimetres": (lambda rgb, depth: (rgb, depth * 1000), sentences.DEPTH_ARGUMENT_OF_ANOTHER_UNIT),
    "depth without valid pixels": (lambda rgb, depth: (rgb, depth * np.nan), sentences.DEPTH_ARGUMENT_ALL_MISSING),
    "a file name": (
        lambda rgb, depth: ("cane.png", depth),
        sentences.NOT_AN_ARRAY.format(name="rgb", type="str", content="uint8"),
    ),
    "a list": (
        lambda rgb, depth: (rgb.tolist(), depth),
        sentences.NOT_AN_ARRAY.format(name="rgb", type="list", content="uint8"),
    ),
    "a PIL image": (
        lambda rgb, depth: (Image.fromarray(rgb), depth),
        sentences.NOT_AN_ARRAY.format(name="rgb", type="Image", content="uint8"),
    ),
    "a list of depths": (
        lambda rgb, depth: (rgb, depth.tolist()),
        sentences.NOT_AN_ARRAY.format(name="depth", type="list", content="metres"),
    ),
    "a masked array": (
        lambda rgb, depth: (rgb, np.ma.array(depth)),
        sentences.NOT_AN_ARRAY.format(name="depth", type="MaskedArray", content="metres"),
    ),
    "a camera as a tuple": (lambda rgb, depth: (rgb, depth, (1, 1, 0, 0)), sentences.NOT_A_CAMERA.format("tuple")),
    "a camera with text": (
        lambda rgb, depth: (rgb, depth, Camera("1", 1, 0, 0)),
        sentences.CAMERA_NOT_NUMBERS.format("('1', 1, 0, 0)"),
    ),
    "an empty batch": (
        lambda rgb, depth: (rgb[None][:0], depth[None][:0]),
        sentences.NO_IMAGES.format("(0, 64, 64, 3)"),
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_refused(detector, reader, change, message):
    cane = samples(reader, "CandyCane")[0]
    with pytest.raises(UserError) as error:
        detector(*change(cane.rgb, cane.depth))
    assert str(error.value).startswith(message)


def test_a_single_image_is_prepared_like_a_batch_of_one(detector, reader):
    cane = samples(reader, "CandyCane")[0]
    single, batch = detector.prepare(cane.rgb, cane.depth), detector.prepare(cane.rgb[None], cane.depth[None])
    for modality in ("rgb", "depth"):
        np.testing.assert_array_equal(single[modality], batch[modality])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 9}, sentences.KEY_CANNOT_BE_CHANGED.format(key="foo", known=CHANGEABLE)),
        (
            {"model.width": 9},
            sentences.KEY_CANNOT_BE_CHANGED.format(key="model.width", known=CHANGEABLE),
        ),
        ({"step": "0"}, sentences.STEP_NOT_A_NUMBER.format("str")),
        ({"workdir": None}, sentences.WORKDIR_NOT_A_PATH.format("NoneType")),
    ],
)
def test_wrong_arguments_of_load_are_refused(home, arguments, message):
    with pytest.raises(UserError, match=message):
        Detector.load(**{"workdir": home / "run"} | arguments)
    assert Detector.load(home / "run", np.int64(0)).objects == LEARNED[:1]


def test_an_image_of_lower_quality_is_not_an_unknown_object(home, reader):
    """After the first step only one object is known, so the threshold comes from its own images alone."""
    first = Detector.load(home / "run", step=0)
    for number, sample in enumerate(samples(reader, "CandyCane", "calibration")):
        degraded = degrade(sample, number, 0.008)
        assert not first(degraded.rgb, degraded.depth).unknown
    pop = samples(reader, NEVER_LEARNED)[0]
    assert first(pop.rgb, pop.depth).unknown
