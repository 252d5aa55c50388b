"""Bootstrap over test images: how far the metrics of an object depend on which images happen to be tested.

Good and anomalous images are resampled separately, with replacement (Efron and Tibshirani, 1993). Resampling only
weights the images, so each image's pixels are counted once, above common thresholds, for the pixel metrics of all
resamples.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iumad_jax.metrics.aupro import number_defects
from iumad_jax.metrics.auroc import as_pixels, as_scores
from iumad_jax.metrics.forgetting import final

_RESAMPLES = 1000
_THRESHOLDS = 1000
_LIMIT = 0.3  # largest false positive rate of AUPRO
_RATES = {  # false positive rates at which the overlap is averaged: the benchmark's, and nearly all
    "aupro": np.append(np.linspace(0, 1, 100)[np.linspace(0, 1, 100) < _LIMIT], _LIMIT),
    "aupro_exact": _LIMIT * np.linspace(0, 1, 300) ** 2,
}


class Spread(NamedTuple):
    """Spread of a metric over resamples; NaN where undefined."""

    standard_error: float
    interval: tuple[float, float]  # 95 % percentile interval


def resample(labels: ArrayLike, resamples: int = _RESAMPLES, seed: int = 0) -> NDArray:
    """Draw how often each image occurs in each resample.

    Args:
        labels: Labels, shape (n,), above 0 for anomalous images.
        resamples: Number of resamples r.
        seed: Seed of the draw.

    Returns:
        Counts, shape (r, n). Every resample has as many good and as many anomalous images as there are. With fewer
        than two images of either kind, whose spread is unknown, there is no resample: r = 0.
    """
    anomalous, rng = np.asarray(labels) > 0, np.random.default_rng(seed)
    kinds = [np.flatnonzero(~anomalous), np.flatnonzero(anomalous)]
    if min(map(len, kinds)) < 2:
        return np.empty((0, anomalous.size))
    counts = np.empty((resamples, anomalous.size))
    for images in kinds:
        counts[:, images] = rng.multinomial(images.size, np.full(images.size, 1 / images.size), resamples)
    return counts


def image_replicates(labels: ArrayLike, scores: ArrayLike, counts: NDArray) -> NDArray:
    """Compute `image_auroc` of every resample, shape (r,); NaN if all images are good or all anomalous.

    Args:
        labels: Labels, shape (n,), above 0 for anomalous images.
        scores: Anomaly scores, shape (n,), finite.
        counts: Result of `resample`, shape (r, n).
    """
    anomalous, scores = np.asarray(labels) > 0, as_scores(scores)
    higher, lower = scores[anomalous, None], scores[~anomalous]
    wins = (higher > lower) + (higher == lower) / 2
    if not wins.size:
        return np.full(len(counts), math.nan)
    return (counts[:, anomalous] @ wins * counts[:, ~anomalous]).sum(axis=1) / wins.size


def pixel_replicates(
    masks: ArrayLike, maps: ArrayLike, counts: NDArray, regions: Mapping[str, ArrayLike] | None = None
) -> dict[str, NDArray]:
    """Compute `pixel_metrics` of every resample, to about 0.001.

    Tied scores are joined by a straight line, in `aupro` too. The error of `aupro` can reach 0.01 where few defects of
    few pixels make its curve jump.

    Args:
        masks: Defect masks, shape (n, h, w), above 0 on defects.
        maps: Anomaly maps, shape (n, h, w), finite.
        counts: Result of `resample`, shape (r, n).
        regions: Masks of the pixels that may be negatives, shape (n, h, w), by name.

    Returns:
        The values, shape (r,), of each of these metrics; NaN where a resample has no defect or no negative.

    Raises:
        ValueError: If the shapes differ, or a map holds NaN or infinity.
    """
    masks, maps, _ = as_pixels(masks, maps, None)
    numbers, _ = number_defects(masks)
    shares = np.zeros(masks.shape, np.float32)
    shares[masks] = 1 / np.bincount(numbers)[numbers]  # of the defect
    counts, resample_of = np.unique(counts, axis=0, return_inverse=True)  # few images have few different resamples
    replicates = {}
    for suffix, region in {"": None, **{f"_{name}": region for name, region in (regions or {}).items()}}.items():
        _, _, inside = as_pixels(masks, maps, region)
        negatives = ~masks if inside is None else inside & ~masks
        thresholds = _thresholds(maps[negatives])
        higher, lower = _above(maps, masks, thresholds), _above(maps, negatives, thresholds)
        rate = _curve(counts, lower)
        overlap = _curve(counts, _above(maps, masks, thresholds, shares))
        replicates[f"p_auroc{suffix}"] = _area(counts, higher, lower)
        for name, rates in _RATES.items():
            if region is None or name == "aupro":
                replicates[f"{name}{suffix}"] = _mean_overlap(rate, overlap, rates)
    return {metric: values[resample_of] for metric, values in replicates.items()}


def spread(replicates: NDArray) -> Spread:
    """Compute the spread of a metric's values in the resamples (r,), without undefined ones.

    It is 0 if all images are ranked perfectly, although further images might not be.
    """
    defined = replicates[~np.isnan(replicates)]
    if defined.size < 2:
        return Spread(math.nan, (math.nan, math.nan))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Spread(float(defined.std(ddof=1)), (float(low), float(high)))


def interval_of_mean(values: ArrayLike, standard_errors: ArrayLike) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over objects (k,), whose test images are independent.

    It is the mean ± 1.96 standard errors sqrt(sum of squares) / k, within 0 and 1. Objects with an undefined value are
    left out; it is NaN if there are no others, or if one of them has an undefined standard error.
    """
    values, errors = np.asarray(values, float), np.asarray(standard_errors, float)
    errors = errors[~np.isnan(values)]
    margin = 1.96 * np.linalg.norm(errors) / max(errors.size, 1)
    low, high = np.clip(final(values[None]) + np.array([-margin, margin]), 0, 1)
    return float(low), float(high)


def _thresholds(negatives: NDArray) -> NDArray:
    """Choose ascending thresholds (t,) from minus infinity to infinity, closest at low false positive rates."""
    chosen = np.sort(negatives)[::-1]
    if chosen.size:
        chosen = chosen[(np.linspace(0, 1, _THRESHOLDS) ** 2 * (chosen.size - 1)).astype(int)]
    return np.unique(np.concatenate([np.array([-np.inf, np.inf], chosen.dtype), chosen]))


def _above(maps: NDArray, pixels: NDArray, thresholds: NDArray, weights: NDArray | None = None) -> NDArray:
    """Count the pixels of each image above each threshold, or add up their weights, from the highest: (n, t)."""
    above = np.empty((len(maps), thresholds.size))
    for image, inside in enumerate(pixels):
        number_below = thresholds.searchsorted(maps[image][inside])
        weight = None if weights is None else weights[image][inside]
        above[image] = np.bincount(number_below, weight, minlength=thresholds.size + 1)[:0:-1].cumsum()
    return above


def _area(counts: NDArray, higher: NDArray, lower: NDArray) -> NDArray:
    """Return the area under the curve of defects against negatives, in every resample (r,); NaN without either.

    It is the sum of the areas of all pairs of an image's defects and another one's negatives.
    """
    pairs = (higher[:, 1:] + higher[:, :-1]) / 2 @ np.diff(lower, axis=1).T
    with np.errstate(invalid="ignore"):
        return (counts @ pairs * counts).sum(axis=1) / ((counts @ higher[:, -1]) * (counts @ lower[:, -1]))


def _curve(counts: NDArray, above: NDArray) -> NDArray:
    """Return which fraction of a resample's pixels lies above each threshold (r, t); NaN if it has none."""
    curve = counts @ above
    with np.errstate(invalid="ignore"):
        curve /= curve[:, -1:].copy()
    return curve


def _mean_overlap(rate: NDArray, overlap: NDArray, rates: NDArray) -> NDArray:
    """Average the overlap over false positive rates from 0 to the last one, in every resample (r,)."""
    at_rates = np.empty((len(rate), rates.size))
    for resample, curve in enumerate(zip(rate, overlap, strict=True)):
        at_rates[resample] = np.interp(rates, *curve)
    return np.where(np.isnan(rate[:, -1]), np.nan, np.trapezoid(at_rates, rates) / _LIMIT)
