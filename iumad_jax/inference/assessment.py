"""Calibrates on good images and judges test images, into a ledger and samples; also of a run that was saved."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from iumad_jax.data import readers
from iumad_jax.data.prepared.good_images import GoodImages
from iumad_jax.data.prepared.store import open_store
from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, evaluation
from iumad_jax.inference.evaluation import Judgement, Model, Tests
from iumad_jax.inference.recognition import Recogniser
from iumad_jax.inference.thresholds import Record, calibration_of, describe
from iumad_jax.methods.method import Method
from iumad_jax.report import html, samples, tables
from iumad_jax.report.history import history, results
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import storage
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.progress import Progress
from iumad_jax.shapes import Calibration, Variables


def calibrate(
    method: Method,
    variables: Variables,
    recogniser: Recogniser,
    objects: Sequence[str],
    good_images: Callable[[str], GoodImages],
) -> Iterator[tuple[str, Calibration]]:
    """What the good images of each learned object score, which sets its thresholds."""
    for number, name in enumerate(objects):
        good = good_images(name)
        prediction, distance = evaluation.infer(method, variables, recogniser, good.calibrating)
        flags = {"from_training_images": good.from_training_images, "few": good.few}
        yield name, calibration_of(prediction, distance, number, **flags)


def assess(
    model: Model,
    tests: Tests,
    numbers: Mapping[str, int],
    decided: Record,
    step: int,
    ledger: Ledger,
    folder: Path,
    height_scale: float,
) -> Iterator[Judgement]:
    """Judges all test images, and yields every judgement when it is written.

    Args:
        model: of all methods.
        tests: the images of every object that is judged.
        numbers: of the objects that were learned, whose metrics go to the ledger and whose samples to the folder.
        decided: the thresholds, of `thresholds.describe`; test rates are added to it.
        step: after which this is.
        ledger: of the run or evaluation.
        folder: where samples are kept.
        height_scale: metres that pictures of depth show in middle grey.
    """
    judged: list[Judgement] = []
    for judgement in evaluation.judge(model, tests):
        name = judgement.object
        if name in numbers:
            ledger.append("evaluation", step=step, object=name, method=judgement.method, **judgement.metrics)
            if judgement.decision is not None:
                rates = decisions.rates(judgement.decision, judgement.truth, numbers[name])
                decided["objects"][name]["test"] = rates
            judged.append(judgement)
            if len(judged) == len(model.methods):
                _keep_samples(folder, step, judged, height_scale)
                judged = []
        yield judgement


def _keep_samples(folder: Path, step: int, judgements: Sequence[Judgement], height_scale: float) -> None:
    """Keeps what a report shows of an object's test images, judged by all methods, the run's own one first."""
    first = judgements[0]
    assert first.decision is not None
    kept = samples.summarise(
        first.images.ids,
        first.images.defects,
        first.truth.anomalous,
        first.truth.mask if first.truth.masked.all() else None,
        {one.method: one.prediction.score for one in judgements},
        {one.method: one.prediction.map for one in judgements},
        first.decision.anomalous,
        first.decision.pixel_threshold,
    )
    samples.save(folder, step, first.object, kept)
    truth: Any = first.truth
    samples.save_pictures(folder, first.object, truth.thumbnail, truth.height, truth.mask, height_scale)


def evaluate_snapshot(config: ConfigDict, workdir: Path, progress: Progress, output: Path) -> dict[str, Any]:
    """Evaluates what a run had learned by a step on the test images of `config.dataset`.

    Writes ledger, samples, tables and report to a folder.

    Returns:
        What results.json holds: those objects of the dataset that were learned, as if in one step, and under
        `unknown` whether the images of the others are found to be of none of them (`decisions.unknown_rates`).

    Raises:
        UserError: the dataset is at fault, or something cannot be written.
    """
    began, step = time.monotonic(), progress.position.step
    reader = readers.open_reader(config)
    store = open_store(config, reader, workdir)
    learned = [name for name in reader.objects if name in progress.calibration]
    if not learned:
        raise UserError(
            f"none of {', '.join(reader.objects)} was learned; name one of {', '.join(progress.calibration)} too."
        )
    tests = evaluation.test_sets(reader, reader.objects, lambda name: store.get(name, "test"))
    if not tests:
        raise UserError(f"there are no test images of {', '.join(reader.objects)}; add some.")
    for name in tests:  # what is at fault is told before anything is written
        store.prepare(name, "test")
    before = history(ledgers.read(workdir / "ledger.jsonl"), step)
    ledger = _new_ledger(output)
    ledger.append("step", step=0, learned=learned)
    unknown = _assess_with_unknown(config, progress, tests, learned, ledger, store.processing.height_scale)
    ledger.append("snapshot", step=0, bytes=before.bytes, strategy_bytes=before.strategy_bytes)

    as_one_step = config.to_dict() | {"protocol": f"{len(learned)}-0"}
    found = results(as_one_step, history(ledgers.read(ledger.path)), time.monotonic() - began)
    found["unknown"] = unknown
    found["evaluated"] = {"workdir": str(workdir), "step": step, "learned": len(progress.calibration)}
    html.write(output, found)
    tables.write_results(output, found)
    return found


def _assess_with_unknown(
    config: ConfigDict, progress: Progress, tests: Tests, learned: list[str], ledger: Ledger, height_scale: float
) -> Record:
    """Assesses a model, writes what is decided, and returns how well objects that were never learned are told."""
    decided = describe(progress.calibration, config.decisions.quantile)
    decided["objects"] = {name: decided["objects"][name] for name in learned}
    numbers = {name: number for number, name in enumerate(progress.calibration) if name in learned}
    model, decision_of, confidence_of = evaluation.load(config, progress), {}, {}
    for judgement in assess(model, tests, numbers, decided, 0, ledger, ledger.path.parent, height_scale):
        if judgement.decision is not None:
            decision_of[judgement.object] = judgement.decision
            if judgement.prediction.object_logits is not None:
                logits = judgement.prediction.object_logits
                confidence_of[judgement.object] = np.asarray(jax.nn.softmax(logits).max(-1))
    unknown = decisions.unknown_rates(learned, decision_of, confidence_of)
    ledger.append("decisions", step=0, **decided)
    ledger.append("unknown", **unknown)
    return unknown


def _new_ledger(output: Path) -> Ledger:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: not a writable folder ({error.strerror}); choose another --output.") from error
    storage.write_whole(output / "ledger.jsonl", b"")
    return Ledger(output / "ledger.jsonl")
