"""An object's good images: those that tell what it looks like, those that set its thresholds, and odd ones."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from iumad_jax.data.prepared import copies
from iumad_jax.data.prepared.store import PreparedSet, Store, mean_tokens
from iumad_jax.shapes import Batch, Modality

_DARK = 3  # grey levels


class GoodImages(NamedTuple):
    """An object's good images by what they are for."""

    learned: Batch  # tell what the object looks like
    calibrating: Batch  # set its thresholds
    from_training_images: bool  # whether the method is trained on those that set thresholds
    few: bool  # whether there are too few to keep any back: those that set thresholds are then mostly altered copies


def good_images(store: Store, name: str) -> GoodImages:
    """An object's good images.

    Without calibration images, every fifth of the training images sets thresholds. Of fewer than 20 all do, together
    with altered copies, since a threshold that a handful of images set would be exceeded by most others.
    """
    training = store.get(name, "train").batch
    if store.reader.ids(name, "calibration"):
        return GoodImages(training, store.get(name, "calibration").batch, False, False)
    count = len(training.object_id)
    if count < copies.FEW:
        varied = store.get(name, "varied").batch
        together = jax.tree.map(lambda *arrays: np.concatenate(arrays), training, varied)
        return GoodImages(training, together, True, True)
    fifth = (np.arange(count) + 1) % 5 == 0
    learned, calibrating = (jax.tree.map(lambda array, rows=rows: array[rows], training) for rows in (~fifth, fifth))
    return GoodImages(learned, calibrating, True, False)


def quality_shifts(store: Store, name: str) -> dict[Modality, np.ndarray]:
    """How far the mean tokens (n, f) of some of an object's training images move where a camera does somewhat worse."""
    features = store.get(name, "train").batch.features
    degraded, ids = store.mean_tokens(name), store.reader.ids(name, "train")
    rows = [ids.index(copies.original(copy)) for copy in copies.ids(store.reader, name, "degraded")]
    return {m: tokens - mean_tokens(features[m][rows]) for m, tokens in degraded.items()}


def odd_images(images: PreparedSet, name: str, kind: str) -> Iterator[str]:
    """One sentence for each way in which images tell nothing: black, saturated, of one value, or like another one.

    Args:
        images: good images of an object.
        name: of the object.
        kind: of the images, such as "training".
    """
    odd: dict[str, list[str]] = {"black": [], "saturated": [], "of a single colour": [], "flat": [], "like another": []}
    seen = set()
    arrays: dict[Modality, Any] = images.batch.images
    for row, id_ in enumerate(images.ids):
        image = {modality: np.asarray(array[row], np.float32) for modality, array in arrays.items()}
        content = hashlib.sha256(b"".join(pixels.tobytes() for pixels in image.values())).digest()
        if "rgb" in image and np.ptp(image["rgb"]) <= _DARK:
            low, high = image["rgb"].min(), image["rgb"].max()
            odd["black" if high <= _DARK else "saturated" if low >= 255 - _DARK else "of a single colour"].append(id_)
        elif "depth" in image and not np.ptp(image["depth"], axis=(0, 1)).any():
            odd["flat"].append(id_)
        elif content in seen:
            odd["like another"].append(id_)
        seen.add(content)
    for how, ids in odd.items():
        if ids:
            shown = ", ".join(ids[:5]) + (" and others" if len(ids) > 5 else "")
            yield f"{len(ids)} of {name}'s {len(images.ids)} {kind} images are {how} ({shown}); look at them."
