"""Evaluation of hand-made methods on hand-made images: their inputs, decisions and metrics."""

import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax import config as configs
from iumad_jax import protocol
from iumad_jax.data.prepared.good_images import CalibrationImages, calibration_images
from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.data.tiles import Tiling
from iumad_jax.inference import assessment, decisions, evaluation, recognition, thresholds
from iumad_jax.inference.anomaly_map import Rule
from iumad_jax.inference.evaluation import Model
from iumad_jax.inference.recognition import Recogniser
from iumad_jax.methods.method import Method
from iumad_jax.runtime.progress import BEGINNING
from iumad_jax.shapes import Batch, Calibration, ErrorMaps, GroundTruth, Scale

SIDE = 16
RULE = Rule("maximum", "common")
RECOGNITION = {"count": np.ones(2), "mean": np.array([[2.0, 0], [10, 0]]), "scatter": np.eye(2)}
BOTH = protocol.next_step((), ("A", "B"), {})


def flat(values):
    """Return constant maps, whose value is also the score."""
    return ErrorMaps({"rgb": jnp.ones((len(values), SIDE, SIDE)) * values[:, None, None]}, None)


def object_number(variables, batch):
    """Predict the object number that the method receives."""
    return flat(batch.object_id * 1.0)


def position(variables, batch):
    """Predict the position of the image."""
    return flat(batch.features["rgb"][:, 0, 0])


def images(positions, true_object):
    """Make images of one object at positions in the plane of two feature channels; every second image is anomalous."""
    count = len(positions)
    features = np.repeat(np.array(positions, np.float32)[:, None], 3, axis=1)
    anomalous = np.arange(count) % 2 == 1
    mask = np.zeros((count, SIDE, SIDE), bool)
    mask[anomalous, 0, 0] = True
    everywhere = np.ones_like(mask)
    truth = GroundTruth(mask, np.ones(count, bool), everywhere, everywhere, anomalous, mask, mask)
    batch = Batch({"rgb": features}, {}, np.full(count, true_object, np.int32))
    return PreparedSet(batch, truth, ("good",) * count, tuple(map(str, range(count))))


@pytest.fixture
def model():
    """Return a model of objects A at (0, 0) and B at (10, 0), whose distances are proportional to Euclidean ones."""
    calibration = {
        name: Calibration(np.array([score]), np.array([score]), np.array([[1.0, 1, 8]]))
        for name, score in (("A", 0.5), ("B", 2.0))
    }
    recogniser = Recogniser(np.zeros(2, np.float32), np.eye(2, dtype=np.float32), np.float32([[0, 0], [10, 0]]))
    method = Method(init=lambda key, batch: {}, predict=object_number)
    methods, scales = {"primary": method, "baseline": method}, {"rgb": Scale(*np.ones((3, 2), np.float32))}
    limits = thresholds.thresholds(calibration, 0.995)
    return Model(methods, {name: {} for name in methods}, dict.fromkeys(methods, scales), RULE, recogniser, limits)


def test_no_method_receives_the_true_object(model):
    """The last two images of A lie nearer to B."""
    prepared = images([(0, 0), (1, 0), (9, 0), (8, 0)], true_object=0)
    primary, baseline = evaluation.judge(model, {"A": lambda: prepared})
    for judgement in (primary, baseline):
        assert judgement.prediction.score.tolist() == [0, 0, 1, 1]
    assert (primary.method, baseline.method, baseline.decision) == ("primary", "baseline", None)
    assert primary.decision.object_id.tolist() == [0, 0, 1, 1]
    assert primary.decision.anomalous.tolist() == [False, False, False, False]  # a score of 1 is below B's threshold 2
    assert decisions.rates(primary.decision, primary.truth, 0)["recognised"] == 0.5


def test_the_tiles_of_an_image_are_judged_as_one(model):
    """A tile of the first image lies nearer to B, but the image to A; the largest score of its tiles is the image's."""

    def positions(variables, batch):
        """Predict where the tile lies, and the object that it is told to show."""
        values = batch.features["rgb"][:, 0, 0] + 100 * batch.object_id
        return ErrorMaps({"rgb": jnp.ones((len(values), 224, 224)) * values[:, None, None]}, values[:, None])

    tiling = Tiling.of("1x2", 0.0)
    tiled = model._replace(methods={"primary": Method(init=dict, predict=positions)}, tiling=tiling)
    rows = images([(0, 0), (6, 0), (9, 0), (10, 0), (1, 0), (3, 0)], true_object=0).batch
    whole = images([(0, 0)] * 3, true_object=0)
    (judgement,) = evaluation.judge(tiled, {"A": lambda: whole._replace(batch=rows)})
    assert judgement.decision.object_id.tolist() == [0, 1, 0]
    assert judgement.prediction.score.tolist() == [6, 110, 3]
    assert judgement.prediction.object_logits.ravel().tolist() == [3, 109.5, 2]
    lengths = [np.sqrt((0 + 36) / 2 / 2), np.sqrt((1 + 0) / 2 / 2), np.sqrt((1 + 9) / 2 / 2)]  # over tiles and channels
    np.testing.assert_allclose(judgement.decision.distance, lengths, rtol=1e-6)
    expected = np.repeat(np.float32([[0, 6], [109, 110], [1, 3]]), 112, axis=1)[:, None] * np.ones((1, 224, 1))
    np.testing.assert_allclose(judgement.prediction.map, expected)
    assert judgement.decision.anomalous.tolist() == [True, True, True]
    assert judgement.decision.mask[0, 0, [0, 223]].tolist() == [False, True]


def calibrate(config, methods, progress, step, calibrating):
    def joint_means(name):
        return recognition.joint_means(calibrating(name).images.features)

    return assessment.calibrate(config, methods, progress, step, calibrating, joint_means)


def test_tiles_calibrate_the_thresholds_of_images():
    """Each of an image's two tiles has a score; the image has one distance."""
    config, good = configs.small("1-1"), {"A": [(1, 0), (2, 0), (3, 0), (1, 0)], "B": [(8, 0), (12, 0)]}
    config.input.tiles = "2x1"
    progress = BEGINNING._replace(objects=("A", "B"), variables={"method": {}}, recognition=RECOGNITION)

    def calibrating(name):
        return calibration_images(images(good[name], "AB".index(name)).batch, trained=False)

    after, _ = calibrate(config, {"method": Method(init=dict, predict=position)}, progress, BOTH, calibrating)
    assert [len(calibration.score) for calibration in after.calibration.values()] == [4, 2]
    assert [len(calibration.distance) for calibration in after.calibration.values()] == [2, 1]
    assert [calibration.tiles for calibration in after.calibration.values()] == [2, 2]


@pytest.mark.parametrize("trained_on", [False, True])
def test_errors_on_good_images_set_the_scales_and_then_the_thresholds(trained_on):
    """Images on which the method was trained are replaced by its own held-out errors, if it has any."""

    def held_out(variables, number):
        return flat(np.array([20.0, 60.0]) * (1 + number))

    methods = {
        "primary": Method(init=dict, predict=position, held_out=held_out if trained_on else lambda *_: None),
        "baseline": Method(init=dict, predict=position),
    }
    variables = {name: {} for name in methods}
    progress = BEGINNING._replace(objects=("A", "B"), variables=variables, recognition=RECOGNITION)
    good = {"A": [(1, 0), (2, 0), (3, 0)], "B": [(8, 0), (12, 0)]}

    def calibrating(name):
        return calibration_images(images(good[name], "AB".index(name)).batch, trained_on)

    after, model = calibrate(configs.small("1-1"), methods, progress, BOTH, calibrating)
    assert float(after.scales["baseline"]["rgb"].mean[0]) == pytest.approx(2)
    assert [float(x) for x in after.scales["baseline"]["rgb"].quantile] == [3, 12]
    quantiles = [60, 120] if trained_on else [3, 12]
    assert [float(x) for x in after.scales["primary"]["rgb"].quantile] == quantiles
    scores = [calibration.score.tolist() for calibration in after.calibration.values()]
    expected = [[20 / 60, 1]] * 2 if trained_on else [[1 / 3, 2 / 3, 1], [8 / 12, 1]]
    for actual, values in zip(scores, expected, strict=True):
        assert actual == pytest.approx(values, rel=1e-5)
    assert [len(calibration.distance) for calibration in after.calibration.values()] == [3, 2]
    np.testing.assert_allclose(model.thresholds.image, [1.0001 * max(values) for values in expected], rtol=1e-5)


def calibrated(method, positions, step=BOTH, trained=(False,), earlier=None, asked=None):
    """Calibrate A and B with the same images, at the positions given; list the objects whose images are asked for."""
    progress = earlier or BEGINNING._replace(objects=("A", "B"), variables={"method": {}}, recognition=RECOGNITION)

    def calibrating(name):
        batch = images([(x, 0) for x in positions], "AB".index(name)).batch
        return CalibrationImages(batch, np.resize(trained, len(positions)))

    def asking(name):
        (asked if asked is not None else []).append(name)
        return calibrating(name)

    def joint_means(name):
        return recognition.joint_means(calibrating(name).images.features)

    return assessment.calibrate(configs.small("1-1"), {"method": method}, progress, step, asking, joint_means)[0]


def test_calibration_images_are_judged_as_their_own_object():
    """The second image of A looks like B."""
    after = calibrated(Method(init=dict, predict=object_number), [2, 10])
    assert [values.tolist() for values in after.scales["method"]["rgb"].mean] == [0, 1]
    np.testing.assert_allclose(after.calibration["A"].distance[:, 0] > after.calibration["A"].distance[:, 1], [0, 1])


def test_images_that_were_trained_on_are_replaced_by_held_out_errors():
    held_out = Method(init=dict, predict=position, held_out=lambda *_: flat(np.array([20.0, 40.0])))
    after = calibrated(held_out, [2, 8], trained=(True, False)).calibration["A"]
    np.testing.assert_allclose(after.score, [8 / 40, 20 / 40, 1], rtol=1e-5)
    assert after.from_training_images


@pytest.mark.parametrize("act", ["learn", "update", "calibrate", "retire", "restore"])
@pytest.mark.parametrize("independent", [False, True])
def test_a_step_measures_anew_what_it_may_have_changed(act, independent):
    method, asked = Method(init=dict, predict=position, independent=independent), []
    earlier = calibrated(method, [2])
    step = protocol.next_step((BOTH,), ("B",), {}, act)
    after = calibrated(method, [4], step, earlier=earlier, asked=asked)
    changed = {"A": act in ("learn", "update") and not independent, "B": act not in ("retire", "restore")}
    changed["B"] |= act == "restore" and not independent
    assert asked == [name for name in "AB" if changed[name]]  # reading images of every object costs time
    means = dict(zip("AB", after.scales["method"]["rgb"].mean, strict=True))
    assert {name: float(mean) for name, mean in means.items()} == {name: 4 if changed[name] else 2 for name in "AB"}
    assert [after.calibration[name].retired for name in "AB"] == [False, act == "retire"]


class OnlyA:
    """A reader of object A with two test images and object B without any."""

    def ids(self, name, split):
        return ("0", "1") if (name, split) == ("A", "test") else ()


def test_objects_without_test_images_are_skipped(model):
    read = []
    tests = evaluation.test_sets(OnlyA(), ("B", "A"), lambda name: read.append(name) or images([(0, 0), (0, 1)], 0))
    assert read == []  # test sets are read only when needed
    assert {judgement.object for judgement in evaluation.judge(model, tests)} == {"A"}
    assert read == ["A"]


def test_metrics_agree_with_hand_computation(model):
    prepared = images([(0, 0), (1, 0), (0.5, 0), (2, 0)], true_object=0)
    model = model._replace(methods=dict.fromkeys(model.methods, Method(init=lambda key, batch: {}, predict=position)))
    primary, _ = evaluation.judge(model, {"A": lambda: prepared})
    assert primary.metrics["i_auroc"] == 1
    # Maps are 0, 1, 0.5 and 2 everywhere; negatives: 256, 255, 256 and 255 pixels; positives: one of 1 and one of 2.
    assert primary.metrics["p_auroc"] == pytest.approx((512 + 255 / 2 + 767 + 255 / 2) / (2 * 1022))
    unmarked = prepared._replace(truth=prepared.truth._replace(masked=np.array([True, True, True, False])))
    primary, _ = evaluation.judge(model, {"A": lambda: unmarked})
    assert np.isnan(primary.metrics["p_auroc"])
    assert primary.metrics["i_auroc"] == 1


def test_kinds_of_defects_are_measured_by_themselves(model):
    """Scores are distances to 0. The threshold of A is 0.5; the first dent's score lies below a good image's."""
    prepared = images([(0, 0), (1, 0), (0.45, 0), (0.4, 0), (0.3, 0), (2, 0)], true_object=0)
    prepared = prepared._replace(defects=("good", "bump", "good", "dent", "good", "dent"))
    model = model._replace(methods=dict.fromkeys(model.methods, Method(init=lambda key, batch: {}, predict=position)))
    primary, baseline = evaluation.judge(model, {"A": lambda: prepared})
    assert {kind: record["images"] for kind, record in primary.kinds.items()} == {"bump": 1, "dent": 2}
    assert {kind: record["alarms"] for kind, record in primary.kinds.items()} == {"bump": 1, "dent": 0.5}
    ranked = {kind: record["i_auroc"] for kind, record in primary.kinds.items()}
    assert ranked == {"bump": 1, "dent": pytest.approx(5 / 6)}
    # One pixel of each defect is marked, and every image has the same value everywhere; 6 x 256 - 3 negatives.
    below = {0.4: 2 * 256, 1: 3 * 256 + 255, 2: 3 * 256 + 2 * 255}  # and half of the 255 equal ones
    share = {value: (count + 255 / 2) / (6 * 256 - 3) for value, count in below.items()}
    assert primary.kinds["bump"]["p_auroc"] == pytest.approx(share[1])
    assert primary.kinds["dent"]["p_auroc"] == pytest.approx((share[0.4] + share[2]) / 2)
    assert set(baseline.kinds["dent"]) == {"images", *primary.metrics}  # baselines have no thresholds
    unmarked = prepared._replace(truth=prepared.truth._replace(masked=np.arange(6) != 5))
    primary, _ = evaluation.judge(model, {"A": lambda: unmarked})
    assert np.isnan(primary.kinds["bump"]["aupro"])
    assert primary.kinds["bump"]["i_auroc"] == 1


def test_the_spread_of_metrics_over_test_images(model):
    """The good images have scores 0 and 0.5, the anomalous ones 1 and 0.4.

    Resamples have twice one image with probability 1/4 each. The AUROC is 1 unless 0.5 occurs; it is 1/2 or 3/4 beside
    one 0.4, and 0 or 1/2 beside two. The mean of its square is 41/64, the square of its mean 36/64.
    """
    prepared = images([(0, 0), (1, 0), (0.5, 0), (0.4, 0)], true_object=0)
    model = model._replace(methods=dict.fromkeys(model.methods, Method(init=lambda key, batch: {}, predict=position)))
    primary, _ = evaluation.judge(model, {"A": lambda: prepared})
    spread = evaluation.spread_of(primary.prediction, primary.truth)
    assert set(spread["intervals"]) == set(spread["standard_errors"]) == set(primary.metrics)
    assert spread["standard_errors"]["i_auroc"] == pytest.approx((5 / 64) ** 0.5, abs=0.02)
    assert spread["intervals"]["i_auroc"] == (0, 1)  # 0 has a probability of 1/16
    assert spread["standard_errors"]["p_auroc"] > 0
    unmarked = primary.truth._replace(masked=np.array([True, True, True, False]))
    spread = evaluation.spread_of(primary.prediction, unmarked)
    assert np.isnan(spread["intervals"]["aupro_object"]).all()
    assert np.isnan(spread["standard_errors"]["p_auroc"])
    assert spread["intervals"]["i_auroc"] == (0, 1)
