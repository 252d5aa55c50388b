"""Evaluation by hand-made methods of hand-made images: what they see, and what is made of what they say."""

import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.inference import decisions, evaluation, thresholds
from iumad_jax.inference.evaluation import Model
from iumad_jax.inference.recognition import Recogniser
from iumad_jax.inference.thresholds import calibration_of
from iumad_jax.methods.method import Method
from iumad_jax.shapes import Batch, Calibration, ErrorMaps, GroundTruth

SIDE = 16


def flat(values):
    """Maps of one value each, which is then the score."""
    return ErrorMaps({"rgb": jnp.ones((len(values), SIDE, SIDE)) * values[:, None, None]}, None)


def told(variables, batch):
    """Which object the method was told."""
    return flat(batch.object_id * 1.0)


def place(variables, batch):
    """Where the image lies."""
    return flat(batch.features["rgb"][:, 0, 0])


def images(places, true_object):
    """Images of one object with two channels, at these places of the recogniser's plane; every other is anomalous."""
    count = len(places)
    features = np.repeat(np.array(places, np.float32)[:, None], 3, axis=1)
    anomalous = np.arange(count) % 2 == 1
    mask = np.zeros((count, SIDE, SIDE), bool)
    mask[anomalous, 0, 0] = True
    everywhere = np.ones_like(mask)
    truth = GroundTruth(mask, np.ones(count, bool), everywhere, everywhere, anomalous, mask, mask)
    batch = Batch({"rgb": features}, {}, np.full(count, true_object, np.int32))
    return PreparedSet(batch, truth, ("good",) * count, tuple(map(str, range(count))))


@pytest.fixture
def model():
    """Of objects A at (0, 0) and B at (10, 0): distances are Euclidean, but for a factor."""
    calibration = {
        name: Calibration(np.array([score]), np.array([score]), np.array([[1.0, 1, 8]]))
        for name, score in (("A", 0.5), ("B", 2.0))
    }
    recogniser = Recogniser(np.zeros(2, np.float32), np.eye(2, dtype=np.float32), np.float32([[0, 0], [10, 0]]))
    method = Method(init=lambda key, batch: {}, predict=told)
    methods = {"own": method, "baseline": method}
    return Model(methods, {"own": {}, "baseline": {}}, recogniser, thresholds.thresholds(calibration, 0.995))


def test_no_method_is_told_the_true_object(model):
    """The last two images of A lie nearer to B."""
    some = images([(0, 0), (1, 0), (9, 0), (8, 0)], true_object=0)
    own, baseline = evaluation.judge(model, {"A": lambda: some})
    for judgement in (own, baseline):
        assert judgement.prediction.score.tolist() == [0, 0, 1, 1]
    assert (own.method, baseline.method, baseline.decision) == ("own", "baseline", None)
    assert own.decision.object_id.tolist() == [0, 0, 1, 1]
    assert own.decision.anomalous.tolist() == [False, False, False, False]  # 1 is no alarm by B's threshold, 2
    assert decisions.rates(own.decision, own.truth, 0)["recognised"] == 0.5


def test_calibration_tells_no_true_object_either(model):
    prediction, distance = evaluation.infer(
        model.methods["own"], {}, model.recogniser, images([(0, 0), (9, 0)], true_object=0).batch
    )
    assert prediction.score.tolist() == [0, 1]
    np.testing.assert_allclose(distance, np.array([[0, 10], [9, 1]]) / np.sqrt(2), rtol=1e-6)
    found = calibration_of(prediction, distance, number=0)
    np.testing.assert_allclose(found.distance, np.array([[0, 0, 10], [9, 1, 9]]) / np.sqrt(2), rtol=1e-6)


class OnlyA:
    """A reader's objects: A has two test images, B none."""

    def ids(self, name, split):
        return ("0", "1") if (name, split) == ("A", "test") else ()


def test_objects_without_test_images_are_skipped(model):
    read = []
    tests = evaluation.test_sets(OnlyA(), ("B", "A"), lambda name: read.append(name) or images([(0, 0), (0, 1)], 0))
    assert read == []  # nothing is opened before it is its turn
    assert {judgement.object for judgement in evaluation.judge(model, tests)} == {"A"}
    assert read == ["A"]


def test_metrics_are_those_of_the_images(model):
    some = images([(0, 0), (1, 0), (0.5, 0), (2, 0)], true_object=0)
    model = model._replace(methods=dict.fromkeys(model.methods, Method(init=lambda key, batch: {}, predict=place)))
    own, _ = evaluation.judge(model, {"A": lambda: some})
    assert own.metrics["i_auroc"] == 1
    # Maps are 0, 1, 0.5 and 2 everywhere; negatives: 256, 255, 256 and 255 pixels; positives: one of 1 and one of 2.
    assert own.metrics["p_auroc"] == pytest.approx((512 + 255 / 2 + 767 + 255 / 2) / (2 * 1022))
    unmarked = some._replace(truth=some.truth._replace(masked=np.array([True, True, True, False])))
    own, _ = evaluation.judge(model, {"A": lambda: unmarked})
    assert np.isnan(own.metrics["p_auroc"])
    assert own.metrics["i_auroc"] == 1
