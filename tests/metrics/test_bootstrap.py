"""Resampled metrics against the exact metrics of images that are repeated one by one."""

import math

import numpy as np
import pytest
import scipy.ndimage

from iumad_jax.metrics import (
    image_auroc,
    image_replicates,
    interval_of_mean,
    pixel_metrics,
    pixel_replicates,
    resample,
    spread,
)

LABELS = np.arange(12) % 2  # good and anomalous images in turn


def images(seed, levels=None):
    """Make 12 images of 32 x 32 with up to three defects each, some of which are easy to find, and a region."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(LABELS), 32, 32), bool)
    for mask in masks[1::2]:
        for _ in range(rng.integers(1, 4)):
            y, x, size = rng.integers(0, 26, 3)
            mask[y : y + 4 + size // 4, x : x + 4 + size // 5] = True
    maps = scipy.ndimage.gaussian_filter(rng.random(masks.shape), (0, 1, 1))
    maps += rng.uniform(0, 0.3, (12, 1, 1)) * masks + rng.uniform(0, 0.1, (12, 1, 1))  # images differ in brightness
    if levels:
        maps = np.floor(maps * levels)
    return masks, maps.astype(np.float32), rng.random(masks.shape) < 0.4


def repeated(counts):
    """Yield the indices of the images in each resample."""
    for row in counts:
        yield np.repeat(np.arange(len(row)), row.astype(int))


@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_replicates_equal_the_metrics_of_repeated_images(seed):
    masks, maps, region = images(seed)
    counts = np.vstack([np.ones(len(LABELS)), resample(LABELS, 200)])  # first, every image once
    replicates = pixel_replicates(masks, maps, counts, {"object": region})
    exact = [pixel_metrics(masks[i], maps[i], {"object": region[i]}) for i in repeated(counts)]
    assert set(replicates) == set(exact[0])
    for metric, values in replicates.items():
        expected = np.array([metrics[metric] for metrics in exact])
        assert values[0] == pytest.approx(expected[0], abs=1e-3)
        np.testing.assert_allclose(values, expected, atol=2e-3)
        error, interval = spread(values[1:])
        assert error == pytest.approx(expected[1:].std(ddof=1), abs=1e-3)
        assert interval == pytest.approx(np.quantile(expected[1:], [0.025, 0.975]), abs=2e-3)
        assert error > 0.01  # so that the agreement is not one of constants


def test_ties_count_half_in_pixel_auroc():
    masks, maps, _ = images(2, levels=6)
    counts = resample(LABELS, 50)
    values = pixel_replicates(masks, maps, counts)["p_auroc"]
    expected = [pixel_metrics(masks[i], maps[i])["p_auroc"] for i in repeated(counts)]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_image_replicates_equal_the_auroc_of_repeated_images():
    scores = np.random.default_rng(3).integers(0, 9, len(LABELS)) + 2 * LABELS  # with ties
    counts = resample(LABELS, 200)
    expected = [image_auroc(LABELS[i], scores[i]) for i in repeated(counts)]
    np.testing.assert_allclose(image_replicates(LABELS, scores, counts), expected, atol=1e-12)


def test_resamples_draw_each_kind_of_image_with_replacement():
    labels = np.array([1, 0, 0, 1, 0, 0, 0])
    counts = resample(labels, 20_000)
    np.testing.assert_array_equal(counts[:, labels == 0].sum(1), 5)
    np.testing.assert_array_equal(counts[:, labels == 1].sum(1), 2)
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.03)
    assert (counts[:, 1] == 0).mean() == pytest.approx(0.8**5, abs=0.01)
    np.testing.assert_array_equal(counts, resample(labels, 20_000))  # the same images at every call
    assert (counts[:10] != resample(labels, 10, seed=1)).any()


def test_undefined_is_nan():
    masks, maps, region = images(4)
    counts = resample(LABELS, 5)
    for some_masks, regions in ((masks & False, {}), (masks | True, {}), (masks, {"none": region & False})):
        values = pixel_replicates(some_masks, maps, counts, regions)
        suffix = "_none" if regions else ""
        assert np.isnan([values[f"p_auroc{suffix}"], values[f"aupro{suffix}"]]).all()
    assert np.isnan(image_replicates(np.zeros(3), np.arange(3), np.ones((2, 3)))).all()
    for labels in ([0, 0, 0, 1], [1, 1, 1, 0], [0, 0], []):  # the spread of a single image is unknown
        n = len(labels)
        none = resample(labels)
        assert none.shape == (0, n)
        all_values = [
            image_replicates(labels, np.arange(n), none),
            *pixel_replicates(masks[:n], maps[:n], none).values(),
        ]
        assert all(np.isnan(np.hstack(spread(values))).all() for values in all_values)


def test_resamples_without_a_defect_or_a_negative_are_left_out():
    """Only one anomalous image has a mask, or only one good image a region: resamples without it have no metric."""
    masks, maps, _ = images(5)
    masks[np.arange(12) != 3] = False
    masks[3, 4:9, 4:9] = True
    counts = resample(LABELS)
    values = pixel_replicates(masks, maps, counts)["aupro"]
    np.testing.assert_array_equal(np.isnan(values), counts[:, 3] == 0)
    assert spread(values) == spread(values[counts[:, 3] > 0])
    region = np.zeros_like(masks)
    region[6, :2] = True
    for some_maps in (maps, maps + masks, maps - masks):
        values = pixel_replicates(masks, some_maps, counts, {"object": region})
        for metric in ("p_auroc_object", "aupro_object"):
            np.testing.assert_array_equal(np.isnan(values[metric]), (counts[:, 3] == 0) | (counts[:, 6] == 0))


def test_the_interval_of_a_mean_of_objects_covers_it():
    """The mean of three objects' independent estimates lies in its interval in 95 % of the cases."""
    rng, errors = np.random.default_rng(6), np.array([0.02, 0.05, 0.03])
    draws = 0.5 + errors * rng.standard_normal((4000, 3))
    covered = [low < 0.5 < high for low, high in (interval_of_mean(values, errors) for values in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_the_interval_of_a_mean_by_hand():
    nan = math.nan
    assert interval_of_mean([0.5, 0.7], [0.03, 0.04]) == pytest.approx((0.6 - 1.96 * 0.025, 0.6 + 1.96 * 0.025))
    assert interval_of_mean([0.5, nan, 0.7], [0.03, nan, 0.04]) == interval_of_mean([0.5, 0.7], [0.03, 0.04])
    assert interval_of_mean([0.99, 0.01], [0.9, 0.9]) == (0, 1)
    for values, errors in (([0.5, 0.7], [0.03, nan]), ([nan], [nan]), ([], [])):
        assert np.isnan(interval_of_mean(values, errors)).all()
