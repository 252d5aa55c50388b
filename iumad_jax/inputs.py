"""The images of a run as its config asks for them: for the model, for its thresholds, for a detector, for pictures."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from iumad_jax import methods
from iumad_jax.data.degradation import degrade
from iumad_jax.data.processing import Processing
from iumad_jax.data.sample import Reader
from iumad_jax.data.store import Store
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.recognition import mean_tokens
from iumad_jax.shapes import Batch, Modality

_DEGRADED = 50  # training images of an object, at most, of which worse copies are made


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
        "objects": list(store.reader.objects),
        "processing": dataclasses.asdict(store.processing),
        "camera": camera,
        "camera_width": sample.depth if sample.depth is None else sample.depth.shape[1],
    }


def good_images(store: Store, name: str) -> tuple[Batch, Batch]:
    """An object's good images: those that tell what it looks like, and those that set its thresholds.

    Without calibration images, every fifth of the training images is the latter.
    """
    training = store.get(name, "train").batch
    if store.reader.ids(name, "calibration"):
        return training, store.get(name, "calibration").batch
    count = len(training.object_id)
    fifth = (np.arange(count) + 1) % min(count, 5) == 0
    return tuple(jax.tree.map(lambda array, rows=rows: array[rows], training) for rows in (~fifth, fifth))


def quality_shifts(store: Store, name: str) -> dict[Modality, np.ndarray]:
    """How far the mean tokens (n, f) of some of an object's training images move where a camera does somewhat worse."""
    ids, features = store.reader.ids(name, "train"), store.get(name, "train").batch.features
    rows = np.unique(np.linspace(0, len(ids) - 1, _DEGRADED).round().astype(int))
    worse = store.features(
        degrade(store.reader.read(name, "train", ids[row]), number, store.reader.object_height)
        for number, row in enumerate(rows)
    )
    return {m: mean_tokens(tokens) - mean_tokens(features[m][rows]) for m, tokens in worse.items()}


def panels(store: Store, name: str, rows: Sequence[int]) -> tuple[Any, Any, Any]:
    """RGB, depth and masks of some of an object's test images."""
    truth = store.get(name, "test").truth
    assert truth is not None
    return truth.thumbnail[rows], truth.depth[rows], truth.mask[rows]
