"""Thresholds and what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iumad_jax import decisions
from iumad_jax.shapes import GroundTruth, Prediction


@given(st.integers(1, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.995, 1.0]))
def test_the_threshold_is_the_smallest_that_keeps_the_promise(n, quantile):
    """By counting: a further image lies in any of the n + 1 gaps between the scores with the same probability."""
    scores = np.random.default_rng(n).permutation(n).astype(float)
    found = decisions.threshold(scores, quantile)
    above = {t: (scores > t).sum() + 1 for t in scores}  # gaps in which it would exceed t
    keeping = [t for t in scores if above[t] / (n + 1) <= 1 - quantile + 1e-12]
    assert found["threshold"] == (min(keeping) if keeping else scores.max())
    assert found["at_most"] == pytest.approx(above[found["threshold"]] / (n + 1))
    assert found["images"] == n


def test_the_promise_holds_on_average():
    rng = np.random.default_rng(0)
    rates, promised = [], None
    for _ in range(3000):
        found = decisions.threshold(rng.gamma(2, size=30), 0.9)
        rates.append(np.exp(-found["threshold"]) * (1 + found["threshold"]))  # gamma's own share above
        promised = found["at_most"]
    assert promised == pytest.approx(3 / 31)
    assert np.mean(rates) == pytest.approx(promised, rel=0.05)


def test_few_images_promise_little_and_say_so():
    four, many = (decisions.threshold(np.arange(n), 0.995) for n in (4, 199))
    assert (four["threshold"], four["at_most"]) == (3, pytest.approx(0.2))
    assert (many["threshold"], many["at_most"]) == (198, pytest.approx(0.005))
    assert decisions.threshold(np.arange(400), 0.995)["threshold"] == 398


def test_the_interval_is_the_bootstrap_s():
    scores = np.random.default_rng(1).normal(size=100)
    found = decisions.threshold(scores, 0.9)
    assert found == decisions.threshold(scores[::-1], 0.9)
    rng = np.random.default_rng(7)
    resampled = [np.sort(rng.choice(scores, 100))[90] for _ in range(4000)]  # the 91st of 100
    np.testing.assert_allclose(found["interval"], np.quantile(resampled, [0.025, 0.975]), atol=0.1)
    assert found["interval"][0] < found["threshold"] < found["interval"][1]


def prediction(scores, peaks):
    maps = np.zeros((len(peaks), 4, 4), np.float32)
    maps[:, 1, 2] = peaks
    return Prediction(maps, np.array(scores, np.float32), None)


@pytest.fixture
def calibrated():
    good = {
        "A": decisions.Good(prediction([1, 2, 3], [5, 6, 4]), np.array([[1.0, 13], [2, 13], [1, 12]])),
        "B": decisions.Good(prediction([7, 8], [1, 2]), np.array([[13.0, 2], [13, 3]]), trained_on=True),
    }
    return decisions.calibrate(good, 0.995)


def test_every_object_has_thresholds_of_its_own(calibrated):
    of = calibrated["objects"]
    assert [of[name]["image"]["threshold"] for name in "AB"] == [3, 8]
    assert [of[name]["pixel"]["threshold"] for name in "AB"] == [6, 2]
    assert of["A"]["image"]["at_most"] == pytest.approx(1 / 4)
    assert of["B"]["image"]["at_most"] is None  # scores of images trained on promise nothing
    assert calibrated["usual"] == pytest.approx(np.sqrt((1 + 4 + 1 + 4 + 9) / 5))


def test_unknown_is_what_lies_halfway_to_other_objects(calibrated):
    assert calibrated["unknown"]["good"]["threshold"] == 3
    assert calibrated["unknown"]["good"]["images"] == 5
    assert calibrated["unknown"]["others"] == 12
    assert calibrated["unknown"]["threshold"] == 6
    alone = decisions.calibrate({"A": decisions.Good(prediction([1], [1]), np.array([[2.5]]))}, 0.995)
    assert (alone["unknown"]["threshold"], alone["unknown"]["others"]) == (5, None)
    mixed = {"A": decisions.Good(prediction([1, 1], [1, 1]), np.array([[3.0, 4], [7, 6]]))}
    assert decisions.calibrate(mixed, 0.995)["unknown"]["threshold"] == 6  # never less than what good images exceed


def test_rates_are_shares_of_test_images(calibrated):
    anomalous = np.array([False, False, False, False, True, True])
    truth = GroundTruth(None, None, None, None, anomalous, None, None)
    scores = [3, 3.5, 1, 4, 2, 9]  # equal to the threshold is no alarm
    distance = np.array([[1.0, 9], [1, 9], [9, 2], [1, 9], [7, 8], [6, 8]])
    found = decisions.rates(calibrated, "A", prediction(scores, [0] * 6), truth, distance)
    assert found == {
        "false_alarms": 2 / 4,
        "misses": 1 / 2,
        "recognised": pytest.approx(5 / 6),
        "taken_as_unknown": pytest.approx(1 / 6),
    }
    only_good = truth._replace(anomalous=np.zeros(6, bool))
    found = decisions.rates(calibrated, "A", prediction(scores, [0] * 6), only_good, distance)
    assert np.isnan(found["misses"])


def test_unknown_objects(calibrated):
    distances = {"A": np.array([[1.0, 9], [7, 8]]), "C": np.array([[6.5, 7], [2, 7], [8, 9]])}
    confidences = {"A": np.array([0.9, 0.8]), "C": np.array([0.7, 0.85, 0.6])}
    found = decisions.unknown_rates(calibrated, distances, confidences)
    assert found["objects"] == {"C": pytest.approx(2 / 3)}
    assert found["taken_as_unknown"] == 1 / 2
    assert found["auroc_distance"] == pytest.approx(4 / 6)  # of 6 pairs, (4, 2), (8, 5), (4, 1) and so on by hand
    assert found["auroc_logits"] == pytest.approx(5 / 6)
    assert np.isnan(decisions.unknown_rates(calibrated, distances, {})["auroc_logits"])
