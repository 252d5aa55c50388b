"""From scores to decisions: thresholds that good calibration images set, and how often they err on test images.

Of n calibration scores the k-th smallest, k = ceil(quantile (n + 1)), is exceeded by a further good image with a
probability of at most 1 - k / (n + 1), averaged over calibration sets, whatever the distribution (split conformal
prediction; Vovk et al., 2005). Fewer images than quantile / (1 - quantile), 199 for 0.995, cannot promise that much:
their maximum is taken, and what it promises, 1 / (n + 1), is told.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from iumad_jax.metrics import image_auroc
from iumad_jax.shapes import GroundTruth, Prediction

_RESAMPLES, _COVERAGE, _SEED = 1000, 0.95, 0

Threshold = dict[str, Any]  # JSON, see `threshold`
Decisions = dict[str, Any]  # JSON, see `calibrate`


class Good(NamedTuple):
    """What is known of an object's calibration images."""

    prediction: Prediction
    distance: Float[np.ndarray, "n k"]  # to all objects learned so far, of `recognition.distances`
    trained_on: bool = False  # for want of others: then scores are too low, and nothing is promised


def threshold(scores: ArrayLike, quantile: float) -> Threshold:
    """What few good images exceed, from the scores (n,) of some.

    Returns:
        `threshold`; its bootstrapped 95 % `interval` (percentiles, fixed seed), whose upper end is too low where the
        threshold is the maximum, as no resample holds more; how many `images` set it; `at_most`, the promise above.
    """
    values = np.sort(np.asarray(scores, np.float64))
    n = len(values)
    rank = min(math.ceil(quantile * (n + 1) - 1e-9), n)  # less what rounding adds
    resamples = np.random.default_rng(_SEED).choice(values, (_RESAMPLES, n))
    ends = [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2]
    interval = np.quantile(np.partition(resamples, rank - 1, axis=1)[:, rank - 1], ends)
    return {
        "threshold": float(values[rank - 1]),
        "interval": interval.tolist(),
        "images": n,
        "at_most": 1 - rank / (n + 1),
    }


def calibrate(good: dict[str, Good], quantile: float) -> Decisions:
    """All thresholds after a step.

    A pixel is defective above what the largest pixel of few good images exceeds: neighbouring pixels of a map are not
    independent, images are, and so a mask is as rarely there on a good image as an alarm is. Were the quantile one of
    all pixels, every good image would have some of them marked.

    Args:
        good: by object, in the order of learning.
        quantile: of good images that are to pass.

    Returns:
        `objects`: by name, `image` and `pixel` thresholds; `unknown`, see `_unknown`; `usual`, the root mean square of
        an image's distance to its own object.
    """
    own = np.concatenate([one.distance[:, column] for column, one in enumerate(good.values())])

    def of_method(scores: ArrayLike, trained_on: bool) -> Threshold:
        return threshold(scores, quantile) | ({"at_most": None} if trained_on else {})

    return {
        "quantile": quantile,
        "usual": float(np.sqrt(np.mean(own**2))),
        "unknown": _unknown(np.concatenate([one.distance for one in good.values()]), quantile),
        "objects": {
            name: {
                "image": of_method(one.prediction.score, one.trained_on),
                "pixel": of_method(one.prediction.map.max((1, 2)), one.trained_on),
            }
            for name, one in good.items()
        },
    }


def _unknown(distance: Float[np.ndarray, "n k"], quantile: float) -> dict[str, Any]:
    """From which distance to the nearest object an image shows none of them, by the good images of all.

    Images with defects are farther away than good ones, too, and are not to be taken for something unknown: the
    threshold is the geometric mean of what few good images exceed (`good`) and of the distance to the nearest other
    object that few fall below (`others`), and at least the former; with a single object, twice the former.
    """
    ordered = np.sort(distance, axis=1)
    good = threshold(ordered[:, 0], quantile)
    others = -threshold(-ordered[:, 1], quantile)["threshold"] if distance.shape[1] > 1 else 4 * good["threshold"]
    return {
        "threshold": math.sqrt(good["threshold"] * max(others, good["threshold"])),
        "good": good,
        "others": others if distance.shape[1] > 1 else None,
    }


def rates(
    decisions: Decisions,
    name: str,
    prediction: Prediction,
    truth: GroundTruth,
    distance: Float[np.ndarray, "n k"],
) -> dict[str, float]:
    """How often the decisions err on an object's test images, given that it is this object; NaN where undefined.

    Returns:
        `false_alarms`, the share of good images above the threshold; `misses`, of anomalous ones not above it;
        `recognised`, of all images, those nearest to this object; `taken_as_unknown`, those too far from all.
    """
    alarm = prediction.score > decisions["objects"][name]["image"]["threshold"]
    own = list(decisions["objects"]).index(name)
    return {
        "false_alarms": _share(alarm[~truth.anomalous]),
        "misses": _share(~alarm[truth.anomalous]),
        "recognised": _share(distance.argmin(1) == own),
        "taken_as_unknown": _share(distance.min(1) > decisions["unknown"]["threshold"]),
    }


def unknown_rates(
    decisions: Decisions,
    distances: dict[str, Float[np.ndarray, "n k"]],
    confidences: dict[str, Float[np.ndarray, " n"]],
) -> dict[str, Any]:
    """How well images of objects that were never learned are told from those of learned ones.

    Args:
        decisions: of `calibrate`.
        distances: by object, of its test images; those not in `decisions` were never learned.
        confidences: by object, the largest probability that the method's own object logits give; may be empty.

    Returns:
        `objects`: the share of images flagged as unknown by object never learned; `taken_as_unknown`: the same of all
        images of learned objects together; `auroc_distance` and `auroc_logits`: how well the distance, and the lack of
        confidence, rank the former above the latter. NaN where undefined.
    """
    learned = decisions["objects"]
    flagged = {name: d.min(1) > decisions["unknown"]["threshold"] for name, d in distances.items()}
    never = np.concatenate([np.full(len(d), name not in learned) for name, d in distances.items()])

    def auroc(scores: list[np.ndarray]) -> float:
        return image_auroc(never, np.concatenate(scores)) if scores else math.nan

    return {
        "objects": {name: _share(flags) for name, flags in flagged.items() if name not in learned},
        "taken_as_unknown": _share(np.concatenate(list(flagged.values()))[~never]),
        "auroc_distance": auroc([d.min(1) for d in distances.values()]),
        "auroc_logits": auroc([-confidence for confidence in confidences.values()]),
    }


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if chosen.size else math.nan
