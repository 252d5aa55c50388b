"""Evaluation of a model on the test images of one object after the other, without revealing which object they show."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import methods
from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.data.sample import Reader
from iumad_jax.data.tiles import Tiling, stitch_for_metrics
from iumad_jax.inference import recognition
from iumad_jax.inference.anomaly_map import Rule, combine, make_rule
from iumad_jax.inference.decisions import Decision, decide
from iumad_jax.inference.recognition import Recogniser
from iumad_jax.inference.thresholds import NONE, Chosen, Thresholds, thresholds
from iumad_jax.methods.method import Method, with_frozen
from iumad_jax.metrics import image_auroc, image_replicates, pixel_metrics_of_groups, pixel_replicates, resample, spread
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.runtime.progress import Progress
from iumad_jax.shapes import Batch, ErrorMaps, GroundTruth, Prediction, Scales, Variables

_AT_ONCE = 8  # images whose tiles' maps are in memory


class Model(NamedTuple):
    """Methods after a step, and what turns their error maps into decisions."""

    methods: dict[str, Method]  # by name: the config's method first, then its baselines
    variables: dict[str, Variables]  # by method name, arranged (`Method.arrange`)
    scales: dict[str, Scales]  # by method name, for all learned objects
    rule: Rule
    recogniser: Recogniser
    thresholds: Thresholds | None  # of the config's method; None before the first calibration
    tiling: Tiling = Tiling(1, 1, 0)


def load(config: ConfigDict, progress: Progress, chosen: Chosen = NONE) -> Model:
    """Build the model of a run's config from a snapshot, with the thresholds that a user chose."""
    built = methods.with_baselines(config)
    variables = {
        name: with_frozen(name, built[name], progress.variables[name], progress.frozen.get(name)) for name in built
    }
    model = make_model(config, built, progress._replace(variables=variables))
    return model._replace(thresholds=thresholds(progress.calibration, config.decisions.quantile, chosen))


def make_model(config: ConfigDict, methods: dict[str, Method], progress: Progress) -> Model:
    """Build the model of a config from its methods, whose frozen variables the progress includes."""
    return Model(
        methods,
        {name: jax.device_put(method.arrange(progress.variables[name])) for name, method in methods.items()},
        progress.scales,
        make_rule(config),
        recognition.fit(progress.recognition, progress.retired),
        thresholds(progress.calibration, config.decisions.quantile) if progress.calibration else None,
        Tiling.of(config.input.tiles, config.input.overlap),
    )


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One method's predictions for all test images of one object."""

    object: str
    method: str
    images: PreparedSet
    prediction: Prediction
    decision: Decision | None  # None for baselines, which have no thresholds

    @property
    def truth(self) -> GroundTruth:
        """The ground truth of the images."""
        assert self.images.truth is not None
        return self.images.truth

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics, see `metrics_of`."""
        return self._metrics[""]

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """By kind of defect: its number of `images`, their share of `alarms` if decisions were made, and all metrics.

        The I-AUROC ranks the images of the kind against the good images. Pixel metrics measure the kind's defects
        against the normal pixels of all images.
        """
        kinds = {kind: {"images": len(rows)} | self._metrics[kind] for kind, rows in self._rows.items()}
        if self.decision is not None:
            for kind, rows in self._rows.items():
                kinds[kind]["alarms"] = float(np.mean(self.decision.anomalous[rows]))
        return kinds

    @functools.cached_property
    def _metrics(self) -> dict[str, dict[str, float]]:
        return metrics_of_groups(self.prediction, self.truth, {"": np.arange(len(self.images.ids))} | self._rows)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        kinds = np.where(self.truth.anomalous, self.images.defects, "")
        return {str(kind): np.flatnonzero(kinds == kind) for kind in np.unique(kinds) if kind}

    @functools.cached_property
    def details(self) -> dict[str, dict[str, Any]]:
        """How far the metrics depend on the choice of test images, see `spread_of`, and the metrics of `kinds`."""
        return spread_of(self.prediction, self.truth) | {"kinds": self.kinds}


TestSets = Mapping[str, Callable[[], PreparedSet]]  # by object: a function that reads its test images


def test_sets(reader: Reader, objects: tuple[str, ...], read: Callable[[str], PreparedSet]) -> TestSets:
    """Map each object that has test images to a function that reads them with `read`."""
    return {name: functools.partial(read, name) for name in objects if reader.ids(name, "test")}


def judge(model: Model, test_sets: TestSets) -> Iterator[Judgement]:
    """Yield the judgement of every method about every object's images, baselines after the config's method."""
    for name, read in tqdm(test_sets.items(), "evaluating", unit="object", disable=None, leave=False):
        images = read()
        for number, method_name in enumerate(model.methods):
            prediction, distance = infer(model, method_name, images.batch)
            decision = decide_all(model, prediction, distance) if number == 0 else None
            yield Judgement(name, method_name, images, prediction, decision)


def error_maps(model: Model, method: str, images: Batch) -> ErrorMaps:
    """Compute a method's error maps of images that show the given objects."""
    return predict_in_batches(jax.jit(model.methods[method].predict), model.variables[method], images)


def infer(model: Model, method: str, images: Batch) -> tuple[Prediction, Float[np.ndarray, "n k"]]:
    """Predict images without knowing their objects: as in a detector, the method receives the recognised ones.

    Args:
        model: Model that predicts.
        method: Name of one of its methods.
        images: Images, or their tiles, one row each.

    Returns:
        The predictions, and the distance of each image to each learned object. The tiles of an image become one: their
        maps are stitched, its score is the largest of theirs, and its logits are their means.
    """
    tiles = model.tiling.count
    distance = recognition.of_images(recognition.distances(model.recogniser, images.features), tiles)
    recognised: Any = np.repeat(np.asarray(recognition.recognise(distance)), tiles)
    predict = jax.jit(model.methods[method].predict)  # by itself, so that calibration and evaluation share the program

    def predict_batch(state: tuple[Variables, Scales], batch: Batch) -> Prediction:
        variables, scales = state
        return combine(predict(variables, batch), scales, batch.object_id, model.rule)

    state = model.variables[method], model.scales[method]
    images, chunk = images._replace(object_id=recognised), len(recognised) if tiles == 1 else _AT_ONCE * tiles
    parts = (
        jax.tree.map(lambda array, start=start: array[start : start + chunk], images)
        for start in range(0, len(recognised), chunk)
    )
    predictions = [_of_images(predict_in_batches(predict_batch, state, part), model.tiling) for part in parts]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *predictions), np.asarray(distance)


def _of_images(prediction: Prediction, tiling: Tiling) -> Prediction:
    """Join the predictions of tiles to those of images, with maps of 224 x 224 pixels."""
    if tiling.count == 1:
        return prediction
    maps, score, logits = jax.tree.map(lambda array: array.reshape(-1, tiling.count, *array.shape[1:]), prediction)
    whole: Any = np.stack([stitch_for_metrics(tiles, tiling) for tiles in maps])
    return Prediction(whole, score.max(1), None if logits is None else logits.mean(1))


def decide_all(model: Model, prediction: Prediction, distance: Float[np.ndarray, "n k"]) -> Decision:
    """Decide about images by the thresholds of the object recognised in each, in batches."""
    object_id = np.asarray(recognition.recognise(jnp.asarray(distance)))
    state = model.thresholds, np.int32(len(model.recogniser.centre))
    return predict_in_batches(jax.jit(_decide), state, (prediction._replace(object_logits=None), distance, object_id))


def _decide(state: tuple, batch: tuple) -> Decision:
    """Unpack the arguments of `decide` for `predict_in_batches`."""
    limits, channels = state
    prediction, distance, object_id = batch
    return decide(limits, prediction, distance, object_id, channels)


def metrics_of(prediction: Prediction, truth: GroundTruth) -> dict[str, float]:
    """Compute all metrics for the test images of one object, each from 0 to 1, or NaN where undefined.

    Pixel metrics are undefined unless every defect is masked. The negatives of object-only metrics are pixels above
    the background plane; the stricter `workpiece` metrics exclude regions cut off by the image border, such as walls.
    """
    return metrics_of_groups(prediction, truth, {"all": np.arange(len(truth.anomalous))})["all"]


def metrics_of_groups(
    prediction: Prediction, truth: GroundTruth, groups: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Compute `metrics_of` for the defects in groups of images, given by rows, against all good images and pixels."""
    regions = {"object": truth.object, "workpiece": truth.workpiece}
    metrics = pixel_metrics_of_groups(truth.mask, prediction.map, groups, regions)
    good = np.flatnonzero(~truth.anomalous)
    for group, rows in groups.items():
        if not truth.masked.all():
            metrics[group] = dict.fromkeys(metrics[group], math.nan)
        rows = np.union1d(good, rows)
        metrics[group] = {"i_auroc": image_auroc(truth.anomalous[rows], prediction.score[rows]), **metrics[group]}
    return metrics


def spread_of(prediction: Prediction, truth: GroundTruth) -> dict[str, dict[str, Any]]:
    """Compute how far `metrics_of` depends on the choice of test images, by bootstrap; NaN where undefined.

    Returns:
        `intervals`, the ends of each metric's 95 % interval, and `standard_errors`, by metric.
    """
    counts = resample(truth.anomalous)
    regions = {"object": truth.object, "workpiece": truth.workpiece}
    pixels = pixel_replicates(truth.mask, prediction.map, counts, regions)
    if not truth.masked.all():
        pixels = dict.fromkeys(pixels, np.empty(0))
    replicates = {"i_auroc": image_replicates(truth.anomalous, prediction.score, counts), **pixels}
    spreads = {metric: spread(values) for metric, values in replicates.items()}
    return {
        "intervals": {metric: interval for metric, (_, interval) in spreads.items()},
        "standard_errors": {metric: error for metric, (error, _) in spreads.items()},
    }
