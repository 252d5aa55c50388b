"""What is decided about images by the thresholds, and how often decisions err on test images."""

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
    """What is decided about a batch."""

    object_id: Int[Array, " b"]  # the object that was recognised or given, in the order of learning
    probability: Float[Array, " b"]  # that it is this object, given that it is one of those learned
    distance: Float[Array, " b"]  # of the image to the object
    unknown: Bool[Array, " b"]  # whether the distance is above its threshold
    anomalous: Bool[Array, " b"]  # whether the score is above the object's threshold
    mask: Bool[Array, "b m m"]  # where the map is above the object's threshold for pixels
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
    """Decides about a batch, by the thresholds of the object that each image was recognised or said to show.

    Args:
        thresholds: of all objects learned.
        prediction: of a method.
        distance: of each image to each object, of `recognition.distances`.
        object_id: the object of each image; see `recognition.recognise`.
        channels: of the recogniser's features.
    """
    chosen = object_id[:, None] == jnp.arange(distance.shape[-1])[None]

    def of_object(values: Float[Array, "#b k"]) -> Float[Array, " b"]:
        return jnp.where(chosen, values, 0).sum(-1)

    own = of_object(distance)
    image, pixel, unknown = (of_object(one[None]) for one in (thresholds.image, thresholds.pixel, thresholds.unknown))
    return Decision(
        object_id,
        of_object(probabilities(distance, channels, thresholds.rms_distance)),
        own,
        own > unknown,
        prediction.score > image,
        prediction.map > pixel[:, None, None],
        image,
        pixel,
        unknown,
    )


def rates(decision: Decision, truth: GroundTruth, number: int) -> dict[str, float]:
    """How often decisions err on the test images of the object of that number; NaN where undefined.

    Returns:
        `false_alarms`, the share of good images above the threshold; `misses`, of anomalous ones not above it;
        `recognised`, of all images, those taken for this object; `taken_as_unknown`, those too far from all.
    """
    alarm, anomalous = np.asarray(decision.anomalous), np.asarray(truth.anomalous)
    return {
        "false_alarms": _share(alarm[~anomalous]),
        "misses": _share(~alarm[anomalous]),
        "recognised": _share(np.asarray(decision.object_id) == number),
        "taken_as_unknown": _share(np.asarray(decision.unknown)),
    }


def unknown_rates(
    learned: Iterable[str],
    decisions: Mapping[str, Decision],
    confidences: Mapping[str, Float[np.ndarray, " n"]],
) -> Record:
    """How well images of objects that were never learned are told from those of learned ones.

    Args:
        learned: names of the objects that were learned.
        decisions: by object, about its test images; none of them were told which object it is.
        confidences: by object, the largest probability that the method's own object logits give; may be empty.

    Returns:
        `objects`: the share of images flagged as unknown by object never learned; `taken_as_unknown`: the same of all
        images of learned objects together; `auroc_distance` and `auroc_logits`: how well the distance, and the lack of
        confidence, rank the former above the latter. NaN where undefined.
    """
    learned = set(learned)
    flagged = {name: np.asarray(decision.unknown) for name, decision in decisions.items()}
    never = np.concatenate([np.full(len(flags), name not in learned) for name, flags in flagged.items()])

    def auroc(scores: list[np.ndarray]) -> float:
        return image_auroc(never, np.concatenate(scores)) if scores else math.nan

    return {
        "objects": {name: _share(flags) for name, flags in flagged.items() if name not in learned},
        "taken_as_unknown": _share(np.concatenate(list(flagged.values()))[~never]),
        "auroc_distance": auroc([np.asarray(decision.distance) for decision in decisions.values()]),
        "auroc_logits": auroc([-confidence for confidence in confidences.values()]),
    }


def _share(chosen: np.ndarray) -> float:
    return float(chosen.mean()) if chosen.size else math.nan
