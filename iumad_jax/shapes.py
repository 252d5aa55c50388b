"""Letters for array dimensions in annotations, and data structures that several packages share.

    b  images in a batch              n  images in a set
    r  tiles of all these images      t  tiles of an image
    h, w  pixels of an input image    g  tokens per side, p = g * g tokens
    f  feature channels               d  model width
    c  feature channels of all modalities together
    k  objects (classes)              l  positions of a sequence, e channels of a scan
    m  pixels per side of an anomaly map (224)

Arrays are channels-last everywhere.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

MAP_SIZE = 224  # pixels per side of every anomaly map and mask, whatever the input size

Modality = str  # "rgb" or "depth"
Image = Float[Array, "h w 3"]  # network input, 0..255
Grid = Float[Array, "g g f"]  # output of a feature extractor
Tokens = Float[Array, "p f"]  # a grid as a sequence
Condition = tuple[Float[Array, "p d"], ...]  # object-dependent factor of the query, one array per encoder layer
Logits = Float[Array, " k"]
AnomalyMap = Float[Array, "m m"]
Keys = Key[Array, " b"]  # one per image, so that randomness does not depend on how devices share a batch
Variables = dict[
    str, Any
]  # "params" (trained by gradients), "statistics" (gathered), BY_OBJECT, "frozen": see `Method`
Scalars = dict[str, Float[Array, ""]]
StrategyState = dict[str, Any]  # nested dictionary of arrays
BY_OBJECT = "by_object"  # key of a tuple with one item per object, never changed in place: snapshots store each once


def capacity(objects: int) -> int:
    """Return for how many objects arrays have room, in blocks of 8, so that few new objects compile programs anew."""
    return max(-(-objects // 8), 1) * 8


class Batch(NamedTuple):
    """Images as a method receives them, in JAX or (memory-mapped) NumPy arrays.

    Attributes:
        features: Backbone features of the images, by modality.
        images: The images themselves, 0..255, by modality.
        object_id: Number of the object in each image: the true one in training, the recognised one in `predict`.
        sample_weight: Weight of each image in a mean, on average 1 over all devices. None weights all images equally.
        progress: In training, the share of the step's updates that are done.
        foreground: In training, pixels where synthetic defects may lie; None allows all.
    """

    features: dict[Modality, Float[Array, "b p f"]]
    images: dict[Modality, Float[Array, "b h w 3"]]
    object_id: Int[Array, " b"]
    sample_weight: Float[Array, " b"] | None = None
    progress: Float[Array, ""] | None = None
    foreground: Bool[Array, "b m m"] | None = None

    def mean(self, values: Float[Array, " b"]) -> Float[Array, ""]:
        """Average one value per image, weighted by `sample_weight`."""
        return jnp.mean(values if self.sample_weight is None else self.sample_weight * values)


class ErrorMaps(NamedTuple):
    """Output of a method for a batch.

    Attributes:
        maps: Error maps by modality, or by jointly judged group of modalities such as "rgb+depth".
        object_logits: Logits of the object; None if the method does not recognise objects.
        published: Anomaly map as the method's paper combines the modalities; None for the sum of `maps`.
        score: Image score of the method's paper; None for that of IB-IUMAD, see `anomaly_map.SCORES`.
    """

    maps: dict[str, Float[Array, "b m m"]]
    object_logits: Float[Array, "b k"] | None = None
    published: Float[Array, "b m m"] | None = None
    score: Float[Array, " b"] | None = None


class Scale(NamedTuple):
    """Usual values of the error maps of good images, one per object, in the order of learning."""

    quantile: Float[Array | np.ndarray, "*k"]  # 99 % of the values lie below
    mean: Float[Array | np.ndarray, "*k"]
    deviation: Float[Array | np.ndarray, "*k"]  # standard deviation


Scales = dict[str, Scale]  # by modality or group, as in `ErrorMaps.maps`


class Prediction(NamedTuple):
    """Anomaly map and score of each image of a batch."""

    map: Float[Array, "b *t m m"]
    score: Float[Array, " b"]
    object_logits: Float[Array, "b k"] | None


class GroundTruth(NamedTuple):
    """Labels and geometry of a set of images, in NumPy arrays."""

    mask: Bool[Array, "n m m"]  # pixels of a defect
    masked: Bool[Array, " n"]  # False if the image has a defect but no mask
    object: Bool[Array, "n m m"]  # pixels above the background plane, with a rim: negatives of object-only metrics
    workpiece: Bool[Array, "n m m"]  # `object` without parts that the image border cuts off, such as walls
    anomalous: Bool[Array, " n"]
    thumbnail: UInt8[Array, "n m m 3"]
    height: Float[Array, "n m m"]  # metres above the background plane, NaN where depth is missing


class Calibration(NamedTuple):
    """Scores of the good calibration images of an object, or of their tiles."""

    score: Float[np.ndarray, " n"]  # image score of an image or tile
    peak: Float[np.ndarray, " n"]  # largest value of its anomaly map
    distance: Float[np.ndarray, "i 3"]  # `recognition.distances` to the true, nearest and second nearest object
    from_training_images: bool = False  # True without calibration images: scores too low to guarantee anything
    few: bool = False  # True if there are too few images to estimate the distances of further ones
    retired: bool = False  # True if the object is no longer recognised
    tiles: int = 1  # of an image
