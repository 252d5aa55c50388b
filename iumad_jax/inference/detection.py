"""What a detector takes and returns."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from iumad_jax.data.region import Box
from iumad_jax.data.tiles import Tiling, stitch
from iumad_jax.shapes import Modality


class Detection(NamedTuple):
    """Result of a detector for one image. For a batch, every field has a leading axis b.

    Attributes:
        score: Anomaly score.
        map: Anomaly map of 224 x 224 pixels. If the run sees a part of each image (`config.input.region`), the map has
            the image's own size and is zero outside of this part; so it has if the run sees tiles, whose maps it joins.
        mask: Anomalous pixels, where `map` exceeds `pixel_threshold`, in the size of `map`.
        anomalous: Whether `score` exceeds `image_threshold`.
        object: Name of the recognised or specified object, a str; an array of names for a batch.
        probability: Probability that the image shows this object, assuming that it shows a learned one.
        distance: Distance of the image to this object, see `recognition.distances`.
        embedding: What the object is recognised by, c numbers that are close to those of like images, see
            `recognition.whitened`.
        unknown: Whether `distance` exceeds `unknown_threshold`. If so, the image probably shows no learned object, and
            its score, map and object are meaningless.
        image_threshold: Threshold of the object for `score`.
        pixel_threshold: Threshold of the object for `map`.
        unknown_threshold: Threshold of the object for `distance`.
    """

    score: Float32[np.ndarray, "*b"]
    map: Float32[np.ndarray, "*b h w"]
    mask: Bool[np.ndarray, "*b h w"]
    anomalous: Bool[np.ndarray, "*b"]
    object: Any
    probability: Float32[np.ndarray, "*b"]
    distance: Float32[np.ndarray, "*b"]
    embedding: Float32[np.ndarray, "*b c"]
    unknown: Bool[np.ndarray, "*b"]
    image_threshold: Float32[np.ndarray, "*b"]
    pixel_threshold: Float32[np.ndarray, "*b"]
    unknown_threshold: Float32[np.ndarray, "*b"]

    @property
    def decision(self) -> Any:
        """The decision about the image: "unknown", "anomalous" or "good"."""
        return np.where(self.unknown, "unknown", np.where(self.anomalous, "anomalous", "good"))[()]

    @property
    def relative_score(self) -> Float[np.ndarray, "*b"]:
        """The score from 0 to 1, score / (score + image_threshold): above 1/2 where the image is anomalous."""
        score = self.score.astype(np.float64)  # in which the smallest score of float32 is far from zero
        return (score / np.maximum(score + self.image_threshold, np.finfo(np.float64).tiny)).astype(np.float32)


class Processed(NamedTuple):
    """Images as `Detector.judge` takes them, and what they show.

    Attributes:
        images: Images by modality, with values 0 to 255.
        boxes: Part of each original image that they show.
        size: Rows and columns of the original images.
        tiling: Tiles of the parts, each of which has a row in `images`.
        whole: Whether the run sees images whole, and not parts of them or tiles.
    """

    images: dict[Modality, Float32[np.ndarray, "r s s 3"]]
    boxes: tuple[Box, ...]
    size: tuple[int, int]
    tiling: Tiling
    whole: bool

    def place(self, detection: Detection) -> Detection:
        """Return detections with maps and masks in the images' own size, unless the run sees images whole."""
        if self.whole:
            return detection
        maps = np.zeros((len(self.boxes), *self.size), np.float32)
        for image, seen, box in zip(maps, detection.map, self.boxes, strict=True):
            part = image[box.slices(self.size)]
            part[:] = stitch(seen.reshape(self.tiling.count, *seen.shape[-2:]), self.tiling, part.shape)
        return detection._replace(map=maps, mask=maps > detection.pixel_threshold[:, None, None])
