"""Decisions about images by thresholds, and the error rates of decisions on test images."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from iumad_jax.inference.recognition import probabilities
from iumad_jax.inference.thresholds import Record, Thresholds
from iumad_jax.metrics import image_auroc
from iumad_jax.shapes import GroundTruth, Prediction


class Decision(NamedTuple):
    """Decisions about a batch of images.

    Attributes:
        object_id: Number of the recognised or specified object, in the order of learning.
        probability: Probability that the image shows this object, assuming that it shows a learned one.
        distance: Distance of the image to this object, see `recognition.distances`.
        unknown: Whether `distance` exceeds `unknown_threshold`: the image probably shows no learned object.
        anomalous: Whether the anomaly score exceeds `image_threshold`.
        mask: Pixels whose anomaly map value exceeds `pixel_threshold`, in the shape of the maps.
        image_threshold: Threshold of the object for anomaly scores.
        pixel_threshold: Threshold of the object for anomaly map values.
        unknown_threshold: Threshold of the object for distances.
    """

    object_id: Int[Array, " b"]
    probability: Float[Array, " b"]
    distance: Float[Array, " b"]
    unknown: Bool[Array, " b"]
    anomalous: Bool[Array, " b"]
    mask: Bool[Array, "b *t m m"]
    image_threshold: Float[Array, " b"]
    pixel_threshold: Float[Array, " b"]
    unknown_threshold: Float[Array, " b"]


def decide(
    thresholds: Thresholds,
    prediction: Prediction,
    distance: Float[Array, "b k"],
    object_id: Int[Array, " b"],
    channels: int,
) -> Decision:
    """Decide about a batch by the thresholds of each image's object.

    Args:
        thresholds: Thresholds of all learned objects.
        prediction: Anomaly maps and scores of a method.
        distance: Distance of each image to each learned object, see `recognition.distances`.
        object_id: Number of each image's object, see `recognition.recognise`.
        channels: Number of feature channels of the recogniser.
    """
    is_object = object_id[:, None] == jnp.arange(distance.shape[-1])[None]

    def select(values: Float[Array, "#b k"]) -> Float[Array, " b"]:
        return jnp.where(is_object, values, 0).sum(-1)

    object_distance = select(distance)
    image, pixel, unknown = (
        select(limits[None]) for limits in (thresholds.image, thresholds.pixel, thresholds.unknown)
    )
    return Decision(
        object_id,
        select(probabilities(distance, channels, thresholds.rms_distance)),
        object_distance,
        object_distance > unknown,
        prediction.score > image,
        prediction.map > jnp.expand_dims(pixel, range(1, prediction.map.ndim)),
        image,
        pixel,
        unknown,
    )


def resembled(thresholds: Thresholds, distance: Float[Array, "b k"]) -> tuple[int, float]:
    """Return the number of the learned object that most images are taken for, and the share of images that are.

    Args:
        thresholds: Thresholds of all learned objects.
        distance: Distance of each image to each learned object, see `recognition.distances`.
    """
    nearest = np.argmin(distance, axis=-1)
    known = np.min(distance, axis=-1) <= np.asarray(thresholds.unknown)[nearest]
    counts = np.bincount(nearest[known], minlength=distance.shape[-1])
    return int(counts.argmax()), float(counts.max() / len(nearest))


def rates(decision: Decision, truth: GroundTruth, number: int) -> dict[str, float]:
    """Compute the rates at which decisions err on the test images of one object.

    Args:
        decision: Decisions about the test images.
        truth: Ground truth of the same images.
        number: Number of the object.

    Returns:
        `false_alarms`, the share of good images above the threshold; `misses`, the share of anomalous images not above
        it; `precision`, the share of images above it that are anomalous; `recall`, the share of anomalous images above
        it; `f1`, the harmonic mean of both; `recognised`, the share of images recognised as this object;
        `taken_as_unknown`, the share of images decided to be unknown. NaN where undefined.
    """
    alarm, anomalous = np.asarray(decision.anomalous), np.asarray(truth.anomalous)
    found, wrong = np.count_nonzero(alarm & anomalous), np.count_nonzero(alarm != anomalous)
    any_anomalous = bool(anomalous.any())  # otherwise precision would be 0 however good the decisions are
    return {
        "false_alarms": _share(alarm[~anomalous]),
        "misses": _share(~alarm[anomalous]),
        "precision": _share(anomalous[alarm]) if any_anomalous else math.nan,
        "recall": _share(alarm[anomalous]),
        "f1": 2 * found / (2 * found + wrong) if any_anomalous else math.nan,
        "recognised": _share(np.asarray(decision.object_id) == number),
        "taken_as_unknown": _share(np.asarray(decision.unknown)),
    }


def unknown_rates(
    learned: Iterable[str],
    decisions: Mapping[str, Decision],
    confidences: Mapping[str, Float[np.ndarray, " n"]],
) -> Record:
    """Measure how well images of objects that were never learned are separated from images of learned objects.

    Args:
        learned: Names of the learned objects.
        decisions: Decisions about the test images by object, made without knowing which object they show.
        confidences: Largest probability of the method's object logits per image, by object; may be empty.

    Returns:
        `objects`: share of images decided to be unknown, by object that was never learned; `taken_as_unknown`: that
        share among all images of learned objects; `auroc_distance` and `auroc_logits`: AUROC of the distance, and of
        the negated confidence, for detecting images of objects that were never learned. NaN where undefined.
    """
    learned = set(learned)
    unknown = {name: np.asarray(decision.unknown) for name, decision in decisions.items()}
    unlearned = np.concatenate([np.full(len(flags), name not in learned) for name, flags in unknown.items()])

    def auroc(scores: list[np.ndarray]) -> float:
        return image_auroc(unlearned, np.concatenate(scores)) if scores else math.nan

    return {
        "objects": {name: _share(flags) for name, flags in unknown.items() if name not in learned},
        "taken_as_unknown": _share(np.concatenate(list(unknown.values()))[~unlearned]),
        "auroc_distance": auroc([np.asarray(decision.distance) for decision in decisions.values()]),
        "auroc_logits": auroc([-confidence for confidence in confidences.values()]),
    }


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if flags.size else math.nan
