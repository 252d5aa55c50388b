"""Area under the per-region overlap curve (AUPRO).

The definition is that of the MVTec 3D-AD benchmark (Bergmann et al., VISAPP 2022): how much of each defect is found,
whatever its size, against the share of normal pixels raised as false alarms.
"""

import math
from collections.abc import Mapping

import numpy as np
import scipy.ndimage
from numpy.typing import ArrayLike, NDArray

from iumad_jax.metrics.auroc import as_pixels, sorted_auroc, sorted_negatives

# Defects are connected through corners (8 neighbours) within an image, never across images.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


def aupro(
    masks: ArrayLike, maps: ArrayLike, limit: float = 0.3, thresholds: int = 100, region: ArrayLike | None = None
) -> float:
    """Mean overlap with the defects over false positive rates up to the limit, by the benchmark's thresholds.

    The M negatives are the pixels outside all defects, in ascending order. At each of the positions
    int(linspace(0, M - 1, thresholds)) the false positive rate is 1 - (position + 1) / M, and the overlap is the mean
    over defects of the fraction of their pixels strictly above the negative there. The curve ends in (1, 1).

    Args:
        masks: (n, h, w), above 0 where a pixel is defective; a defect is an 8-connected component.
        maps: (n, h, w) anomaly maps, finite.
        limit: largest false positive rate, in (0, 1].
        thresholds: how many, at least 2.
        region: (n, h, w), above 0 where a pixel may count as a negative; defects count wherever they lie.

    Returns:
        The area over the limit, 0 to 1; NaN when there is no defect or no negative.

    Raises:
        ValueError: the shapes differ, a map holds NaN or infinity, or limit or thresholds is out of range.
    """
    if thresholds < 2:
        raise ValueError(f"thresholds must be at least 2, found {thresholds}")
    masks, maps, region = as_pixels(masks, maps, region)
    return _aupro(*_defects(masks, maps), sorted_negatives(masks, maps, region), _checked(limit), thresholds)


def aupro_exact(masks: ArrayLike, maps: ArrayLike, limit: float = 0.3, region: ArrayLike | None = None) -> float:
    """The same with every score as a threshold, so that nothing depends on where thresholds fall.

    Scores that tie are joined by a straight line, as in sklearn's roc_curve; with limit 1 and defects of equal size
    it equals `pixel_auroc`. Arguments, result and errors are those of `aupro`.
    """
    masks, maps, region = as_pixels(masks, maps, region)
    return _aupro_exact(*_defects(masks, maps), sorted_negatives(masks, maps, region), _checked(limit))


def pixel_metrics(
    masks: ArrayLike, maps: ArrayLike, regions: Mapping[str, ArrayLike] | None = None, limit: float = 0.3
) -> dict[str, float]:
    """All pixel metrics of one object's test images, sorting the pixels once for each region.

    Args and errors are those of `aupro`; regions have names.

    Returns:
        `p_auroc`, `aupro` and `aupro_exact` with all negatives, and `p_auroc_NAME` and `aupro_NAME` with the
        negatives in that region only.
    """
    limit = _checked(limit)
    masks, maps, _ = as_pixels(masks, maps, None)
    positives, weights = _defects(masks, maps)
    everywhere = sorted_negatives(masks, maps, None)
    metrics = {
        "p_auroc": sorted_auroc(positives, everywhere),
        "aupro": _aupro(positives, weights, everywhere, limit),
        "aupro_exact": _aupro_exact(positives, weights, everywhere, limit),
    }
    for name, region in (regions or {}).items():
        inside = sorted_negatives(*as_pixels(masks, maps, region))
        metrics[f"p_auroc_{name}"] = sorted_auroc(positives, inside)
        metrics[f"aupro_{name}"] = _aupro(positives, weights, inside, limit)
    return metrics


def pro_curve(masks: ArrayLike, maps: ArrayLike, rates: ArrayLike) -> tuple[NDArray, NDArray]:
    """The curve whose area is `aupro_exact`, at given false positive rates.

    Args:
        masks: (n, h, w), above 0 where a pixel is defective.
        maps: (n, h, w) anomaly maps, finite.
        rates: (r,), each in [0, 1].

    Returns:
        The overlap with the defects (r,), and the scores above which it was found (r,): the lowest that no larger share
        of the normal pixels exceeds. NaN without a normal pixel; the overlap also without a defect.

    Raises:
        ValueError: the shapes differ, or a map holds NaN or infinity.
    """
    masks, maps, _ = as_pixels(masks, maps, None)
    positives, weights = _defects(masks, maps)
    negatives = sorted_negatives(masks, maps, None)
    undefined = np.full(np.shape(rates), np.nan)
    if not negatives.size:
        return undefined, undefined
    above = (np.asarray(rates) * negatives.size * (1 + 1e-12)).astype(int)  # so that 0.3 of 10 are 3, not 2.9999
    thresholds = negatives[np.maximum(negatives.size - 1 - above, 0)]
    if not positives.size:
        return undefined, thresholds
    found = np.append(weights[::-1].cumsum()[::-1], 0.0)
    return found[positives.searchsorted(thresholds, "right")], thresholds


def _defects(masks: NDArray, maps: NDArray) -> tuple[NDArray, NDArray]:
    """Ascending scores of the defective pixels, and the share of each in the overlap: sum 1, equal for every defect."""
    defective = masks.any(axis=(1, 2))
    masks, maps = masks[defective], maps[defective]
    labels, count = scipy.ndimage.label(masks, _NEIGHBOURS)
    labels = labels[masks]
    weights = 1 / (np.bincount(labels, minlength=count + 1)[labels] * max(count, 1))
    order = np.argsort(maps[masks])
    return maps[masks][order], weights[order]


def _aupro(positives: NDArray, weights: NDArray, negatives: NDArray, limit: float, thresholds: int = 100) -> float:
    if not positives.size or not negatives.size:
        return math.nan
    positions = np.linspace(0, negatives.size - 1, thresholds).astype(int)[::-1]
    rate = np.append(1 - (positions + 1) / negatives.size, 1.0)
    found = np.append(weights[::-1].cumsum()[::-1], 0.0)  # of the overlap, from each positive upwards
    overlap = np.append(found[positives.searchsorted(negatives[positions], "right")], 1.0)
    inside = rate <= limit
    x, y = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float(np.trapezoid(y, x) / limit)


def _aupro_exact(positives: NDArray, weights: NDArray, negatives: NDArray, limit: float) -> float:
    """Every pixel adds its own area: found at no rate up to `start`, then linearly (ties), and fully from `end` on."""
    if not positives.size or not negatives.size:
        return math.nan
    not_above, below = (negatives.searchsorted(positives, side) for side in ("right", "left"))
    start, end = 1 - not_above / negatives.size, 1 - below / negatives.size
    # A tie is a ramp of area (x - start)^2 / (2 (end - start)) up to x; beyond its end, x - (start + end) / 2.
    ramp = np.clip(limit - start, 0, None) ** 2 / np.where(end > start, 2 * (end - start), 1)
    area = np.where(limit >= end, limit - (start + end) / 2, ramp)
    return float(weights @ area / limit)


def _checked(limit: float) -> float:
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be in (0, 1], found {limit}")
    return limit
