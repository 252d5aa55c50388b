"""Area under the ROC curve of images and of pixels."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Compute the AUROC of image scores; ties count half, as in sklearn's roc_auc_score.

    Args:
        labels: Labels, shape (n,), above 0 for anomalous images.
        scores: Anomaly scores, shape (n,), finite.

    Returns:
        The area, 0 to 1; NaN if all images are good or all are anomalous.

    Raises:
        ValueError: If the shapes differ, or a score is NaN or infinite.
    """
    anomalous, scores = np.asarray(labels) > 0, as_scores(scores)
    if scores.ndim != 1 or anomalous.shape != scores.shape:
        raise ValueError(f"labels and scores must both have shape (n,), got {anomalous.shape} and {scores.shape}")
    return sorted_auroc(np.sort(scores[anomalous]), np.sort(scores[~anomalous]))


def image_roc(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray, NDArray]:
    """Compute the ROC curve of image scores, with one point per distinct score, after (0, 0).

    Args:
        labels: Labels, shape (n,), above 0 for anomalous images; both kinds must occur.
        scores: Anomaly scores, shape (n,), finite.

    Returns:
        False and true positive rates, 0 to 1, ascending, each of shape (1 + number of distinct scores,).
    """
    scores = as_scores(scores)
    order = np.argsort(-scores)
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # positions of the last of equal scores
    found = np.append(0, np.cumsum(np.asarray(labels)[order] > 0)[last])
    alarms = np.append(0, last + 1) - found
    return alarms / alarms[-1], found / found[-1]


def pixel_auroc(masks: ArrayLike, maps: ArrayLike, region: ArrayLike | None = None) -> float:
    """Compute the AUROC over the pixels of all images together.

    Args:
        masks: Defect masks, shape (n, h, w), above 0 on defects.
        maps: Anomaly maps, shape (n, h, w), finite.
        region: Mask of the pixels that may be negatives, shape (n, h, w), above 0 inside; by default all. Defective
            pixels count wherever they lie.

    Returns:
        The area, 0 to 1; NaN if there is no defective pixel or no negative.

    Raises:
        ValueError: If the shapes differ, or a map holds NaN or infinity.
    """
    masks, maps, region = as_pixels(masks, maps, region)
    return sorted_auroc(np.sort(maps[masks]), sorted_negatives(masks, maps, region))


def sorted_auroc(positives: NDArray, negatives: NDArray) -> float:
    """Compute the AUROC of ascending scores: P(positive > negative) + P(positive = negative) / 2."""
    if not positives.size or not negatives.size:
        return math.nan
    below, not_above = (int(negatives.searchsorted(positives, side).sum()) for side in ("left", "right"))
    return (below + not_above) / (2 * positives.size * negatives.size)


def sorted_negatives(masks: NDArray, maps: NDArray, region: NDArray | None) -> NDArray:
    """Sort the scores of the pixels outside the masks and inside the region; this dominates the run time."""
    return np.sort(maps[~masks if region is None else region & ~masks])


def as_scores(scores: ArrayLike) -> NDArray:
    """Convert scores to a floating-point array of the same precision, at least float32."""
    array = np.asarray(scores)
    array = array.astype(np.result_type(array, np.float32), copy=False)
    if not np.isfinite(array).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    return array


def as_pixels(masks: ArrayLike, maps: ArrayLike, region: ArrayLike | None) -> tuple[NDArray, NDArray, NDArray | None]:
    """Convert masks and region to bool and maps to float, and check that all have one shape (n, h, w)."""
    defective, scores = np.asarray(masks) > 0, as_scores(maps)
    negative = None if region is None else np.asarray(region) > 0
    shapes = {array.shape for array in (defective, scores, negative) if array is not None}
    if scores.ndim != 3 or len(shapes) > 1:
        raise ValueError(f"masks, maps and region must have one shape (n, h, w), got {sorted(shapes)}")
    return defective, scores, negative
