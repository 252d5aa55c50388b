"""Anomaly maps and scores, compared with results by hand and by loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.inference.anomaly_map import Rule, combine, common_score, make_rule, measure_scales, window_score
from iumad_jax.shapes import ErrorMaps, Scale
from tests import sentences

SCALES = {
    "rgb": Scale(np.float32([2, 20]), np.float32([1, 10]), np.float32([0.5, 5])),
    "depth": Scale(np.float32([4, 1]), np.float32([3, 0.5]), np.float32([1, 0.25])),
}
OBJECTS = np.array([0, 1, 1], np.int32)


def combined(rule, **errors):
    """Combine maps that are constant, (b,) by modality, and return the values of the combined maps."""
    maps = {m: jnp.ones((len(v), 4, 4)) * np.array(v, np.float32)[:, None, None] for m, v in errors.items()}
    return np.asarray(combine(ErrorMaps(maps), SCALES, OBJECTS[: len(maps["rgb"])], Rule(rule, "common")).map[:, 0, 0])


def test_the_maximum_is_taken_of_errors_in_units_of_good_images_of_the_recognised_object():
    np.testing.assert_allclose(combined("maximum", rgb=[3, 3, 30], depth=[4, 4, 1]), [1.5, 4, 1.5])


def test_z_scores_below_zero_do_not_count_in_the_sum():
    np.testing.assert_allclose(combined("sum", rgb=[2, 15, 0], depth=[5, 0.25, 1]), [2 + 2, 1, 2])


def test_one_modality_alone():
    np.testing.assert_allclose(combined("rgb", rgb=[3, 3, 30], depth=[9, 9, 9]), [1.5, 0.15, 1.5])
    np.testing.assert_allclose(combined("depth", rgb=[9, 9, 9], depth=[4, 4, 1]), [1, 4, 1])


def test_published_maps_have_no_scale():
    np.testing.assert_allclose(combined("published", rgb=[3, 3, 30], depth=[4, 4, 1]), [7, 7, 31])
    joint = jnp.full((1, 4, 4), 5.0)
    maps = {"rgb": jnp.full((1, 4, 4), 3.0), "depth": jnp.full((1, 4, 4), 4.0)}
    prediction = combine(ErrorMaps(maps, published=joint), SCALES, OBJECTS[:1], Rule("published", "common"))
    np.testing.assert_array_equal(prediction.map, joint)


def test_scales_are_those_of_all_pixels_of_good_images():
    good = np.random.default_rng(0).gamma(2, size=(5, 40, 40)).astype(np.float32)
    flat = np.zeros((5, 40, 40), np.float32)  # of identical images, by which nothing can be divided
    scales = measure_scales(ErrorMaps({"rgb": jnp.asarray(good), "depth": jnp.asarray(flat)}))
    values = np.sort(good.astype(np.float64), axis=None)
    assert scales["rgb"].quantile == pytest.approx(values[int(0.99 * len(values))], rel=1e-2)
    assert (scales["rgb"].mean, scales["rgb"].deviation) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    assert scales["depth"] == Scale(1, 0, 1)


def test_windows_have_16_pixels_and_no_padding():
    maps = np.random.default_rng(0).random((2, 64, 64)).astype(np.float32)
    maps[1, 0, :] = 9  # at the border
    for anomaly_map, score in zip(maps.astype(np.float64), window_score(jnp.asarray(maps)), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(anomaly_map, (16, 16))
        assert float(score) == pytest.approx(windows.mean((2, 3)).max(), rel=1e-5)


@pytest.mark.parametrize(("rule", "own", "expected"), [("own", 7.0, 7), ("own", None, 3), ("window16", 7.0, 3)])
def test_a_method_may_have_its_own_score(rule, own, expected):
    score = None if own is None else jnp.full(1, own)
    errors = ErrorMaps({"rgb": jnp.full((1, 32, 32), 3.0)}, score=score)
    assert float(combine(errors, {}, OBJECTS[:1], Rule("published", rule)).score[0]) == expected


def test_a_rule_must_exist_and_select_what_is_judged():
    config = configs.small("1-0")
    for key, value in (("combine", "mean"), ("score", "max")):
        changed = config.copy_and_resolve_references()
        changed[key] = value
        with pytest.raises(UserError, match=sentences.UNKNOWN_RULE.format(key=key, found=value)):
            make_rule(changed)
    config.update({"combine": "depth", "modality": "rgb"})
    with pytest.raises(UserError, match=sentences.NOT_JUDGED.format(found="depth", judged="rgb")):
        make_rule(config)
    config.update({"modality": "rgb+depth"})
    assert make_rule(config) == Rule("depth", "common")
    config.model.target = "rgb"  # the paper's: depth is an input, and its features are not judged
    with pytest.raises(UserError, match=sentences.NOT_JUDGED.format(found="depth", judged="rgb")):
        make_rule(config)


def test_the_common_score_is_the_mean_of_the_largest_values():
    maps = np.random.default_rng(0).normal(size=(3, 60, 60)).astype(np.float32)
    largest = np.sort(maps.reshape(3, -1).astype(np.float64), axis=1)[:, -18:]  # 0.5 % of 3,600
    np.testing.assert_allclose(common_score(jnp.asarray(maps)), largest.mean(1), rtol=1e-5)
