"""Comparison of settings on synthetic defects, without test images."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax.data import readers, transforms
from iumad_jax.data.prepared.store import PreparedSet, Store, open_store
from iumad_jax.data.synthetic.defects import paste
from iumad_jax.errors import UserError
from iumad_jax.inference import evaluation, recognition
from iumad_jax.inference.anomaly_map import COMBINATIONS, SCORES, Rule, combine
from iumad_jax.inference.evaluation import Model
from iumad_jax.metrics import image_auroc, pixel_metrics
from iumad_jax.runtime import preemption, snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.shapes import Batch, Modality

_METRICS = {"i_auroc": "I-AUROC", "aupro": "AUPRO", "p_auroc_object": "object P-AUROC"}
_PAIR = 2  # images that are pasted at once; a texture may come from the other one


class Images(NamedTuple):
    """Good images of an object, followed by copies with synthetic defects."""

    batch: Batch
    mask: Bool[np.ndarray, "n m m"]  # pixels of the defects
    object: Bool[np.ndarray, "n m m"]  # as in `GroundTruth`


def compare(folders: Sequence[Path], images: int, defects: int, seed: int) -> str:
    """Tabulate how well each setting finds synthetic defects in calibration images, the best setting first.

    Settings are those of the runs in the folders, each with every method, combination and score.

    Args:
        folders: Workdirs of runs.
        images: Largest number of calibration images per object.
        defects: Number of defective copies of each image.
        seed: Seed of the defects.

    Raises:
        UserError: If a run has no finished step, or an object no calibration images.
    """
    rows = []
    for folder in folders:
        config, progress = workdirs.read(folder), snapshots.read(folder)
        model = evaluation.load(config, progress)
        store = open_store(config, readers.open_reader(config, progress.objects), folder)
        rules = [Rule(*names) for names in itertools.product(_combinations(config), SCORES)]
        values: dict[Any, list[list[float]]] = {}
        for object_ in tqdm(progress.calibration, str(folder), unit="object", disable=None, leave=False):
            made = make_images(store, object_, images, defects, seed)
            for setting, metrics in _measure(model, made, rules):
                values.setdefault(setting, []).append(metrics)
        rows += [[folder.name, *setting, *np.nanmean(metrics, axis=0)] for setting, metrics in values.items()]
    rows.sort(key=lambda row: -np.mean(row[-len(_METRICS) :]))
    headers = ["run", "method", "combine", "score", *_METRICS.values()]
    return tabulate(rows, headers, "github", floatfmt=".3f")


def _combinations(config: ConfigDict) -> list[str]:
    """Return the combinations that differ from each other for the modalities of a config."""
    return list(COMBINATIONS) if "+" in config.modality else ["maximum"]


def make_images(store: Store, object_: str, images: int, defects: int, seed: int) -> Images:
    """Paste synthetic defects into calibration images, on the workpiece where depth tells it, and encode them.

    Raises:
        UserError: If the object has no calibration images.
    """
    if not store.reader.ids(object_, "calibration"):
        raise UserError(
            f"{object_} has no calibration images, in which synthetic defects could be hidden from the model; add good"
            " images that are not trained on."
        )
    good = store.get(object_, "calibration")
    rows = np.linspace(0, len(good.ids) - 1, min(images, len(good.ids))).astype(int)
    copies = np.tile(rows, defects)
    assert good.truth is not None
    truth: Any = good.truth
    pasted = [_paste(store, good, copies[i : i + _PAIR], seed, i) for i in range(0, len(copies), _PAIR)]
    joined: Any = jax.tree.map(lambda *parts: np.concatenate(parts), *pasted)
    images_by_modality, mask = joined
    features: Any = store.encode_images(images_by_modality)
    defective = Batch(features, images_by_modality, good.batch.object_id[copies])
    batch = jax.tree.map(lambda a, b: np.concatenate([a[rows], b.astype(a.dtype)]), good.batch, defective)
    return Images(batch, np.concatenate([np.zeros_like(truth.mask[rows]), mask]), truth.object[[*rows, *copies]])


def _paste(store: Store, good: PreparedSet, rows: np.ndarray, seed: int, first: int) -> tuple[dict[Modality, Any], Any]:
    """Return two or fewer images with defects by modality, and their masks; `first` is the number of the first one."""
    preemption.check()
    assert good.truth is not None
    pair = np.resize(rows, _PAIR)  # a constant number, so that pasting is compiled once
    workpiece = np.asarray(good.truth.workpiece)[pair]
    foreground = np.stack([transforms.erode(mask) if mask.any() else ~mask for mask in workpiece])
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), first), _PAIR)
    images = {m: np.asarray(array[pair], np.float32) for m, array in good.batch.images.items()}
    pasted = _paste_pair(keys, images, foreground, store.processing.depth_encoding)
    stored = {m: _as_stored(np.asarray(x)[: len(rows)], good.batch.images[m].dtype) for m, x in pasted.images.items()}
    return stored, np.asarray(pasted.mask)[: len(rows)]


def _as_stored(images: np.ndarray, dtype: Any) -> np.ndarray:
    """Convert images to the type of prepared ones: rounded to whole numbers where a camera's are."""
    return (np.rint(images) if np.issubdtype(dtype, np.integer) else images).astype(dtype)


_paste_pair = jax.jit(paste, static_argnums=3)


def _measure(model: Model, images: Images, rules: Sequence[Rule]) -> Iterator[tuple[tuple[str, str, str], list[float]]]:
    """Yield the method, combination and score of each setting, and its metrics for the images of one object."""
    defective = images.mask.any((1, 2))
    distance = recognition.distances(model.recogniser, images.batch.features)
    recognised: Any = np.asarray(recognition.recognise(distance))
    for name in model.methods:
        errors = evaluation.error_maps(model, name, images.batch._replace(object_id=recognised))
        for rule in rules:
            prediction = combine(errors, model.scales[name], recognised, rule)
            pixels = pixel_metrics(images.mask, np.asarray(prediction.map), {"object": images.object})
            metrics = {"i_auroc": image_auroc(defective, np.asarray(prediction.score)), **pixels}
            yield (name, *rule), [metrics[metric] for metric in _METRICS]
