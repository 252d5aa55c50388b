"""Thresholds, their guarantees, and decisions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iumad_jax.inference import decisions, thresholds
from iumad_jax.inference.thresholds import make_calibration
from iumad_jax.shapes import Calibration, GroundTruth, Prediction


@given(st.integers(1, 400), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.995, 1.0]))
def test_the_threshold_is_the_smallest_with_the_guarantee(n, quantile):
    """Counted by hand: a further score lies in each of the n + 1 gaps between the scores with equal probability."""
    scores = np.random.default_rng(n).permutation(n).astype(float)
    record = thresholds.describe_threshold(scores, quantile)
    above = {t: (scores > t).sum() + 1 for t in scores}  # number of gaps above t
    allowed = [t for t in scores if above[t] / (n + 1) <= 1 - quantile + 1e-12]
    assert record["threshold"] == (min(allowed) if allowed else scores.max())
    assert record["false_alarm_bound"] == pytest.approx(above[record["threshold"]] / (n + 1))
    assert record["images"] == n


def test_the_false_alarm_bound_holds_on_average():
    rng = np.random.default_rng(0)
    rates, bound = [], None
    for _ in range(3000):
        record = thresholds.describe_threshold(rng.gamma(2, size=30), 0.9)
        rates.append(np.exp(-record["threshold"]) * (1 + record["threshold"]))  # probability that gamma(2) exceeds it
        bound = record["false_alarm_bound"]
    assert bound == pytest.approx(3 / 31)
    assert np.mean(rates) == pytest.approx(bound, rel=0.05)


def test_the_false_alarm_bound_holds_for_images_of_several_tiles():
    """One in 100 images may exceed it in one of 5 tiles, so one in 500 tiles: rank ceil(0.998 * 1001) of 1000."""
    scores = np.random.default_rng(0).permutation(1000)
    described = thresholds.describe_threshold(scores, 0.99, tiles=5)
    assert (described["threshold"], described["images"]) == (998, 200)
    assert described["false_alarm_bound"] == pytest.approx(5 * 2 / 1001)
    limits = thresholds.thresholds({"bolt": Calibration(scores, 2 * scores, np.ones((200, 3)), tiles=5)}, 0.99)
    np.testing.assert_allclose([limits.image, limits.pixel], [[998 * 1.0001], [1996 * 1.0001]], rtol=1e-6)


def test_few_images_have_a_weaker_false_alarm_bound():
    four, many = (thresholds.describe_threshold(np.arange(n), 0.995) for n in (4, 199))
    assert (four["threshold"], four["false_alarm_bound"]) == (3, pytest.approx(0.2))
    assert (many["threshold"], many["false_alarm_bound"]) == (198, pytest.approx(0.005))
    assert thresholds.describe_threshold(np.arange(400), 0.995)["threshold"] == 398


def test_the_interval_is_bootstrapped():
    scores = np.random.default_rng(1).normal(size=100)
    record = thresholds.describe_threshold(scores, 0.9)
    assert record == thresholds.describe_threshold(scores[::-1], 0.9)
    rng = np.random.default_rng(7)
    resampled = [np.sort(rng.choice(scores, 100))[90] for _ in range(4000)]  # the 91st of 100
    np.testing.assert_allclose(record["interval"], np.quantile(resampled, [0.025, 0.975]), atol=0.1)
    assert record["interval"][0] < record["threshold"] < record["interval"][1]


def prediction(scores, peaks):
    maps = np.zeros((len(peaks), 4, 4), np.float32)
    maps[:, 1, 2] = peaks
    return Prediction(maps, np.array(scores, np.float32), None)


def scored(scores, peaks):
    return np.array(scores, np.float32), np.array(peaks, np.float32)


@pytest.fixture
def calibration():
    return {
        "A": make_calibration(*scored([1, 2, 3], [5, 6, 4]), np.array([[1.0, 13], [2, 13], [1, 12]]), 0),
        "B": make_calibration(*scored([7, 8], [1, 2]), np.array([[13.0, 2], [13, 3]]), 1, from_training_images=True),
    }


def test_every_object_has_its_thresholds(calibration):
    described = thresholds.describe(calibration, 0.995)
    objects = described["objects"]
    assert [objects[name]["image"]["threshold"] for name in "AB"] == pytest.approx([3.0003, 8.0008])
    assert [objects[name]["pixel"]["threshold"] for name in "AB"] == pytest.approx([6.0006, 2.0002])
    assert objects["A"]["image"]["false_alarm_bound"] == pytest.approx(1 / 4)
    assert objects["B"]["image"]["false_alarm_bound"] is None  # scores of training images guarantee nothing
    assert described["rms_distance"] == pytest.approx(np.sqrt((1 + 4 + 1 + 4 + 9) / 5))
    limits = thresholds.thresholds(calibration, 0.995)  # equal to the described thresholds
    np.testing.assert_allclose([limits.image, limits.pixel], [[3.0003, 8.0008], [6.0006, 2.0002]], rtol=1e-6)
    assert limits.unknown.tolist() == [described["unknown"]["threshold"]] * 2
    assert float(limits.rms_distance) == pytest.approx(described["rms_distance"])


def test_the_unknown_threshold_lies_between_good_images_and_other_objects(calibration):
    unknown = thresholds.describe(calibration, 0.995)["unknown"]
    assert unknown["good"]["threshold"] == 3
    assert unknown["good"]["images"] == 5
    assert unknown["others"] == 12
    assert unknown["threshold"] == 6
    single = thresholds.describe({"A": make_calibration(*scored([1], [1]), np.array([[2.5]]), 0)}, 0.995)["unknown"]
    assert (single["threshold"], single["others"]) == (5, None)
    mixed = {"A": make_calibration(*scored([1, 1], [1, 1]), np.array([[3.0, 4], [7, 6]]), 0)} | {
        "B": make_calibration(*scored([1], [1]), np.array([[8.0, 3]]), 1)
    }
    assert thresholds.describe(mixed, 0.995)["unknown"]["threshold"] == 6  # not below the threshold of good images


def test_an_object_with_few_images_changes_no_thresholds_of_others(calibration):
    """Its images are far from all objects, since few images do not show how much further ones vary."""
    scarce = make_calibration(
        *scored([70, 80], [90, 10]), np.array([[14.0, 15, 11], [13, 14, 12]]), 2, from_training_images=True, few=True
    )
    before, after = (thresholds.describe(c, 0.995) for c in (calibration, calibration | {"C": scarce}))
    assert {name: after["objects"][name] for name in "AB"} == before["objects"]
    assert (after["unknown"], after["rms_distance"]) == (before["unknown"], before["rms_distance"])
    assert after["objects"]["C"]["image"]["threshold"] == pytest.approx(80.008)
    assert after["objects"]["C"]["unknown"]["threshold"] == pytest.approx(
        np.sqrt(12 * 13)
    )  # further images of C may be as far
    limits = thresholds.thresholds(calibration | {"C": scarce}, 0.995)
    np.testing.assert_allclose(limits.unknown, [6, 6, np.sqrt(12 * 13)], rtol=1e-6)
    assert thresholds.describe({"C": scarce}, 0.995)["unknown"]["good"]["images"] == 2  # there is no other object


DISTANCE = np.array([[1.0, 9], [1, 9], [9, 2], [1, 9], [7, 8], [6, 8]], np.float32)


def decide(calibration, scores, peaks):
    limits = thresholds.thresholds(calibration, 0.995)
    return decisions.decide(limits, prediction(scores, peaks), DISTANCE, DISTANCE.argmin(1), 2)


def test_decisions_use_the_thresholds_of_the_recognised_object(calibration):
    """The third image is recognised as B, whose thresholds are 8 and 2; all others as A, with 3 and 6."""
    decision = decide(calibration, [3, 3.5, 3.5, 4, 2, 9], [6, 7, 2.5, 1, 1, 1])
    assert decision.object_id.tolist() == [0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(decision.image_threshold, np.array([3, 3, 8, 3, 3, 3]) * 1.0001, rtol=1e-6)
    assert decision.anomalous.tolist() == [False, True, False, True, False, True]  # equal to the threshold is no alarm
    assert decision.mask.sum((1, 2)).tolist() == [0, 1, 1, 0, 0, 0]
    assert decision.distance.tolist() == [1, 1, 2, 1, 7, 6]
    assert decision.unknown.tolist() == [False, False, False, False, True, False]
    rms_distance = np.sqrt((1 + 4 + 1 + 4 + 9) / 5)
    likelihood = np.exp(-((DISTANCE / rms_distance) ** 2))  # for two channels
    np.testing.assert_allclose(decision.probability, likelihood.max(1) / likelihood.sum(1), rtol=1e-5)


def test_rounding_makes_no_alarm_of_the_image_that_set_the_threshold(calibration):
    """Another batch or device changes scores by about float32's precision."""
    decision = decide(calibration, [3 * (1 + 1e-5)] * 6, [6 * (1 + 1e-5)] * 2 + [1] * 4)
    assert decision.anomalous.tolist() == [False] * 6
    assert not decision.mask.any()


def test_rates_are_shares_of_test_images(calibration):
    anomalous = np.array([False, False, False, False, True, True])
    truth = GroundTruth(None, None, None, None, anomalous, None, None)
    decision = decide(calibration, [3, 3.5, 5, 4, 2, 9], [0] * 6)
    assert decisions.rates(decision, truth, 0) == {
        "false_alarms": 2 / 4,  # the third image would be one by the threshold of A
        "misses": 1 / 2,
        "precision": 1 / 3,
        "recall": 1 / 2,
        "f1": pytest.approx(2 / 5),
        "recognised": pytest.approx(5 / 6),
        "taken_as_unknown": pytest.approx(1 / 6),
    }
    only_good = truth._replace(anomalous=np.zeros(6, bool))
    assert np.isnan(decisions.rates(decision, only_good, 0)["misses"])


def test_rates_of_unknown_objects(calibration):
    limits = thresholds.thresholds(calibration, 0.995)

    def decide_at(distance):
        distance = np.array(distance, np.float32)
        images = prediction([0] * len(distance), [0] * len(distance))
        return decisions.decide(limits, images, distance, distance.argmin(1), 2)

    by_object = {"A": decide_at([[1, 9], [7, 8]]), "C": decide_at([[6.5, 7], [2, 7], [8, 9]])}
    confidences = {"A": np.array([0.9, 0.8]), "C": np.array([0.7, 0.85, 0.6])}
    rates = decisions.unknown_rates("AB", by_object, confidences)
    assert rates["objects"] == {"C": pytest.approx(2 / 3)}
    assert rates["taken_as_unknown"] == 1 / 2
    assert rates["auroc_distance"] == pytest.approx(4 / 6)  # 4 of 6 pairs: (2, 1), (6.5, 1), (8, 1) and (8, 7)
    assert rates["auroc_logits"] == pytest.approx(5 / 6)
    assert np.isnan(decisions.unknown_rates("AB", by_object, {})["auroc_logits"])
