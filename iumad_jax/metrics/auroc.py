"""Area under the ROC curve, of images and of pixels."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def image_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """How well scores rank anomalous images above good ones; ties count half, as in sklearn's roc_auc_score.

    Args:
        labels: (n,), above 0 where the image is anomalous.
        scores: (n,), finite.

    Returns:
        The area, 0 to 1; NaN when all images are of one kind.

    Raises:
        ValueError: the shapes differ, or a score is NaN or infinite.
    """
    anomalous, scores = np.asarray(labels) > 0, as_scores(scores)
    if scores.ndim != 1 or anomalous.shape != scores.shape:
        raise ValueError(f"labels and scores must both be (n,), found {anomalous.shape} and {scores.shape}")
    return sorted_auroc(np.sort(scores[anomalous]), np.sort(scores[~anomalous]))


def pixel_auroc(masks: ArrayLike, maps: ArrayLike, region: ArrayLike | None = None) -> float:
    """The same over all pixels of all images together.

    Args:
        masks: (n, h, w), above 0 where a pixel is defective.
        maps: (n, h, w) anomaly maps, finite.
        region: (n, h, w), above 0 where a pixel may count as a negative; defective pixels count wherever they lie.

    Returns:
        The area, 0 to 1; NaN when there is no defective pixel or no negative.

    Raises:
        ValueError: the shapes differ, or a map holds NaN or infinity.
    """
    masks, maps, region = as_pixels(masks, maps, region)
    return sorted_auroc(np.sort(maps[masks]), sorted_negatives(masks, maps, region))


def sorted_auroc(positives: NDArray, negatives: NDArray) -> float:
    """The chance that a positive exceeds a negative plus half the chance that they tie; both ascending."""
    if not positives.size or not negatives.size:
        return math.nan
    below, not_above = (int(negatives.searchsorted(positives, side).sum()) for side in ("left", "right"))
    return (below + not_above) / (2 * positives.size * negatives.size)


def sorted_negatives(masks: NDArray, maps: NDArray, region: NDArray | None) -> NDArray:
    """Ascending scores of the pixels outside the masks (and inside the region): where nearly all the time goes."""
    return np.sort(maps[~masks if region is None else region & ~masks])


def as_scores(scores: ArrayLike) -> NDArray:
    """Scores in the precision given, at least float32."""
    array = np.asarray(scores)
    array = array.astype(np.result_type(array, np.float32), copy=False)
    if not np.isfinite(array).all():
        raise ValueError("scores must be finite, found NaN or infinity")
    return array


def as_pixels(masks: ArrayLike, maps: ArrayLike, region: ArrayLike | None) -> tuple[NDArray, NDArray, NDArray | None]:
    """Masks and region as bool and maps as float, all of one shape (n, h, w)."""
    defective, scores = np.asarray(masks) > 0, as_scores(maps)
    negative = None if region is None else np.asarray(region) > 0
    shapes = {array.shape for array in (defective, scores, negative) if array is not None}
    if scores.ndim != 3 or len(shapes) > 1:
        raise ValueError(f"masks, maps and region must have one shape (n, h, w), found {sorted(shapes)}")
    return defective, scores, negative
