"""Thresholds and quantiles that users choose for a trained model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, thresholds
from iumad_jax.inference.detector import Detection
from iumad_jax.shapes import Calibration, GroundTruth
from tests import sentences

RNG = np.random.default_rng(0)
POSITIVE = st.floats(1e-3, 1e3)


def calibration(scores, peaks):
    return Calibration(np.array(scores), np.array(peaks), RNG.uniform(1, 2, (len(scores), 3)))


CALIBRATIONS = {"bolt": calibration([1, 2, 4], [3, 9, 6]), "nut": calibration([7, 8], [1, 2])}


@pytest.mark.parametrize("value", [0.01, 4, 1e6])
def test_a_chosen_threshold_scales_that_of_pixels_and_leaves_other_objects_alone(value):
    chosen = thresholds.choose({"bolt": value}, None, CALIBRATIONS)
    before, after = (thresholds.thresholds(CALIBRATIONS, 0.995, limits) for limits in ({}, chosen))
    np.testing.assert_allclose(after.image, [value, 8.0008], rtol=1e-6)
    np.testing.assert_allclose(after.pixel, [9 * value / 4, 2.0002], rtol=1e-6)
    np.testing.assert_array_equal(after.unknown, before.unknown)
    described, plain = (thresholds.describe(CALIBRATIONS, 0.995, limits)["objects"] for limits in (chosen, {}))
    assert described["nut"] == plain["nut"]
    assert [described["bolt"][kind]["threshold"] for kind in ("image", "pixel")] == pytest.approx(
        [value, 9 * value / 4]
    )
    assert (described["bolt"]["image"]["false_alarm_bound"], described["bolt"]["image"]["images"]) == (None, 3)


def test_a_threshold_is_chosen_for_objects_whose_good_images_score_nothing():
    blank = {"bolt": calibration([0, 0], [0, 0])}
    limits = thresholds.thresholds(blank, 0.995, thresholds.choose(2.5, None, blank))
    assert (limits.image.tolist(), limits.pixel.tolist()) == ([2.5], [2.5])


def test_one_number_is_for_all_objects():
    assert thresholds.choose(3, None, CALIBRATIONS) == {"bolt": 3, "nut": 3}
    assert thresholds.choose(None, 0.9, CALIBRATIONS) == {}


@given(st.dictionaries(st.text("ab =.", min_size=1).filter(lambda name: name == name.strip()), POSITIVE, min_size=1))
def test_pairs_are_parsed(by_object):
    assert thresholds.parse([f"{name}={value!r}" for name, value in by_object.items()]) == by_object


def test_a_number_is_parsed():
    assert thresholds.parse(["30"]) == 30
    assert thresholds.parse(None) is None


@pytest.mark.parametrize(
    "values", [["x"], ["30", "40"], ["30", "bolt=4"], ["bolt="], ["bolt=1", "bolt=2"], ["=3", "4"]]
)
def test_other_texts_are_refused(values):
    with pytest.raises(UserError, match=sentences.THRESHOLD_UNREADABLE.format(",".join(values))):
        thresholds.parse(values)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "3"])
def test_thresholds_are_positive_numbers(value):
    with pytest.raises(UserError, match=sentences.THRESHOLD_OUT_OF_RANGE.format(object="nut", value=value)):
        thresholds.choose({"bolt": 1, "nut": value}, None, CALIBRATIONS)


def test_objects_and_quantiles_are_checked():
    with pytest.raises(UserError, match=sentences.NO_OBJECT_OF_MODEL.format("washer")):
        thresholds.choose({"washer": 1}, None, CALIBRATIONS)
    for quantile in (0.49, 1.01, math.nan, "0.9"):
        with pytest.raises(UserError, match=sentences.QUANTILE_OUT_OF_RANGE.format(quantile)):
            thresholds.choose(None, quantile, CALIBRATIONS)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_precision_recall_and_f1_agree_with_scikit_learn(images):
    anomalous, alarm = map(np.array, zip(*images, strict=True))
    zeros = np.zeros(len(images))
    decision = decisions.Decision(zeros, zeros, zeros, zeros, alarm, None, zeros, zeros, zeros)
    rates = decisions.rates(decision, GroundTruth(None, None, None, None, anomalous, None, None), 0)
    actual = [rates[name] for name in ("precision", "recall", "f1")]
    expected = precision_recall_fscore_support(anomalous, alarm, average="binary", zero_division=np.nan)[:3]
    if not anomalous.any():
        assert np.isnan(actual).all()
    elif not alarm.any():  # scikit-learn leaves F1 undefined, too; no defect is found, so it is 0
        assert (math.isnan(actual[0]), actual[1:]) == (True, [0, 0])
    else:
        np.testing.assert_allclose(actual, expected)
    assert rates["recall"] == pytest.approx(1 - rates["misses"], nan_ok=True)


@given(st.lists(st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32)), min_size=2))
def test_relative_scores_rank_like_scores_and_are_a_half_at_the_threshold(pairs):
    score, threshold = np.array(pairs, np.float32).T
    relative = Detection(score, *[None] * 8, threshold, None, None).relative_score
    assert ((relative >= 0) & (relative <= 1)).all()
    assert (score > threshold)[relative > 0.5 + 1e-6].all()
    assert (score <= threshold)[relative < 0.5 - 1e-6].all()
    one_object = Detection(score, *[None] * 8, np.full_like(score, 3), None, None).relative_score
    assert (np.diff(one_object[np.argsort(score)]) >= 0).all()
