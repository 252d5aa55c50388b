"""The legend of array dimensions, and the values that pass between packages.

    b  images in a batch              n  images in a set
    h, w  pixels of an input image    g  side of the token grid, p = g * g tokens
    f  feature channels               d  width of the models
    k  objects (classes) known        l  positions of a sequence, e channels of a scan
    m  side of the anomaly map (224)
Arrays are channels-last everywhere.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

MAP_SIZE = 224  # every map and mask is compared at this size, whatever the input size

Modality = str  # "rgb" or "depth"
Image = Float[Array, "h w 3"]  # a network's input, 0..255
Grid = Float[Array, "g g f"]  # a feature extractor's output
Tokens = Float[Array, "p f"]  # the same, as a sequence
Condition = tuple[Float[Array, "p d"], ...]  # one per encoder layer: what object the Mamba decoder sees
Logits = Float[Array, " k"]
AnomalyMap = Float[Array, "m m"]
Keys = Key[Array, " b"]  # one key per image: randomness does not depend on how a batch is spread over devices
# {"params": trained by gradients, "statistics": gathered, never trained, "frozen": neither, nor stored in snapshots}
Variables = dict[str, Any]
Scalars = dict[str, Float[Array, ""]]
StrategyState = dict[str, Any]  # what a strategy against forgetting keeps: nested, of arrays
BY_OBJECT = "by_object"  # key of a tuple with the arrays of each object learned, which never change: stored only once


class Batch(NamedTuple):
    """Images as a method sees them; arrays of jax, or of numpy (also memory-mapped)."""

    features: dict[Modality, Float[Array, "b p f"]]
    images: dict[Modality, Float[Array, "b h w 3"]]
    object_id: Int[Array, " b"]  # in training the object of each image; for `predict` the one that was recognised
    sample_weight: Float[Array, " b"] | None = None  # of each image in a mean over them; None: all the same
    progress: Float[Array, ""] | None = None  # in training, the share of the step's updates that are done

    def mean(self, values: Float[Array, " b"]) -> Float[Array, ""]:
        """Of one value per image, with their weights, which are on average 1 over all devices."""
        return jnp.mean(values if self.sample_weight is None else self.sample_weight * values)


class ErrorMaps(NamedTuple):
    """What a method says about a batch."""

    maps: dict[str, Float[Array, "b m m"]]  # by modality, or by a group of them that it judges together: "rgb+depth"
    object_logits: Float[Array, "b k"] | None


class Prediction(NamedTuple):
    """What is made of it."""

    map: Float[Array, "b m m"]
    score: Float[Array, " b"]
    object_logits: Float[Array, "b k"] | None


class GroundTruth(NamedTuple):
    """What evaluation knows about a set of images; numpy arrays."""

    mask: Bool[Array, "n m m"]
    masked: Bool[Array, " n"]  # whether the mask says where the defect is; False: the image has one that nobody marked
    object: Bool[Array, "n m m"]  # what rises above the plane, with a rim: where object-only metrics take negatives
    workpiece: Bool[Array, "n m m"]  # the same without what the image cuts off, such as walls
    anomalous: Bool[Array, " n"]
    thumbnail: UInt8[Array, "n m m 3"]
    height: Float[Array, "n m m"]  # metres above the background plane, NaN where depth is missing


class Calibration(NamedTuple):
    """What an object's n good calibration images scored."""

    score: Float[np.ndarray, " n"]  # of the image
    peak: Float[np.ndarray, " n"]  # the largest value of its map
    distance: Float[np.ndarray, "n 3"]  # of `recognition.distances`: to its own object, the nearest, the second nearest
    from_training_images: bool = False  # for want of others: their scores are too low and promise nothing
    few: bool = False  # too few images to say how far others of this object may be
