"""Evaluation of hand-made methods on hand-made images: their inputs, decisions and metrics."""

import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax import config as configs
from iumad_jax.data.prepared.good_images import GoodImages
from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.inference import assessment, decisions, evaluation, thresholds
from iumad_jax.inference.anomaly_map import Rule
from iumad_jax.inference.evaluation import Model
from iumad_jax.inference.recognition import Recogniser
from iumad_jax.inference.thresholds import make_calibration
from iumad_jax.methods.method import Method
from iumad_jax.runtime.progress import BEGINNING
from iumad_jax.shapes import Batch, Calibration, ErrorMaps, GroundTruth, Scale

SIDE = 16
RULE = Rule("maximum", "common")


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


def test_calibration_does_not_use_the_true_object(model):
    prediction, distance = evaluation.infer(model, "primary", images([(0, 0), (9, 0)], true_object=0).batch)
    assert prediction.score.tolist() == [0, 1]
    np.testing.assert_allclose(distance, np.array([[0, 10], [9, 1]]) / np.sqrt(2), rtol=1e-6)
    calibration = make_calibration(prediction, distance, number=0)
    np.testing.assert_allclose(calibration.distance, np.array([[0, 0, 10], [9, 1, 9]]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("trained_on", [False, True])
def test_errors_on_good_images_set_the_scales_and_then_the_thresholds(trained_on):
    """Images on which the method was trained are replaced by its own held-out errors, if it has any."""

    def held_out(variables, number):
        return flat(np.array([20.0, 60.0]) * (1 + number))

    methods = {
        "primary": Method(init=dict, predict=position, held_out=held_out if trained_on else lambda *_: None),
        "baseline": Method(init=dict, predict=position),
    }
    recognition = {"count": np.ones(2), "mean": np.array([[2.0, 0], [10, 0]]), "scatter": np.eye(2)}
    progress = BEGINNING._replace(variables={name: {} for name in methods}, recognition=recognition)
    good = {"A": [(1, 0), (2, 0), (3, 0)], "B": [(8, 0), (12, 0)]}

    def good_images(name):
        batch = images(good[name], "AB".index(name)).batch
        return GoodImages(batch, batch, trained_on, False)

    after, model = assessment.calibrate(configs.small("1-1"), methods, progress, ("A", "B"), good_images)
    assert float(after.scales["baseline"]["rgb"].mean[0]) == pytest.approx(2)
    assert [float(x) for x in after.scales["baseline"]["rgb"].quantile] == [3, 12]
    quantiles = [60, 120] if trained_on else [3, 12]
    assert [float(x) for x in after.scales["primary"]["rgb"].quantile] == quantiles
    scores = [calibration.score.tolist() for calibration in after.calibration.values()]
    expected = [[20 / 60, 1]] * 2 if trained_on else [[1 / 3, 2 / 3, 1], [8 / 12, 1]]
    for actual, values in zip(scores, expected, strict=True):
        assert actual == pytest.approx(values, rel=1e-5)
    assert [len(calibration.distance) for calibration in after.calibration.values()] == [3, 2]
    np.testing.assert_allclose(model.thresholds.image, [max(values) for values in expected], rtol=1e-5)


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
