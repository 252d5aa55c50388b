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
from iumad_jax.data.processing import Processing
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.data.store import PreparedSet, Store
from iumad_jax.inference.recognition import mean_tokens
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.shapes import Batch, Modality

_FEW = 5  # training images below which none is kept back to set thresholds
_DEGRADED = 50  # training images of an object, at most, of which worse copies are made
_COPIES_OF_FEW = 20
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

    Without calibration images, every fifth of the training images sets thresholds; of fewer than five images all do,
    together with altered copies, since a threshold that a handful of trained images set would be exceeded by any other.
    """
    training = store.get(name, "train").batch
    if store.reader.ids(name, "calibration"):
        return GoodImages(training, store.get(name, "calibration").batch, False, False)
    count = len(training.object_id)
    if count < _FEW:
        copies = store.encode(_copies(store, name, vary)).batch
        together = jax.tree.map(lambda *arrays: np.concatenate(arrays), training, copies)
        return GoodImages(training, together, True, True)
    fifth = (np.arange(count) + 1) % _FEW == 0
    learned, calibrating = (jax.tree.map(lambda array, rows=rows: array[rows], training) for rows in (~fifth, fifth))
    return GoodImages(learned, calibrating, True, False)


def quality_shifts(store: Store, name: str) -> dict[Modality, np.ndarray]:
    """How far the mean tokens (n, f) of some of an object's training images move where a camera does somewhat worse."""
    features = store.get(name, "train").batch.features
    worse = store.encode(_copies(store, name, degrade)).batch.features
    rows = _copied(store, name)
    return {m: mean_tokens(worse[m]) - mean_tokens(features[m][rows]) for m in features}


def _copied(store: Store, name: str) -> np.ndarray:
    """Which training images are altered: some evenly spaced ones, or all of a few several times."""
    count = len(store.reader.ids(name, "train"))
    if count < _FEW:
        return np.arange(_COPIES_OF_FEW) % count
    return np.unique(np.linspace(0, count - 1, _DEGRADED).round().astype(int))


def _copies(store: Store, name: str, alter: Callable[[Sample, int, float], Sample]) -> Iterator[Sample]:
    ids = store.reader.ids(name, "train")
    for number, row in enumerate(_copied(store, name)):
        yield alter(store.reader.read(name, "train", ids[row]), number, store.reader.object_height)


def odd_images(images: PreparedSet, name: str) -> Iterator[str]:
    """One sentence for each kind of training image from which nothing can be learned: black, saturated, of one colour,
    or the same as another.
    """
    kinds: dict[str, list[str]] = {"black": [], "saturated": [], "of a single colour": [], "the same as another": []}
    seen = set()
    pixels: Any = images.batch.images.get("rgb")
    for row, id_ in enumerate(images.ids if pixels is not None else ()):
        image = np.asarray(pixels[row])
        low, high = float(image.min()), float(image.max())
        kind = "black" if high <= _DARK else "saturated" if low >= 255 - _DARK else "of a single colour"
        content = hashlib.sha256(b"".join(np.asarray(array[row]).tobytes() for array in images.batch.images.values()))
        if content.digest() in seen:
            kinds["the same as another"].append(id_)
        elif high - low <= _DARK:
            kinds[kind].append(id_)
        seen.add(content.digest())
    for kind, ids in kinds.items():
        if ids:
            shown = ", ".join(ids[:5]) + (" and others" if len(ids) > 5 else "")
            yield f"{len(ids)} of {name}'s {len(images.ids)} training images are {kind} ({shown}); look at them."


def panels(store: Store, name: str, rows: Sequence[int]) -> tuple[Any, Any, Any]:
    """RGB, depth and masks of some of an object's test images."""
    truth = store.get(name, "test").truth
    assert truth is not None
    return truth.thumbnail[rows], truth.depth[rows], truth.mask[rows]
