"""Calibration on good images, and evaluation on test images, of a run in progress or of a saved snapshot."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from iumad_jax.data import plan
from iumad_jax.data.prepared.good_images import GoodImages
from iumad_jax.data.prepared.store import open_store
from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, evaluation
from iumad_jax.inference.anomaly_map import combine, measure_scales
from iumad_jax.inference.evaluation import Judgement, Model, TestSets
from iumad_jax.inference.thresholds import NONE, Chosen, Record, describe, make_calibration, thresholds
from iumad_jax.methods.method import Method
from iumad_jax.report import html, result_files, samples
from iumad_jax.report.history import history, results
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import preemption, storage
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.progress import Progress
from iumad_jax.shapes import Scales


def calibrate(
    config: ConfigDict,
    methods: dict[str, Method],
    progress: Progress,
    objects: Sequence[str],
    good_images: Callable[[str], GoodImages],
) -> tuple[Progress, Model]:
    """Measure the scales of all methods and the calibration of the config's method on good images.

    Args:
        config: Config of the run.
        methods: Methods by name, the config's method first.
        progress: Progress with the methods' variables, frozen ones included.
        objects: The learned objects, in the order of learning.
        good_images: Returns the good images of an object.

    Returns:
        The progress with new scales and calibrations, and the model with the thresholds that follow from them.
    """
    model = evaluation.make_model(config, methods, progress)
    scales: dict[str, Scales] = {}
    for name, method in methods.items():
        by_object = []
        for number, object_ in enumerate(objects):
            preemption.check()
            errors = method.held_out(progress.variables[name], number)
            if errors is None:
                errors = evaluation.error_maps(model, name, good_images(object_).calibrating)
            by_object.append(measure_scales(errors))
        scales[name] = jax.tree.map(lambda *values: np.stack(values), *by_object)
    model, main = model._replace(scales=scales), next(iter(methods))
    calibration = {}
    for number, object_ in enumerate(objects):
        preemption.check()
        good = good_images(object_)
        prediction, distance = evaluation.infer(model, main, good.calibrating)
        if good.from_training_images and (errors := methods[main].held_out(progress.variables[main], number)):
            numbers = np.full(len(jax.tree.leaves(errors)[0]), number, np.int32)
            held_out = combine(errors, scales[main], numbers, model.rule)
            with_copies: Any = jax.tree.map(lambda *parts: np.concatenate(parts), prediction, held_out)
            prediction = with_copies if good.few else held_out
        flags = {"from_training_images": good.from_training_images, "few": good.few}
        calibration[object_] = make_calibration(prediction, distance, number, **flags)
    limits = thresholds(calibration, config.decisions.quantile)
    return progress._replace(scales=scales, calibration=calibration), model._replace(thresholds=limits)


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
            measured = judgement.metrics | judgement.spread
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
    samples.save(folder, step, first.object, summary)
    truth: Any = first.truth
    samples.save_pictures(folder, first.object, truth.thumbnail, truth.height, truth.mask, height_scale)


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
    reader = plan.open_for_use(config, workdir, tuple(progress.calibration))
    store = open_store(config, reader, workdir, progress.inputs)
    learned = [name for name in reader.objects if name in progress.calibration]
    if not learned:
        raise UserError(
            f"config.dataset.objects selects {', '.join(reader.objects)}, which this model has not learned; include one"
            f" of {', '.join(progress.calibration)}."
        )
    test_sets = evaluation.test_sets(reader, reader.objects, lambda name: store.get(name, "test"))
    if not test_sets:
        raise UserError(f"{config.dataset.root} has no test images of {', '.join(reader.objects)}; add some.")
    for name in test_sets:  # before anything is written, so that unusable images leave earlier results intact
        store.prepare(name, "test")
    before = history(ledgers.read(workdir / "ledger.jsonl"), step)
    ledger = _new_ledger(output)
    ledger.append("step", step=0, learned=learned)
    unknown = _assess_with_unknown(config, progress, chosen, test_sets, learned, ledger, store.processing.height_scale)
    ledger.append("snapshot", step=0, bytes=before.bytes, strategy_bytes=before.strategy_bytes)

    as_one_step = config.to_dict() | {"protocol": f"{len(learned)}-0"}
    content = results(as_one_step, history(ledgers.read(ledger.path)), time.monotonic() - began)
    content["unknown"] = unknown
    content["evaluated"] = {"workdir": str(workdir), "step": step, "learned": len(progress.calibration)}
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
