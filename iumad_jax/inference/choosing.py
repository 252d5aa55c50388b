"""Comparison of settings on synthetic defects, without test images."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax import config as configs
from iumad_jax.data import plan
from iumad_jax.data.prepared.store import PreparedSet, Store, open_store
from iumad_jax.data.synthetic import paste
from iumad_jax.data.transforms import foreground
from iumad_jax.errors import UserError
from iumad_jax.inference import evaluation, recognition
from iumad_jax.inference.anomaly_map import COMBINATIONS, SCORES, Rule, combine
from iumad_jax.inference.evaluation import Model
from iumad_jax.metrics import image_auroc, pixel_metrics
from iumad_jax.runtime import snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.progress import Progress
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
        UserError: If a run has no finished step or divides images into tiles, an object has no calibration images, or
            the runs' images differ.
    """
    run_configs = [workdirs.read(folder) for folder in folders]
    for config in run_configs:
        configs.refuse_tiles(config, "choose pastes defects")
    progresses = [snapshots.read(folder) for folder in folders]
    _check_same_images(folders, run_configs, progresses)
    rows = []
    for folder, config, progress in zip(folders, run_configs, progresses, strict=True):
        model = evaluation.load(config, progress)
        store = open_store(config, plan.open_learned(config, folder, progress.position.step), folder, progress.inputs)
        in_use = [name for name, calibration in progress.calibration.items() if not calibration.retired]
        _check_calibration(store, in_use)
        values: dict[Any, list[list[float]]] = {}
        for object_ in tqdm(in_use, str(folder), unit="object", disable=None, leave=False):
            for setting, metrics in _measure(model, make_images(store, object_, images, defects, seed)):
                values.setdefault(setting, []).append(metrics)
        rows += [[str(folder), *setting, *np.mean(metrics, axis=0)] for setting, metrics in values.items()]
    rows.sort(key=lambda row: -np.mean(row[-len(_METRICS) :]))
    headers = ["run", "method", "combine", "score", *_METRICS.values()]
    return tabulate(rows, headers, "github", floatfmt=".3f")


def _check_same_images(folders: Sequence[Path], configs: Sequence[ConfigDict], progresses: Sequence[Progress]) -> None:
    """Raise UserError unless the same defects can be pasted into the same images for all runs."""

    def described(config: ConfigDict, progress: Progress) -> dict[str, Any]:
        keys = {"dataset.name": config.dataset.name, "dataset.root": config.dataset.root, "modality": config.modality}
        keys |= {f"input.{key}": config.input[key] for key in ("size", "region", "depth_encoding")}
        return keys | {"learned objects": ",".join(progress.calibration)}

    first, *others = [described(*run) for run in zip(configs, progresses, strict=True)]
    for folder, other in zip(folders[1:], others, strict=True):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"{key} is {value} in {folders[0]} and {other[key]} in {folder}; compare runs of the same images."
                )


def _check_calibration(store: Store, objects: Iterable[str]) -> None:
    for name in objects:
        if not store.reader.ids(name, "calibration"):
            raise UserError(
                f"{name} has no calibration images, in which synthetic defects could be hidden from the model; add good"
                " images that are not trained on."
            )


def make_images(store: Store, object_: str, images: int, defects: int, seed: int) -> Images:
    """Paste synthetic defects into calibration images, on the workpiece where depth tells it, and encode them."""
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
    assert good.truth is not None
    pair = np.resize(rows, _PAIR)  # a constant number, so that pasting is compiled once
    allowed = np.stack([foreground(workpiece) for workpiece in np.asarray(good.truth.workpiece)[pair]])
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), first), _PAIR)
    images = {m: np.asarray(array[pair], np.float32) for m, array in good.batch.images.items()}
    pasted = _paste_pair(keys, images, allowed, store.processing.depth_encoding)
    stored = {m: _as_stored(np.asarray(x)[: len(rows)], good.batch.images[m].dtype) for m, x in pasted.images.items()}
    return stored, np.asarray(pasted.mask)[: len(rows)]


def _as_stored(images: np.ndarray, dtype: Any) -> np.ndarray:
    """Convert images to the type of prepared ones: rounded to whole numbers where a camera's are."""
    return (np.rint(images) if np.issubdtype(dtype, np.integer) else images).astype(dtype)


_paste_pair = jax.jit(paste, static_argnums=3)


def _measure(model: Model, images: Images) -> Iterator[tuple[tuple[str, str, str], list[float]]]:
    """Yield the method, combination and score of each setting, and its metrics for the images of one object."""
    defective = images.mask.any((1, 2))
    region = images.object if images.object.any() else np.ones_like(images.mask)  # all pixels without depth
    distance = recognition.distances(model.recogniser, images.batch.features)
    recognised: Any = np.asarray(recognition.recognise(distance))
    for name in model.methods:
        errors = evaluation.error_maps(model, name, images.batch._replace(object_id=recognised))
        for combination in [key for key in COMBINATIONS if key in errors.maps or key not in ("rgb", "depth")]:
            predictions = {
                score: combine(errors, model.scales[name], recognised, Rule(combination, score)) for score in SCORES
            }
            maps = np.asarray(predictions["common"].map)
            pixels = pixel_metrics(images.mask, maps, {"object": region})
            for score, prediction in predictions.items():
                metrics = {"i_auroc": image_auroc(defective, np.asarray(prediction.score)), **pixels}
                yield (name, combination, score), [metrics[metric] for metric in _METRICS]
