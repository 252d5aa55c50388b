"""Area under the per-region overlap curve (AUPRO).

The definition is that of the MVTec 3D-AD benchmark (Bergmann et al., VISAPP 2022): the mean overlap with the defects,
each weighted equally whatever its size, against the fraction of pixels outside all defects that are false alarms.
"""

import math
from collections.abc import Mapping

import numpy as np
import scipy.ndimage
from numpy.typing import ArrayLike, NDArray

from iumad_jax.metrics.auroc import as_pixels, sorted_auroc, sorted_negatives

# Defects are 8-connected within an image and never extend across images.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])


def aupro(
    masks: ArrayLike, maps: ArrayLike, limit: float = 0.3, thresholds: int = 100, region: ArrayLike | None = None
) -> float:
    """Compute the mean overlap with the defects over false positive rates up to a limit, at the benchmark's thresholds.

    The M negatives are the pixels outside all defects, in ascending order. At each of the positions
    int(linspace(0, M - 1, thresholds)) the false positive rate is 1 - (position + 1) / M, and the overlap is the mean
    over defects of the fraction of their pixels strictly above the negative there. The curve ends in (1, 1).

    Args:
        masks: Defect masks, shape (n, h, w), above 0 on defects; a defect is an 8-connected component.
        maps: Anomaly maps, shape (n, h, w), finite.
        limit: Largest false positive rate, in (0, 1].
        thresholds: Number of thresholds, at least 2.
        region: Mask of the pixels that may be negatives, shape (n, h, w), above 0 inside; by default all. Defects count
            wherever they lie.

    Returns:
        The area divided by the limit, 0 to 1; NaN if there is no defect or no negative.

    Raises:
        ValueError: If the shapes differ, a map holds NaN or infinity, or limit or thresholds is out of range.
    """
    if thresholds < 2:
        raise ValueError(f"thresholds must be at least 2, got {thresholds}")
    masks, maps, region = as_pixels(masks, maps, region)
    return _aupro(*_defects(masks, maps), sorted_negatives(masks, maps, region), _validated_limit(limit), thresholds)


def aupro_exact(masks: ArrayLike, maps: ArrayLike, limit: float = 0.3, region: ArrayLike | None = None) -> float:
    """Compute AUPRO with every score as a threshold, so that the result does not depend on a choice of thresholds.

    Tied scores are joined by a straight line, as in sklearn's roc_curve. With limit 1 and defects of equal size, the
    result equals `pixel_auroc`. Arguments, result and errors are as in `aupro`.
    """
    masks, maps, region = as_pixels(masks, maps, region)
    return _aupro_exact(*_defects(masks, maps), sorted_negatives(masks, maps, region), _validated_limit(limit))


def pixel_metrics(
    masks: ArrayLike, maps: ArrayLike, regions: Mapping[str, ArrayLike] | None = None, limit: float = 0.3
) -> dict[str, float]:
    """Compute all pixel metrics of an object's test images, sorting the pixels only once per region.

    Arguments and errors are as in `aupro`; `regions` maps names to regions.

    Returns:
        `p_auroc`, `aupro` and `aupro_exact` with all negatives, and for every region `p_auroc_NAME` and `aupro_NAME`
        with the negatives inside it only.
    """
    return pixel_metrics_of_groups(masks, maps, {"all": np.arange(len(np.asarray(masks)))}, regions, limit)["all"]


def pixel_metrics_of_groups(
    masks: ArrayLike,
    maps: ArrayLike,
    groups: Mapping[str, NDArray],
    regions: Mapping[str, ArrayLike] | None = None,
    limit: float = 0.3,
) -> dict[str, dict[str, float]]:
    """Compute `pixel_metrics` for the defects in groups of images, each against the negatives of all images.

    The metrics of groups that share no defect thus average to those of all: AUPRO weighted by their numbers of defects,
    P-AUROC by their numbers of defective pixels.

    Args:
        masks: As in `aupro`.
        maps: As in `aupro`.
        groups: Row numbers by name of the group.
        regions: As in `pixel_metrics`.
        limit: As in `aupro`.
    """
    limit = _validated_limit(limit)
    masks, maps, _ = as_pixels(masks, maps, None)
    defects = {group: _defects(masks[rows], maps[rows]) for group, rows in groups.items()}
    negatives = sorted_negatives(masks, maps, None)
    metrics = {
        group: {
            "p_auroc": sorted_auroc(positives, negatives),
            "aupro": _aupro(positives, weights, negatives, limit),
            "aupro_exact": _aupro_exact(positives, weights, negatives, limit),
        }
        for group, (positives, weights) in defects.items()
    }
    for name, region in (regions or {}).items():
        inside = sorted_negatives(*as_pixels(masks, maps, region))
        for group, (positives, weights) in defects.items():
            metrics[group][f"p_auroc_{name}"] = sorted_auroc(positives, inside)
            metrics[group][f"aupro_{name}"] = _aupro(positives, weights, inside, limit)
    return metrics


def pro_curve(masks: ArrayLike, maps: ArrayLike, rates: ArrayLike) -> tuple[NDArray, NDArray]:
    """Compute the overlap curve, whose area is `aupro_exact`, at the given false positive rates.

    Args:
        masks: Defect masks, shape (n, h, w), above 0 on defects.
        maps: Anomaly maps, shape (n, h, w), finite.
        rates: False positive rates, shape (r,), each in [0, 1].

    Returns:
        The overlap with the defects, and the thresholds, shape (r,) each. Each threshold is the lowest score of a
        negative that at most the given fraction of the negatives exceeds. Both are NaN without negatives; the overlap
        is NaN without defects.

    Raises:
        ValueError: If the shapes differ, or a map holds NaN or infinity.
    """
    masks, maps, _ = as_pixels(masks, maps, None)
    positives, weights = _defects(masks, maps)
    negatives = sorted_negatives(masks, maps, None)
    undefined = np.full(np.shape(rates), np.nan)
    if not negatives.size:
        return undefined, undefined
    allowed = (np.asarray(rates) * negatives.size * (1 + 1e-12)).astype(int)  # 0.3 of 10 must be 3, not 2.9999
    thresholds = negatives[np.maximum(negatives.size - 1 - allowed, 0)]
    if not positives.size:
        return undefined, thresholds
    overlap = np.append(weights[::-1].cumsum()[::-1], 0.0)
    return overlap[positives.searchsorted(thresholds, "right")], thresholds


def number_defects(masks: NDArray) -> tuple[NDArray, int]:
    """Return the number, from 1, of the defect that each defective pixel belongs to, and the number of defects."""
    masks = masks[masks.any(axis=(1, 2))]
    labels, count = scipy.ndimage.label(masks, _NEIGHBOURS)
    return labels[masks], count


def _defects(masks: NDArray, maps: NDArray) -> tuple[NDArray, NDArray]:
    """Return the defective pixels' ascending scores and weights, which sum to 1 with an equal sum per defect."""
    labels, count = number_defects(masks)
    weights = 1 / (np.bincount(labels, minlength=count + 1)[labels] * max(count, 1))
    scores = maps[masks]
    order = np.argsort(scores)
    return scores[order], weights[order]


def _aupro(positives: NDArray, weights: NDArray, negatives: NDArray, limit: float, thresholds: int = 100) -> float:
    """Compute `aupro` from ascending scores."""
    if not positives.size or not negatives.size:
        return math.nan
    positions = np.linspace(0, negatives.size - 1, thresholds).astype(int)[::-1]
    rate = np.append(1 - (positions + 1) / negatives.size, 1.0)
    weight_from = np.append(weights[::-1].cumsum()[::-1], 0.0)  # total weight of each positive and those above it
    overlap = np.append(weight_from[positives.searchsorted(negatives[positions], "right")], 1.0)
    inside = rate <= limit
    x, y = np.append(rate[inside], limit), np.append(overlap[inside], np.interp(limit, rate, overlap))
    return float(np.trapezoid(y, x) / limit)


def _aupro_exact(positives: NDArray, weights: NDArray, negatives: NDArray, limit: float) -> float:
    """Add up the area of every defective pixel.

    Its detection is 0 up to the false positive rate `start`, rises linearly over ties, and is 1 from `end` on.
    """
    if not positives.size or not negatives.size:
        return math.nan
    not_above, below = (negatives.searchsorted(positives, side) for side in ("right", "left"))
    start, end = 1 - not_above / negatives.size, 1 - below / negatives.size
    # Over a tie, the area up to rate x is (x - start)^2 / (2 (end - start)); beyond it, x - (start + end) / 2.
    ramp = np.clip(limit - start, 0, None) ** 2 / np.where(end > start, 2 * (end - start), 1)
    area = np.where(limit >= end, limit - (start + end) / 2, ramp)
    return float(weights @ area / limit)


def _validated_limit(limit: float) -> float:
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be in (0, 1], got {limit}")
    return limit
