"""Conformal thresholds from good calibration images.

The threshold is the k-th smallest of n calibration scores, k = ceil(quantile (n + 1)). The probability that a further
good image exceeds it is at most 1 - k / (n + 1), averaged over calibration sets and for any distribution (split
conformal prediction; Vovk et al., 2005). With fewer than quantile / (1 - quantile) images (199 for 0.995), k would be
larger than n: the threshold is then the maximum, which guarantees only 1 / (n + 1).

Images and pixels are compared with a threshold that is larger by a share of 1e-4. Otherwise, float32 rounding (another
batch or device) could make an anomalous image of the calibration image that set it.

An image of t tiles exceeds a threshold if one of them does. Its thresholds are therefore those that a tile exceeds with
a probability of at most (1 - quantile) / t, so that the image does so with at most 1 - quantile, however its tiles
depend on each other (Bonferroni).

Users may choose another quantile, or thresholds of their own, for a trained model.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from iumad_jax.errors import UserError
from iumad_jax.inference.recognition import RETIRED
from iumad_jax.shapes import Calibration

_RESAMPLES, _COVERAGE, _SEED = 1000, 0.95, 0
_ROUNDING = 1e-4

Record = dict[str, Any]  # JSON
Chosen = Mapping[str, float]  # thresholds of anomaly scores that a user chose, by object
NONE: Chosen = MappingProxyType({})


class Thresholds(NamedTuple):
    """Thresholds of the k learned objects, in the order of learning.

    Attributes:
        image: Threshold of anomaly scores: an image with a higher score is anomalous.
        pixel: Threshold of anomaly maps: a pixel with a higher value is anomalous.
        unknown: Threshold of the distance to the object: an image farther away shows an unknown object.
        rms_distance: Root mean square distance of calibration images to their object, see
            `recognition.probabilities`.
    """

    image: Float[Array, " k"]
    pixel: Float[Array, " k"]
    unknown: Float[Array, " k"]
    rms_distance: Float[Array, ""]


def make_calibration(
    score: Float[np.ndarray, " n"],
    peak: Float[np.ndarray, " n"],
    distance: Float[np.ndarray, "i k"],
    number: int,
    **flags: Any,
) -> Calibration:
    """Build an object's calibration.

    Args:
        score: Image scores of its good images.
        peak: Largest values of their anomaly maps.
        distance: Distance of each image to each learned object.
        number: Number of the object.
        flags: Values for `from_training_images`, `few` and `tiles` of `Calibration`.
    """
    return Calibration(score, peak, nearest_distances(distance, number), **flags)


def nearest_distances(distance: Float[np.ndarray, "i k"], number: int) -> Float[np.ndarray, "i 3"]:
    """Select each image's distances to its own object, to the nearest and to the second nearest one.

    Retired objects are infinitely far, and so is the second nearest one if only one is in use.
    """
    in_use = np.where(distance < RETIRED / 2, distance, np.inf)  # distances to retired objects are rounded
    nearest = np.sort(np.pad(in_use, ((0, 0), (0, 1)), constant_values=np.inf), axis=1)[:, :2]
    return np.concatenate([distance[:, number, None], nearest], axis=1)


def choose(
    threshold: float | Mapping[str, float] | None, quantile: float | None, objects: Collection[str]
) -> dict[str, float]:
    """Check what a user chose and return the chosen thresholds of anomaly scores, by object.

    Args:
        threshold: One threshold for all objects, or thresholds by name; None to choose none.
        quantile: Share of good images that should be decided good; None for that of the run.
        objects: Names of the learned objects.

    Raises:
        UserError: If an object was not learned or a number is out of range.
    """
    if quantile is not None and not (isinstance(quantile, Real) and 0.5 <= quantile <= 1):  # includes NaN
        raise UserError(f"the quantile is {quantile}; use a number from 0.5 to 1.")
    chosen: dict[str, float]
    if isinstance(threshold, Mapping):
        chosen = dict(threshold)
    else:
        chosen = {} if threshold is None else dict.fromkeys(objects, threshold)
    for name, value in chosen.items():
        if name not in objects:
            raise UserError(f'"{name}" is not an object of this model; choose one of {", ".join(objects)}.')
        if not (isinstance(value, Real) and 0 < value < math.inf):
            raise UserError(f"the threshold of {name} is {value}; use a number above 0.")
    return chosen


def parse(values: Sequence[str] | None) -> float | dict[str, float] | None:
    """Parse the values of --threshold: one number, or pairs OBJECT=NUMBER; None without the flag.

    Raises:
        UserError: If they are neither.
    """
    if values is None:
        return None
    pairs = [value.rpartition("=")[::2] for value in values]
    names = [name for name, _ in pairs]
    try:
        numbers = {name: float(number) for name, number in pairs}
        if len(numbers) < len(pairs) or ("" in numbers and len(pairs) > 1):
            raise ValueError("an object is missing or named twice")
    except ValueError as error:
        raise UserError(
            f"--threshold is {','.join(values)}; use a number, or OBJECT=NUMBER for some objects, separated by commas."
        ) from error
    return numbers[""] if names == [""] else numbers


def thresholds(calibrations: Mapping[str, Calibration], quantile: float, chosen: Chosen = NONE) -> Thresholds:
    """Compute the thresholds of all objects.

    The pixel threshold is a quantile of each image's largest pixel, not of all pixels. Neighbouring pixels are not
    independent but images are, so a good image has an anomalous pixel as rarely as it is a false alarm. With a
    quantile of all pixels, every good image would have anomalous pixels.

    Args:
        calibrations: Calibration by object, in the order of learning.
        quantile: Share of good images that should be decided good.
        chosen: Result of `choose`.
    """
    objects = calibrations.values()
    shared = _UnknownThreshold.fit(_with_enough_images(calibrations), quantile)
    unknown = [_UnknownThreshold.fit([calibration], quantile) if calibration.few else shared for calibration in objects]
    limits = [_limits(calibration, quantile, chosen.get(name)) for name, calibration in calibrations.items()]
    return Thresholds(
        jnp.array([image for image, _ in limits], jnp.float32),
        jnp.array([pixel for _, pixel in limits], jnp.float32),
        jnp.array([limit.threshold for limit in unknown], jnp.float32),
        jnp.float32(_rms_distance(calibrations)),
    )


def describe(calibrations: Mapping[str, Calibration], quantile: float, chosen: Chosen = NONE) -> Record:
    """Describe the thresholds of all objects and their guarantees, for the ledger and the report.

    Args:
        calibrations: Calibration by object, in the order of learning.
        quantile: Share of good images that should be decided good.
        chosen: Result of `choose`.

    Returns:
        `quantile`; `rms_distance`, the root mean square distance of an image to its object; `unknown`, the distance
        `threshold` shared by all objects, computed from `good` (the threshold of good images) and `others` (the
        distance to other objects); `objects`, by name the `image` and `pixel` thresholds (see `describe_threshold`,
        with the margin for rounding) and, if the object has few images, an `unknown` threshold of its own.
        `false_alarm_bound` is None for thresholds from training images, which guarantee nothing, and for thresholds
        that a user chose, which are marked `chosen`.
    """
    single = sum(not calibration.retired for calibration in calibrations.values()) == 1

    def describe_object(name: str, calibration: Calibration) -> Record:
        no_bound = {"false_alarm_bound": None} if calibration.from_training_images else {}
        record = {
            "image": describe_threshold(calibration.score, quantile, calibration.tiles) | no_bound,
            "pixel": describe_threshold(calibration.peak, quantile, calibration.tiles) | no_bound,
        }
        for kind, value in zip(record, _limits(calibration, quantile, chosen.get(name)), strict=True):
            scale = value / record[kind]["threshold"] if record[kind]["threshold"] else 1.0
            record[kind] |= {"threshold": value, "interval": [scale * end for end in record[kind]["interval"]]}
            if name in chosen:
                record[kind] |= {"interval": [value, value], "false_alarm_bound": None, "chosen": True}
        if calibration.few:
            record["unknown"] = _UnknownThreshold.fit([calibration], quantile).describe(quantile, single)
        return record

    return {
        "quantile": quantile,
        "rms_distance": _rms_distance(calibrations),
        "unknown": _UnknownThreshold.fit(_with_enough_images(calibrations), quantile).describe(quantile, single),
        "objects": {name: describe_object(name, calibration) for name, calibration in calibrations.items()},
    }


def describe_threshold(scores: ArrayLike, quantile: float, tiles: int = 1) -> Record:
    """Describe the conformal threshold of the scores (n,) of good images, or of their tiles.

    Returns:
        `threshold`; `interval`, its bootstrapped 95 % interval (percentiles, fixed seed), whose upper end is too low
        if the threshold is the maximum, since no resample exceeds that; `images`, the number of images;
        `false_alarm_bound`, the largest expected share of further good images above the threshold.
    """
    value, rank = _conformal(scores, _of_tile(quantile, tiles))
    values = np.sort(np.asarray(scores, np.float64))
    n = len(values)
    resamples = np.random.default_rng(_SEED).choice(values, (_RESAMPLES, n))
    ends = [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2]
    interval = np.quantile(np.partition(resamples, rank - 1, axis=1)[:, rank - 1], ends)
    bound = min(tiles * (1 - rank / (n + 1)), 1.0)
    return {"threshold": value, "interval": interval.tolist(), "images": n // tiles, "false_alarm_bound": bound}


def _of_tile(quantile: float, tiles: int) -> float:
    """Return the share of good tiles below a threshold that this share of images, of several tiles, is below."""
    return 1 - (1 - quantile) / tiles if tiles > 1 else quantile


def _limits(calibration: Calibration, quantile: float, chosen: float | None) -> tuple[float, float]:
    """Compute an object's thresholds of scores and of maps; a chosen one of scores scales both by the same factor."""
    share = _of_tile(quantile, calibration.tiles)
    image, pixel = (_conformal(values, share)[0] for values in (calibration.score, calibration.peak))
    if chosen is None:
        image, pixel = (float(np.float32(value * (1 + _ROUNDING))) for value in (image, pixel))  # as they are compared
        return image, pixel
    return chosen, pixel * chosen / image if image > 0 else chosen


def _conformal(scores: ArrayLike, quantile: float) -> tuple[float, int]:
    """Compute the conformal threshold of the scores (n,) and its rank among them, from 1."""
    values = np.sort(np.asarray(scores, np.float64))
    rank = min(math.ceil(quantile * (len(values) + 1) - 1e-9), len(values))  # 1e-9 absorbs rounding errors
    return float(values[rank - 1]), rank


class _UnknownThreshold(NamedTuple):
    """Distance to the nearest object beyond which an image shows an unknown object, and its derivation."""

    threshold: float
    distance: Float[np.ndarray, " n"]  # distance of each good image to the nearest object
    good: float  # distance to the nearest object that few good images exceed
    others: float  # distance to the second nearest object that few good images fall below; if infinite, 4 * `good`

    @classmethod
    def fit(cls, calibrations: Iterable[Calibration], quantile: float) -> "_UnknownThreshold":
        """Fit the threshold to calibration images: the geometric mean of `good` and `others`, but at least `good`.

        It lies above `good` because anomalous images of a learned object are farther away than good ones and must not
        be mistaken for an unknown object.
        """
        distance = np.concatenate([calibration.distance for calibration in calibrations])
        good, others = _conformal(distance[:, 1], quantile)[0], -_conformal(-distance[:, 2], quantile)[0]
        others = others if math.isfinite(others) else 4 * good
        return cls(math.sqrt(good * max(others, good)), distance[:, 1], good, others)

    def describe(self, quantile: float, single: bool) -> Record:
        """Describe the threshold for the ledger; `others` is None if a single object is in use."""
        good = describe_threshold(self.distance, quantile)
        return {"threshold": self.threshold, "good": good, "others": None if single else self.others}


def _with_enough_images(calibrations: Mapping[str, Calibration]) -> list[Calibration]:
    """Select the objects with enough images to estimate the spread of further images; all objects if none has.

    Retired objects are left out.
    """
    in_use = [calibration for calibration in calibrations.values() if not calibration.retired]
    return [calibration for calibration in in_use if not calibration.few] or in_use


def _rms_distance(calibrations: Mapping[str, Calibration]) -> float:
    """Compute the root mean square distance of calibration images to their object."""
    distance = np.concatenate([calibration.distance[:, 0] for calibration in _with_enough_images(calibrations)])
    return max(float(np.sqrt(np.mean(distance**2))), 1e-6)  # positive even if all images are identical
