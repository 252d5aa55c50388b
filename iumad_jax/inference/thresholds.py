"""Thresholds that good calibration images set.

Of n calibration scores the k-th smallest, k = ceil(quantile (n + 1)), is exceeded by a further good image with a
probability of at most 1 - k / (n + 1), averaged over calibration sets, whatever the distribution (split conformal
prediction; Vovk et al., 2005). Fewer images than quantile / (1 - quantile), 199 for 0.995, cannot promise that much:
their maximum is taken, and what it promises, 1 / (n + 1), is told.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from iumad_jax.shapes import Calibration, Prediction

_RESAMPLES, _COVERAGE, _SEED = 1000, 0.95, 0

Record = dict[str, Any]  # JSON


class Thresholds(NamedTuple):
    """What decides, after a step in which k objects are known."""

    image: Float[Array, " k"]  # of scores
    pixel: Float[Array, " k"]  # of maps
    unknown: Float[Array, " k"]  # of the distance to the object
    rms_distance: Float[Array, ""]  # of calibration images to their own object


def calibration_of(
    prediction: Prediction, distance: Float[np.ndarray, "n k"], number: int, **flags: bool
) -> Calibration:
    """The calibration of the object of that number, by predictions for its images and their distances.

    The second nearest object is infinitely far away where only one was learned.
    """
    nearest = np.sort(np.pad(distance, ((0, 0), (0, 1)), constant_values=np.inf), axis=1)[:, :2]
    return Calibration(
        np.asarray(prediction.score),
        np.asarray(prediction.map).max((1, 2)),
        np.concatenate([distance[:, number, None], nearest], axis=1),
        **flags,
    )


def thresholds(calibration: Mapping[str, Calibration], quantile: float) -> Thresholds:
    """The thresholds of all objects.

    A pixel is defective above what the largest pixel of few good images exceeds: neighbouring pixels of a map are not
    independent, images are, and so a mask is as rarely there on a good image as an alarm is. Were the quantile one of
    all pixels, every good image would have some of them marked.

    Args:
        calibration: by object, in the order of learning.
        quantile: of good images that are to pass.
    """
    common = _Unknown.of(_telling(calibration), quantile)
    unknown = [_Unknown.of([one], quantile) if one.few else common for one in calibration.values()]
    return Thresholds(
        jnp.array([_conformal(one.score, quantile)[0] for one in calibration.values()], jnp.float32),
        jnp.array([_conformal(one.peak, quantile)[0] for one in calibration.values()], jnp.float32),
        jnp.array([one.threshold for one in unknown], jnp.float32),
        jnp.float32(_rms_distance(calibration)),
    )


def describe(calibration: Mapping[str, Calibration], quantile: float) -> Record:
    """The thresholds of all objects and what they are worth, for the ledger and the report.

    Returns:
        `quantile`; `objects`: by name, `image` and `pixel` thresholds (see `describe_threshold`), which promise nothing
        (`false_alarm_bound` is None) where they come from training images; `unknown`, the `threshold` of the distance,
        what few `good` images exceed, and the distance to `others` that few fall below; an object of few
        images has its own;
        `rms_distance`, the root mean square of an image's distance to its own object.
    """
    single = len(calibration) == 1

    def described(one: Calibration) -> Record:
        promise = {"false_alarm_bound": None} if one.from_training_images else {}
        image, pixel = (describe_threshold(scores, quantile) | promise for scores in (one.score, one.peak))
        own = {"unknown": _Unknown.of([one], quantile).describe(quantile, single)} if one.few else {}
        return {"image": image, "pixel": pixel, **own}

    return {
        "quantile": quantile,
        "rms_distance": _rms_distance(calibration),
        "unknown": _Unknown.of(_telling(calibration), quantile).describe(quantile, single),
        "objects": {name: described(one) for name, one in calibration.items()},
    }


def describe_threshold(scores: ArrayLike, quantile: float) -> Record:
    """The conformal threshold of the scores (n,) of good images.

    Returns:
        `threshold`; its bootstrapped 95 % `interval` (percentiles, fixed seed), whose upper end is too low where the
        threshold is the maximum, as no resample holds more; how many `images` set it; `false_alarm_bound`, the largest
        expected         share of further good images above it.
    """
    value, rank = _conformal(scores, quantile)
    values = np.sort(np.asarray(scores, np.float64))
    n = len(values)
    resamples = np.random.default_rng(_SEED).choice(values, (_RESAMPLES, n))
    ends = [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2]
    interval = np.quantile(np.partition(resamples, rank - 1, axis=1)[:, rank - 1], ends)
    return {"threshold": value, "interval": interval.tolist(), "images": n, "false_alarm_bound": 1 - rank / (n + 1)}


def _conformal(scores: ArrayLike, quantile: float) -> tuple[float, int]:
    """The threshold of the scores (n,), and its rank among them from 1."""
    values = np.sort(np.asarray(scores, np.float64))
    rank = min(math.ceil(quantile * (len(values) + 1) - 1e-9), len(values))  # less what rounding adds
    return float(values[rank - 1]), rank


class _Unknown(NamedTuple):
    """From which distance to the nearest object an image shows none of them, and what that comes from."""

    threshold: float
    distance: Float[np.ndarray, " n"]  # of good images to the nearest object
    good: float  # what few of these exceed
    others: float  # the distance to the nearest other object that few fall below; 4 `good` where there is no other

    @classmethod
    def of(cls, telling: Iterable[Calibration], quantile: float) -> "_Unknown":
        """The threshold by the images of some objects.

        Images with defects are farther away than good ones, too, and are not to be taken for something unknown: the
        threshold is the geometric mean of `good` and `others`, and at least the former.
        """
        distance = np.concatenate([one.distance for one in telling])
        good, others = _conformal(distance[:, 1], quantile)[0], -_conformal(-distance[:, 2], quantile)[0]
        others = others if math.isfinite(others) else 4 * good
        return cls(math.sqrt(good * max(others, good)), distance[:, 1], good, others)

    def describe(self, quantile: float, single: bool) -> Record:
        """For the ledger; `others` is None where a single object was learned."""
        good = describe_threshold(self.distance, quantile)
        return {"threshold": self.threshold, "good": good, "others": None if single else self.others}


def _telling(calibration: Mapping[str, Calibration]) -> list[Calibration]:
    """Those objects whose images tell how far others are: all that have enough images, or all where none has."""
    return [one for one in calibration.values() if not one.few] or list(calibration.values())


def _rms_distance(calibration: Mapping[str, Calibration]) -> float:
    own = np.concatenate([one.distance[:, 0] for one in _telling(calibration)])
    return max(float(np.sqrt(np.mean(own**2))), 1e-6)  # of images that are all the same, too
