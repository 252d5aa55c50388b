"""AUROC and AUPRO against sklearn, plain loops and examples by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import auc, roc_auc_score, roc_curve

from iumad_jax.metrics import (
    aupro,
    aupro_exact,
    image_auroc,
    image_roc,
    pixel_auroc,
    pixel_metrics,
    pixel_metrics_of_groups,
    pro_curve,
)
from tests import sentences

PIXEL_FUNCTIONS = (pixel_auroc, aupro, aupro_exact)


def blobs(seed, n=6, size=24, levels=None, dtype=np.float32):
    """Make masks with touching, diagonal and border components, two good images, and noisy maps."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), bool)
    for mask in masks[:-2]:
        for _ in range(3):
            y, x = rng.integers(0, size, 2)
            mask[y : y + rng.integers(1, 8), x : x + rng.integers(1, 8)] = True
        mask[range(5), range(size - 5, size)] = True  # joined by corners only
    maps = rng.random(masks.shape) + 0.4 * masks
    if levels:
        maps = np.floor(maps * levels) / levels
    return masks, maps.astype(dtype)


def components(mask):
    """Find the 8-connected components by flood fill."""
    remaining = {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]}
    all_components = []
    while remaining:
        front, component = [remaining.pop()], []
        while front:
            y, x = front.pop()
            component.append((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in remaining:
                    remaining.remove(neighbour)
                    front.append(neighbour)
        all_components.append(component)
    return all_components


def brute_force_aupro(masks, maps, limit, thresholds, region):
    """Compute AUPRO by plain loops over its definition."""
    defects, negatives = [], []
    for i in range(len(masks)):
        defects += [[float(maps[i][pixel]) for pixel in component] for component in components(masks[i])]
        for y in range(masks.shape[1]):
            for x in range(masks.shape[2]):
                if not masks[i, y, x] and (region is None or region[i, y, x]):
                    negatives.append(float(maps[i, y, x]))
    negatives.sort()
    m = len(negatives)
    curve = [(1.0, 1.0)]
    for position in [int(p) for p in np.linspace(0, m - 1, thresholds)]:
        overlaps = [sum(score > negatives[position] for score in defect) / len(defect) for defect in defects]
        curve.append((1 - (position + 1) / m, sum(overlaps) / len(overlaps)))
    curve.sort()
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def brute_force_exact(masks, maps, limit, region):
    """Compute the mean over defects of the area under sklearn's ROC curve of each defect alone."""
    areas = []
    for i in range(len(masks)):
        for component in components(masks[i]):
            positives = [maps[i][pixel] for pixel in component]
            negatives = maps[~masks & (True if region is None else region)]
            rate, detected, _ = roc_curve(
                np.repeat([1, 0], [len(positives), len(negatives)]), [*positives, *negatives], drop_intermediate=False
            )
            inside = rate <= limit
            x, y = [*rate[inside], limit], [*detected[inside], np.interp(limit, rate, detected)]
            areas.append(auc(x, y) / limit)
    return np.mean(areas)


@pytest.mark.parametrize("levels", [None, 2, 17])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_auroc_equals_sklearn(levels, dtype):
    masks, maps = blobs(0, levels=levels, dtype=dtype)
    assert pixel_auroc(masks, maps) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    labels, scores = masks[:, :, 20].ravel(), maps[:, :, 20].ravel()
    assert image_auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = roc_curve(labels, scores, drop_intermediate=False)[:2]
    np.testing.assert_allclose(image_roc(labels, scores), expected, rtol=0, atol=1e-12)


def test_auroc_is_not_flipped_below_one_half():
    assert image_auroc([0, 0, 1, 1], [4, 3, 2, 1]) == 0
    assert image_auroc([1, 0, 0], [5, 5, 1]) == 0.75  # one tie, one win


def test_auroc_distinguishes_neighbouring_floats():
    low = np.float32(0.1)
    assert image_auroc([0, 1], np.array([low, np.nextafter(low, np.float32(1))])) == 1
    assert image_auroc([0, 1], np.array([0.1, np.nextafter(0.1, 1)])) == 1  # float64 is not rounded to float32


@pytest.mark.parametrize("levels", [None, 3, 40])
@pytest.mark.parametrize("with_region", [False, True])
@pytest.mark.parametrize(("limit", "thresholds"), [(0.3, 100), (0.05, 100), (0.01, 100), (1.0, 100), (0.3, 7)])
def test_aupro_equals_the_definition_in_plain_loops(levels, with_region, limit, thresholds):
    masks, maps = blobs(1, levels=levels)
    region = np.random.default_rng(2).random(masks.shape) < 0.3 if with_region else None
    area = aupro(masks, maps, limit, thresholds, region)
    assert area == pytest.approx(brute_force_aupro(masks, maps, limit, thresholds, region), abs=1e-12)
    area = aupro_exact(masks, maps, limit, region)
    assert area == pytest.approx(brute_force_exact(masks, maps, limit, region), abs=1e-12)


def test_aupro_by_hand():
    """Two defects of 1 and 3 pixels, four negatives 1 2 3 4.

    Thresholds 1 2 3 4 have rates 3/4 2/4 1/4 0. The small defect (3.5) is detected below 3.5; of the large one (2.5 4
    9), 1/3 lies above 4 (4 itself does not), 2/3 above 3, all above 2. So the overlap is 1/6 at rate 0,
    (1 + 2/3) / 2 = 5/6 at 1/4, and 1 from there on.
    """
    masks = np.array([[[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]], bool)
    maps = np.array([[[3.5, 1, 2, 3], [0, 0, 4, 9], [0, 0, 2.5, 4]]])
    region = np.array([[[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]], bool)
    assert aupro(masks, maps, 0.25, 4, region) == pytest.approx((1 / 6 + 5 / 6) / 2)
    at_limit = 5 / 6 + (1 - 5 / 6) * 0.2  # a fifth of the way from 0.25 to 0.5
    area = 0.25 * (1 / 6 + 5 / 6) / 2 + 0.05 * (5 / 6 + at_limit) / 2
    assert aupro(masks, maps, 0.3, 4, region) == pytest.approx(area / 0.3)
    # With every score as a threshold: only 9 until the tie at 4 ends at rate 1/4, then 3.5 at once; 2.5 at rate 2/4.
    assert aupro_exact(masks, maps, 0.25, region) == pytest.approx((1 / 6 + 2 / 6) / 2)
    assert aupro_exact(masks, maps, 0.5, region) == pytest.approx(((1 / 6 + 2 / 6) / 2 + 5 / 6) / 2)


def test_every_defect_has_equal_weight():
    """A detected small defect and a missed large one give half the overlap, whatever their sizes."""
    masks, maps = np.zeros((2, 20, 20), bool), np.full((2, 20, 20), 0.5)
    masks[0, 0, 0], maps[0, 0, 0] = True, 1
    masks[1, 5:15, 5:15], maps[1, 5:15, 5:15] = True, 0
    assert aupro_exact(masks, maps) == pytest.approx(0.5)
    assert pixel_auroc(masks, maps) == pytest.approx(1 / 101)


def test_corners_connect_and_images_do_not():
    """Diagonal pixels are one defect; the pixel at the same position in the next image is another defect."""
    masks = np.zeros((2, 3, 3), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[1, 1, 1] = True
    maps = np.where(masks, 0.0, 1.0)
    maps[0, 0, 0] = maps[0, 1, 1] = 2.0  # the first defect is detected completely, the second is missed
    assert aupro_exact(masks, maps) == pytest.approx(0.5)
    assert aupro(masks, maps) == pytest.approx(0.5)


def test_region_limits_negatives_only():
    masks, maps = blobs(3)
    region = np.zeros_like(masks)
    region[:, 5:12, 5:12] = True
    kept = masks | region
    assert pixel_auroc(masks, maps, region) == pytest.approx(roc_auc_score(masks[kept], maps[kept]), abs=1e-12)
    for function in PIXEL_FUNCTIONS:
        assert function(masks, maps, region=np.ones_like(masks)) == function(masks, maps)
        outside = np.where(kept, maps, 9 * maps)  # pixels outside both have no influence
        assert function(masks, outside, region=region) == function(masks, maps, region=region)


def test_pixel_metrics_equal_the_single_functions():
    masks, maps = blobs(4, levels=30)
    left, right = (np.broadcast_to(half, masks.shape) for half in (np.arange(24) < 12, np.arange(24) >= 12))
    assert pixel_metrics(masks, maps, {"left": left, "right": right}, limit=0.2) == pytest.approx(
        {
            "p_auroc": pixel_auroc(masks, maps),
            "aupro": aupro(masks, maps, 0.2),
            "aupro_exact": aupro_exact(masks, maps, 0.2),
            "p_auroc_left": pixel_auroc(masks, maps, left),
            "aupro_left": aupro(masks, maps, 0.2, region=left),
            "p_auroc_right": pixel_auroc(masks, maps, right),
            "aupro_right": aupro(masks, maps, 0.2, region=right),
        },
        abs=1e-12,
        nan_ok=True,
    )


def test_groups_of_defects_share_their_negatives():
    """Each group equals all defects but the others erased from the negatives; the means of groups equal the whole."""
    masks, maps = blobs(6, levels=30)
    groups = {"first": np.arange(2), "rest": np.arange(2, len(masks))}
    left = np.broadcast_to(np.arange(24) < 12, masks.shape)
    found = pixel_metrics_of_groups(masks, maps, groups, {"left": left})
    defects, pixels = [], []
    for name, rows in groups.items():
        of_group = np.zeros_like(masks)
        of_group[rows] = masks[rows]
        pixels.append(of_group.sum())
        defects.append(scipy.ndimage.label(of_group, np.pad(np.ones((1, 3, 3)), ((1, 1), (0, 0), (0, 0))))[1])
        assert found[name]["p_auroc"] == pytest.approx(pixel_auroc(of_group, maps, ~masks), abs=1e-12)
        assert found[name]["aupro_exact"] == pytest.approx(aupro_exact(of_group, maps, region=~masks), abs=1e-12)
        assert found[name]["aupro_left"] == pytest.approx(aupro(of_group, maps, region=left & ~masks), abs=1e-12)
    whole, parts = pixel_metrics(masks, maps, {"left": left}), found.values()
    for metric, weights in {"p_auroc": pixels, "p_auroc_left": pixels, "aupro_exact": defects}.items():
        assert np.average([part[metric] for part in parts], weights=weights) == pytest.approx(whole[metric], abs=1e-12)


@pytest.mark.parametrize("function", PIXEL_FUNCTIONS)
def test_perfect_and_constant_maps(function):
    masks, _ = blobs(5)
    assert function(masks, masks.astype(np.float32)) == pytest.approx(1)
    assert function(masks, 1 - masks) == 0
    assert pixel_auroc(masks, np.ones(masks.shape)) == 0.5
    assert aupro_exact(masks, np.ones(masks.shape)) == pytest.approx(0.15)  # the diagonal up to 0.3


def test_undefined_is_nan():
    nothing, everything, maps = np.zeros((2, 4, 4), bool), np.ones((2, 4, 4), bool), blobs(8, 2, 4)[1]
    for masks in (nothing, everything):
        assert all(math.isnan(function(masks, maps)) for function in PIXEL_FUNCTIONS)
        assert all(math.isnan(value) for value in pixel_metrics(masks, maps, {"all": everything}).values())
    half = np.arange(4) < 2 + nothing
    assert all(math.isnan(function(half, maps, region=nothing)) for function in PIXEL_FUNCTIONS)
    assert all(math.isnan(function(nothing[:0], maps[:0])) for function in PIXEL_FUNCTIONS)
    for labels, scores in (([0, 0], [1, 2]), ([1, 1], [1, 2]), ([], [])):
        assert math.isnan(image_auroc(labels, scores))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(bad):
    masks, maps = blobs(6)
    maps[-1, 0, 0] = bad
    for function in (*PIXEL_FUNCTIONS, pixel_metrics):
        with pytest.raises(ValueError, match=sentences.SCORES_NOT_FINITE):
            function(masks, maps)
    with pytest.raises(ValueError, match=sentences.SCORES_NOT_FINITE):
        image_auroc([0, 1], [0, bad])


def test_shapes_and_settings_must_fit():
    masks, maps = blobs(7)
    for function in (*PIXEL_FUNCTIONS, pixel_metrics):
        for arguments in ((masks[0], maps[0]), (masks[:-1], maps), (masks, maps[:, :-1]), (masks[..., None], maps)):
            with pytest.raises(ValueError, match=sentences.SHAPES_DIFFER):
                function(*arguments)
    for function in PIXEL_FUNCTIONS:
        with pytest.raises(ValueError, match=sentences.SHAPES_DIFFER):
            function(masks, maps, region=masks[:1])
    with pytest.raises(ValueError, match=sentences.SHAPES_DIFFER):
        pixel_metrics(masks, maps, {"first": masks[:1]})
    for labels, scores in (([0, 1], [0, 1, 2]), ([[0, 1]], [[0, 1]]), (1, 2)):
        with pytest.raises(ValueError, match=r"\(n,\)"):
            image_auroc(labels, scores)
    for limit in (0, -0.1, 1.1, math.nan):
        for function in (aupro, aupro_exact, pixel_metrics):
            with pytest.raises(ValueError, match="limit"):
                function(masks, maps, limit=limit)
    with pytest.raises(ValueError, match="thresholds"):
        aupro(masks, maps, thresholds=1)


SMALL = (3, 5, 6)
small_masks = arrays(bool, SMALL)
small_maps = arrays(np.float32, SMALL, elements=st.integers(0, 12).map(lambda level: level / 4))


@settings(max_examples=40, deadline=None)
@given(small_masks, small_maps)
def test_only_the_order_of_scores_counts(masks, maps):
    for function in PIXEL_FUNCTIONS:
        transformed = function(masks, np.exp(3 * maps) - 7)
        assert transformed == pytest.approx(function(masks, maps), abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(small_masks, small_maps, st.permutations(range(3)))
def test_symmetries(masks, maps, order):
    """Reordered or mirrored images give equal values; swapped labels give the complement."""
    for function in PIXEL_FUNCTIONS:
        value = function(masks, maps)
        assert function(masks[order], maps[order]) == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert function(masks[:, ::-1, ::-1], maps[:, ::-1, ::-1]) == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert pixel_auroc(~masks, maps) == pytest.approx(1 - pixel_auroc(masks, maps), abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(small_maps, st.integers(1, 9), st.sampled_from([0.05, 0.3, 1.0]))
def test_exact_aupro_of_one_defect_is_the_partial_auroc(maps, width, limit):
    """With one defect the overlap is the true positive rate, so the area up to rate 1 is the AUROC."""
    masks = np.zeros(SMALL, bool)
    masks[1, 0:2, : min(width, 6)] = True
    rate, detected, _ = roc_curve(masks.ravel(), maps.ravel(), drop_intermediate=False)
    inside = rate <= limit
    area = auc([*rate[inside], limit], [*detected[inside], np.interp(limit, rate, detected)]) / limit
    assert aupro_exact(masks, maps, limit) == pytest.approx(area, abs=1e-12)
    assert aupro_exact(masks, maps, 1) == pytest.approx(pixel_auroc(masks, maps), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 5])
def test_pro_curve_at_given_rates(levels):
    masks, maps = blobs(3, levels=levels)
    rates = [0, 0.001, 0.1, 0.3, 0.999, 1]
    overlap, thresholds = pro_curve(masks, maps, rates)
    normal = np.sort(maps[~masks])
    defects = [[maps[i][pixel] for pixel in component] for i in range(len(masks)) for component in components(masks[i])]
    for rate, value, threshold in zip(rates, overlap, thresholds, strict=True):
        lowest = next(score for score in normal if (normal > score).mean() <= rate)
        assert threshold == lowest
        assert value == pytest.approx(np.mean([np.mean(np.array(defect) > lowest) for defect in defects]))
    assert (overlap[0], thresholds[-1]) == (pytest.approx(overlap.min()), normal[0])


def test_the_area_under_pro_curve_is_aupro_exact():
    masks, maps = blobs(4)
    rates = np.linspace(0, 0.3, 2000)
    overlap, _ = pro_curve(masks, maps, rates)
    assert np.trapezoid(overlap, rates) / 0.3 == pytest.approx(aupro_exact(masks, maps), abs=1e-3)


def test_rates_are_not_lost_to_rounding():
    maps = np.arange(100.0).reshape(1, 1, 100)
    _, thresholds = pro_curve(np.zeros((1, 1, 100)), maps, [0.29, 0.57, 0.295])  # 0.29 * 100 is 28.999999999999996
    np.testing.assert_array_equal(thresholds, [70, 42, 70])  # 29, 57 and 29 of 100 lie above


def test_pro_curve_is_nan_if_undefined():
    maps = np.arange(4.0).reshape(1, 2, 2)
    overlap, thresholds = pro_curve(np.zeros((1, 2, 2)), maps, [0.5])
    assert np.isnan(overlap)
    assert thresholds == 1
    overlap, thresholds = pro_curve(np.ones((1, 2, 2)), maps, [0.5])
    assert np.isnan([overlap, thresholds]).all()
