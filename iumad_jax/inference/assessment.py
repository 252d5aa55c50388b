"""Calibration on good images, and evaluation on test images, of a run in progress or of a saved snapshot."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.data import plan
from iumad_jax.data.prepared.good_images import CalibrationImages
from iumad_jax.data.prepared.store import open_store
from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, evaluation, recognition
from iumad_jax.inference.anomaly_map import Rule, combine, measure_scales
from iumad_jax.inference.evaluation import Judgement, Model, TestSets
from iumad_jax.inference.thresholds import (
    NONE,
    Chosen,
    Record,
    describe,
    make_calibration,
    nearest_distances,
    thresholds,
)
from iumad_jax.methods.method import Method
from iumad_jax.protocol import Step
from iumad_jax.report import html, result_files, samples
from iumad_jax.report.history import history, results
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import preemption, storage
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.progress import Progress
from iumad_jax.shapes import ErrorMaps, Scales, Variables


def calibrate(
    config: ConfigDict,
    methods: dict[str, Method],
    progress: Progress,
    step: Step,
    calibrating: Callable[[str], CalibrationImages],
    joint_means: Callable[[str], Float[Array, "n c"]],
) -> tuple[Progress, Model]:
    """Measure the scales of all methods and the calibration of the config's method on good images.

    Objects that a step cannot have changed keep both, except for their distances to the other objects.

    Args:
        config: Config of the run.
        methods: Methods by name, the config's method first.
        progress: Progress with the methods' variables, frozen ones included.
        step: The step that ends.
        calibrating: Returns the calibration images of an object. It is called only for those that the step may have
            changed.
        joint_means: Returns `recognition.joint_means` of the calibration images of an object.

    Returns:
        The progress with new scales and calibrations, and the model with the thresholds that follow from them.
    """
    calibration = dict(progress.calibration)
    if step.act in ("retire", "restore"):
        retired = step.act == "retire"
        calibration |= {name: calibration[name]._replace(retired=retired) for name in step.objects}
    progress = progress._replace(calibration=calibration)
    model, main = evaluation.make_model(config, methods, progress), next(iter(methods))
    tiles = model.tiling.count
    scales: dict[str, list[Scales]] = {name: [] for name in methods}
    for number, object_ in enumerate(progress.objects):
        preemption.check()
        earlier = calibration.get(object_)
        retired = earlier is not None and earlier.retired
        changed = [name for name, method in methods.items() if not retired and _is_changed(step, method, object_)]
        if not retired:
            of_tiles = recognition.distances_of_means(model.recogniser, joint_means(object_))
            distance = np.asarray(recognition.of_images(of_tiles, tiles))
            if earlier is not None:
                calibration[object_] = earlier._replace(distance=nearest_distances(distance, number))
        good = calibrating(object_) if changed else None
        for name in methods:
            if good is None or name not in changed:
                scales[name].append(jax.tree.map(lambda values, i=number: values[i], progress.scales[name]))
                continue
            errors, judged = _error_maps(model, name, progress.variables[name], number, good)
            scales[name].append(measure_scales(errors))
            if name == main:
                predictions = [_predict(part, scales[name][-1], model.rule) for part in judged]
                score, peak = map(np.concatenate, zip(*predictions, strict=True))
                flags = {"from_training_images": bool(good.trained.any()), "few": good.few, "tiles": tiles}
                calibration[object_] = make_calibration(score, peak, distance, number, **flags)
    stacked = {name: jax.tree.map(lambda *values: np.stack(values), *by_object) for name, by_object in scales.items()}
    limits = thresholds(calibration, config.decisions.quantile)
    model = model._replace(scales=stacked, thresholds=limits)
    return progress._replace(scales=stacked, calibration=calibration), model


def _is_changed(step: Step, method: Method, object_: str) -> bool:
    """Return whether a step changes a method's error maps of an object, or the images that they are calibrated on."""
    if method.independent:  # so that it has not changed while the object was retired
        return object_ in step.objects and step.act != "restore"
    return object_ in step.objects or bool(step.trained)


def _error_maps(
    model: Model, name: str, variables: Variables, number: int, good: CalibrationImages
) -> tuple[ErrorMaps, list[ErrorMaps]]:
    """Return the error maps that set a method's scales of an object, and those that set its thresholds.

    Images on which the method was trained are replaced by its own held-out errors, if it has any. If there are few
    images, both are used, since most are altered copies.
    """
    held_out = model.methods[name].held_out(variables, number)
    if held_out is None:
        errors = evaluation.error_maps(model, name, good.images)
        return errors, [errors]
    rows = np.flatnonzero(~good.trained | good.few)
    images = jax.tree.map(lambda array: array[rows], good.images)
    judged = [evaluation.error_maps(model, name, images)] if len(rows) else []
    return held_out, [*judged, held_out] if good.trained.any() else judged


def _predict(errors: ErrorMaps, scales: Scales, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of an object's error maps, and the largest values of the anomaly maps."""

    def predict(scales: Scales, errors: ErrorMaps) -> tuple[Any, Any]:
        number = np.zeros(len(jax.tree.leaves(errors)[0]), np.int32)
        prediction = combine(errors, scales, number, rule)
        return prediction.score, prediction.map.max((1, 2))

    of_one = jax.tree.map(lambda value: np.asarray(value)[None], scales)
    return predict_in_batches(predict, of_one, errors)


def assess(
    model: Model,
    test_sets: TestSets,
    object_numbers: Mapping[str, int],
    threshold_record: Record,
    step: int,
    ledger: Ledger,
    folder: Path,
    height_scale: float,
) -> Iterator[Judgement]:
    """Evaluate all methods on all test images and yield each judgement after its results are written.

    Args:
        model: Methods, recogniser and thresholds.
        test_sets: Test images by object, which may include objects that were never learned.
        object_numbers: Numbers of the learned objects. Only their metrics and samples are written.
        threshold_record: Result of `thresholds.describe`; the error rates on test images are added to it.
        step: Step number for the ledger and the samples.
        ledger: Ledger of the run or evaluation, which receives the metrics.
        folder: Folder for the samples.
        height_scale: Height in metres that depth pictures show as middle grey.
    """
    judgements: list[Judgement] = []
    for judgement in evaluation.judge(model, test_sets):
        name = judgement.object
        if name in object_numbers:
            measured = judgement.metrics | judgement.details
            ledger.append("evaluation", step=step, object=name, method=judgement.method, **measured)
            if judgement.decision is not None:
                rates = decisions.rates(judgement.decision, judgement.truth, object_numbers[name])
                threshold_record["objects"][name]["test"] = rates
            judgements.append(judgement)
            if len(judgements) == len(model.methods):
                _save_samples(folder, step, judgements, height_scale)
                judgements = []
        yield judgement


def _save_samples(folder: Path, step: int, judgements: Sequence[Judgement], height_scale: float) -> None:
    """Save the report's data on one object's test images, given the judgements of all methods, baselines last."""
    first = judgements[0]
    assert first.decision is not None
    summary = samples.summarise(
        first.images.ids,
        first.images.defects,
        first.truth.anomalous,
        first.truth.mask if first.truth.masked.all() else None,
        {judgement.method: judgement.prediction.score for judgement in judgements},
        {judgement.method: judgement.prediction.map for judgement in judgements},
        first.decision.anomalous,
        first.decision.pixel_threshold,
    )
    truth: Any = first.truth
    pictures = samples.save_pictures(folder, first.object, truth.thumbnail, truth.height, truth.mask, height_scale)
    samples.save(folder, step, first.object, summary._replace(pictures=pictures))


def evaluate_snapshot(
    config: ConfigDict, workdir: Path, progress: Progress, output: Path, chosen: Chosen = NONE
) -> dict[str, Any]:
    """Evaluate a snapshot on the test images of `config.dataset`.

    Ledger, samples, tables and report are written to the output folder.

    Args:
        config: Config of the run, possibly with another dataset or `decisions.quantile`.
        workdir: Workdir of the run.
        progress: The snapshot.
        output: Folder for the results, created if missing.
        chosen: Thresholds that a user chose, see `thresholds.choose`.

    Returns:
        Content of results.json. It covers the learned objects of the dataset as if they had been learned in one step;
        `unknown` holds the rates of `decisions.unknown_rates`, which use the objects never learned.

    Raises:
        UserError: If the dataset cannot be used or a file cannot be written.
    """
    began, step = time.monotonic(), progress.position.step
    reader = plan.open_for_use(config, workdir, step)
    store = open_store(config, reader, workdir, progress.inputs)
    in_use = [name for name, calibration in progress.calibration.items() if not calibration.retired]
    learned = [name for name in reader.objects if name in in_use]
    if not learned:
        raise UserError(
            f"config.dataset.objects selects {', '.join(reader.objects)}, which this model has not learned; include one"
            f" of {', '.join(in_use)}."
        )
    tested = tuple(name for name in reader.objects if name in learned or name not in progress.calibration)
    test_sets = evaluation.test_sets(reader, tested, lambda name: store.get(name, "test"))
    if not test_sets:
        raise UserError(f"{config.dataset.root} has no test images of {', '.join(reader.objects)}; add some.")
    for name in test_sets:  # before anything is written, so that unusable images leave earlier results intact
        store.prepare(name, "test")
    before = history(ledgers.read(workdir / "ledger.jsonl"), step)
    ledger = _new_ledger(output)
    ledger.append("step", step=0, act="learn", objects=learned)
    unknown = _assess_with_unknown(config, progress, chosen, test_sets, learned, ledger, store.processing.height_scale)
    ledger.append("snapshot", step=0, bytes=before.bytes, strategy_bytes=before.strategy_bytes)

    as_one_step = config.to_dict() | {"protocol": f"{len(learned)}-0"}
    content = results(as_one_step, history(ledgers.read(ledger.path)), time.monotonic() - began)
    content["unknown"] = unknown
    content["evaluated"] = {
        "workdir": str(workdir),
        "step": step,
        "learned": len(progress.calibration),
        "steps": {name: number for number, names in enumerate(before.steps) for name in names},
    }
    html.write(output, content)
    result_files.write(output, content)
    return content


def _assess_with_unknown(
    config: ConfigDict,
    progress: Progress,
    chosen: Chosen,
    test_sets: TestSets,
    learned: list[str],
    ledger: Ledger,
    height_scale: float,
) -> Record:
    """Assess a model, write its decisions to the ledger, and return the rates of `decisions.unknown_rates`."""
    record = describe(progress.calibration, config.decisions.quantile, chosen)
    record["objects"] = {name: record["objects"][name] for name in learned}
    numbers = {name: number for number, name in enumerate(progress.calibration) if name in learned}
    model, decision_by_object, confidence_by_object = evaluation.load(config, progress, chosen), {}, {}
    for judgement in assess(model, test_sets, numbers, record, 0, ledger, ledger.path.parent, height_scale):
        if judgement.decision is not None:
            decision_by_object[judgement.object] = judgement.decision
            if judgement.prediction.object_logits is not None:
                logits = judgement.prediction.object_logits
                confidence_by_object[judgement.object] = np.asarray(jax.nn.softmax(logits).max(-1))
    unknown = decisions.unknown_rates(learned, decision_by_object, confidence_by_object)
    ledger.append("decisions", step=0, **record)
    ledger.append("unknown", **unknown)
    return unknown


def _new_ledger(output: Path) -> Ledger:
    """Create the output folder with an empty ledger, replacing the ledger of an earlier evaluation."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created ({error.strerror}); choose another --output.") from error
    storage.write_whole(output / "ledger.jsonl", b"")
    return Ledger(output / "ledger.jsonl")
