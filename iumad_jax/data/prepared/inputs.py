"""The images of a run as its config asks for them: for the model, for its thresholds, for a detector, for pictures."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from iumad_jax import methods
from iumad_jax.data.degradation import degrade, vary
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import PreparedSet, Store
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.inference.recognition import mean_tokens
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.shapes import Batch, Modality

_FEW = 20  # training images below which none is kept back to set thresholds
_DEGRADED = 50  # training images of an object, at most, of which worse copies are made
_COPIES = 20  # of few images
_DARK = 3  # grey levels


def open_store(config: ConfigDict, reader: Reader, workdir: Path) -> Store:
    """Where images are prepared for this config's backbone."""
    processing = Processing(
        methods.modalities(config),
        config.input.size,
        config.input.depth_encoding,
        reader.height_range,
        reader.object_height,
        reader.normals_window,
    )
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)
    weights = pretrained.load(config.backbone.name, config.backbone.weights)
    digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(weights)))
    return Store(
        folder=Path(config.dataset.prepared or workdir / "prepared"),
        reader=reader,
        processing=processing,
        encoder=jax.jit(lambda images: extractor.apply(weights, images)),
        settings={**config.backbone, "weights": digest.hexdigest()},
    )


def describe(store: Store) -> dict[str, Any]:
    """What a detector must know of the images that it will be given, as JSON."""
    first = store.reader.objects[0]
    sample = store.reader.read(first, "train", store.reader.ids(first, "train")[0])
    camera = sample.camera and dataclasses.asdict(sample.camera)
    return {
        "processing": dataclasses.asdict(store.processing),
        "camera": camera,
        "camera_width": sample.depth if sample.depth is None else sample.depth.shape[1],
    }


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
    if count < _FEW:
        copies = store.encode(_altered(store, name, np.arange(_COPIES) % count, vary)).batch
        together = jax.tree.map(lambda *arrays: np.concatenate(arrays), training, copies)
        return GoodImages(training, together, True, True)
    fifth = (np.arange(count) + 1) % 5 == 0
    learned, calibrating = (jax.tree.map(lambda array, rows=rows: array[rows], training) for rows in (~fifth, fifth))
    return GoodImages(learned, calibrating, True, False)


def quality_shifts(store: Store, name: str) -> dict[Modality, np.ndarray]:
    """How far the mean tokens (n, f) of some of an object's training images move where a camera does somewhat worse."""
    features = store.get(name, "train").batch.features
    count = len(store.reader.ids(name, "train"))
    spread = np.unique(np.linspace(0, count - 1, _DEGRADED).round().astype(int))
    rows = spread if len(spread) >= 5 else np.arange(_COPIES) % count  # each of very few images several times
    worse = store.encode(_altered(store, name, rows, degrade)).batch.features
    return {m: mean_tokens(worse[m]) - mean_tokens(features[m][rows]) for m in features}


def _altered(
    store: Store, name: str, rows: np.ndarray, alter: Callable[[Sample, int, float], Sample]
) -> Iterator[Sample]:
    """Altered copies of the training images with these numbers."""
    ids = store.reader.ids(name, "train")
    for number, row in enumerate(rows):
        yield alter(store.reader.read(name, "train", ids[row]), number, store.reader.object_height)


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


def panels(store: Store, name: str, rows: Sequence[int]) -> tuple[Any, Any, Any]:
    """RGB, depth and masks of some of an object's test images."""
    truth = store.get(name, "test").truth
    assert truth is not None
    return truth.thumbnail[rows], truth.depth[rows], truth.mask[rows]
