"""Evaluates a trained model on any dataset, without training: python -m iumad_jax.evaluate --workdir=FOLDER."""

import functools
import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import commands, data, decisions, inputs, methods, recognition, snapshots
from iumad_jax import workdir as workdirs
from iumad_jax.data.store import PreparedSet
from iumad_jax.errors import UserError
from iumad_jax.metrics import image_auroc, pixel_metrics
from iumad_jax.predict import predict
from iumad_jax.report import html, samples, tables
from iumad_jax.report.ledger import Ledger, write_whole
from iumad_jax.shapes import GroundTruth, Prediction
from iumad_jax.snapshots import Snapshot


def evaluate(prediction: Prediction, truth: GroundTruth) -> dict[str, float]:
    """Every metric for the test images of one object, 0 to 1, NaN where undefined.

    Pixel metrics need to know where every defect is. Object-only metrics take their negatives where something rises
    above the belt; the stricter `workpiece` ones leave out what the image cuts off, such as the belt's side walls.
    """
    regions = {"object": truth.object, "workpiece": truth.workpiece}
    pixels = pixel_metrics(truth.mask, prediction.map, regions)
    if not truth.masked.all():
        pixels = dict.fromkeys(pixels, math.nan)
    return {"i_auroc": image_auroc(truth.anomalous, prediction.score), **pixels}


def keep(folder: Path, step: int, name: str, test: PreparedSet, predictions: dict[str, Prediction]) -> None:
    """Keeps what a report shows of an object's test images after a step; the run's own method comes first.

    Raises:
        UserError: it cannot be written.
    """
    assert test.truth is not None
    kept = samples.summarise(
        test.ids,
        test.defects,
        test.truth.anomalous,
        test.truth.mask if test.truth.masked.all() else None,
        {system: prediction.score for system, prediction in predictions.items()},
        {system: prediction.map for system, prediction in predictions.items()},
    )
    samples.save(folder, step, name, kept)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return commands.execute(str(__doc__), arguments, _define, _evaluate, dataset=True)


def _define(values: flags.FlagValues) -> None:
    commands.define_trained(values)
    help_ = "Where ledger and tables go, in place of earlier ones; by default a folder of WORKDIR/evaluations."
    flags.DEFINE_string("output", None, help_, flag_values=values)


def _evaluate(values: flags.FlagValues) -> str:
    workdir, config = commands.path(values, "workdir"), values.config
    snapshot = snapshots.read(workdir, values.step)
    output = Path(values.output or workdir / "evaluations" / _name(config, workdir, snapshot.position.step))
    if (output / "config.json").exists():
        raise UserError(f"--output={output} is the folder of a run, which would lose its own results; choose another.")
    return tables.console(evaluate_snapshot(config, workdir, snapshot, output), output)


def _name(config: ConfigDict, workdir: Path, step: int) -> str:
    """Of the folder for these results: one for each dataset."""
    own = config.dataset.to_dict() == workdirs.read(workdir).dataset.to_dict()
    digest = hashlib.sha256(config.dataset.to_json().encode()).hexdigest()[:8]
    return f"{config.dataset.name}{'' if own else f'_{digest}'}_step{step}"


def evaluate_snapshot(config: ConfigDict, workdir: Path, snapshot: Snapshot, output: Path) -> dict[str, Any]:
    """Evaluates what a run had learned by a step on the test images of `config.dataset`; writes ledger, tables
    and report.

    Returns:
        What results.json holds: those objects of the dataset that were learned, as if in one step, and under
        `unknown` whether the images of the others are found to be of none of them (`decisions.unknown_rates`).

    Raises:
        UserError: the dataset is at fault, or something cannot be written.
    """
    began = time.monotonic()
    reader = data.open_reader(config)
    store = inputs.open_store(config, reader, workdir)
    decided, variables = snapshot.record["decisions"][-1], snapshot.variables
    recogniser = recognition.fit(variables["recognition"])
    systems = methods.systems(config, len(snapshot.record["inputs"]["objects"]))
    learned = [name for name in reader.objects if name in decided["objects"]]
    if not learned:
        raise UserError(
            f"none of {', '.join(reader.objects)} was learned; name one of {', '.join(decided['objects'])} too."
        )
    tests = {name: store.get(name, "test") for name in reader.objects}  # what is at fault is told before anything goes
    ledger = _new_ledger(output)

    matrices = {s: {metric: np.full((1, len(learned)), np.nan) for metric in tables.METRICS} for s in systems}
    distances, confidences = {}, {}
    for name, test in tqdm(tests.items(), unit="object", disable=None, leave=False):
        assert test.truth is not None
        distances[name] = np.asarray(recognition.distances(recogniser, test.batch.features))
        predictions = {}
        for system, method in systems.items():
            prediction = predictions[system] = predict(jax.jit(method.predict), variables[system], test.batch)
            own = system == config.method
            if own and prediction.object_logits is not None:
                confidences[name] = np.asarray(jax.nn.softmax(prediction.object_logits).max(-1))
            if name in learned:
                scores = evaluate(prediction, test.truth)
                for metric, value in scores.items():
                    matrices[system][metric][0, learned.index(name)] = value
                ledger.append("evaluation", object=name, method=system, **scores)
            if own and name in learned:
                rates = decisions.rates(decided, name, prediction, test.truth, distances[name])
                decided["objects"][name]["test"] = rates
        if name in learned:
            keep(output, 0, name, test, predictions)

    known = len(decided["objects"])
    decided["objects"] = {name: decided["objects"][name] for name in learned}
    results = tables.gather(
        config.to_dict() | {"protocol": f"{len(learned)}-0"},
        learned,
        [learned],
        matrices,
        {system: snapshots.size_of(variables[system]) for system in systems},
        snapshots.size_of(snapshot.memory),
        [decided],
        time.monotonic() - began,
    )
    results["unknown"] = decisions.unknown_rates(decided, distances, confidences)
    results["evaluated"] = {"workdir": str(workdir), "step": snapshot.position.step, "learned": known}
    ledger.append("unknown", **results["unknown"])
    html.write(output, results, functools.partial(inputs.panels, store))
    tables.write_results(output, results)
    return results


def _new_ledger(output: Path) -> Ledger:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: not a writable folder ({error.strerror}); choose another --output.") from error
    write_whole(output / "ledger.jsonl", b"")
    return Ledger(output / "ledger.jsonl")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
