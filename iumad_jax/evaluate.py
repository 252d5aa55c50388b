"""Evaluates a trained model on any dataset, without training: python -m iumad_jax.evaluate --workdir=FOLDER."""

import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax.data import readers
from iumad_jax.data.prepared import inputs
from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, evaluation
from iumad_jax.inference.evaluation import Judgement, Tests
from iumad_jax.report import html, samples, tables
from iumad_jax.report.history import history, results
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.progress import Progress
from iumad_jax.runtime.storage import write_whole


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _evaluate, dataset=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    help_ = "Where ledger and tables go, in place of earlier ones; by default a folder of WORKDIR/evaluations."
    flags.DEFINE_string("output", None, help_, flag_values=values)


def _evaluate(values: flags.FlagValues) -> str:
    workdir, config = cli.path(values, "workdir"), values.config
    progress = snapshots.read(workdir, values.step)
    output = Path(values.output or workdir / "evaluations" / _name(config, workdir, progress.position.step))
    if (output / "config.json").exists():
        raise UserError(f"--output={output} is the folder of a run, which would lose its own results; choose another.")
    return tables.console(evaluate_snapshot(config, workdir, progress, output), output)


def _name(config: ConfigDict, workdir: Path, step: int) -> str:
    """Of the folder for these results: one for each dataset."""
    own = config.dataset.to_dict() == workdirs.read(workdir).dataset.to_dict()
    digest = hashlib.sha256(config.dataset.to_json().encode()).hexdigest()[:8]
    return f"{config.dataset.name}{'' if own else f'_{digest}'}_step{step}"


def evaluate_snapshot(config: ConfigDict, workdir: Path, progress: Progress, output: Path) -> dict[str, Any]:
    """Evaluates what a run had learned by a step on the test images of `config.dataset`; writes ledger, tables
    and report.

    Returns:
        What results.json holds: those objects of the dataset that were learned, as if in one step, and under
        `unknown` whether the images of the others are found to be of none of them (`decisions.unknown_rates`).

    Raises:
        UserError: the dataset is at fault, or something cannot be written.
    """
    began, step = time.monotonic(), progress.position.step
    reader = readers.open_reader(config)
    store = inputs.open_store(config, reader, workdir)
    learned = [name for name in reader.objects if name in progress.calibration]
    if not learned:
        raise UserError(
            f"none of {', '.join(reader.objects)} was learned; name one of {', '.join(progress.calibration)} too."
        )
    tests = evaluation.tests(reader, reader.objects, lambda name: store.get(name, "test"))
    if not tests:
        raise UserError(f"there are no test images of {', '.join(reader.objects)}; add some.")
    for name in tests:  # what is at fault is told before anything is written
        store.prepare(name, "test")
    kept = history(ledgers.read(workdir / "ledger.jsonl"), step)
    ledger = _new_ledger(output)
    ledger.append("step", step=0, learned=learned)
    unknown = _judge(config, progress, tests, learned, ledger, output)
    ledger.append("snapshot", step=0, bytes=kept.bytes, memory_bytes=kept.memory_bytes)

    as_one_step = config.to_dict() | {"protocol": f"{len(learned)}-0"}
    found = results(as_one_step, history(ledgers.read(ledger.path)), time.monotonic() - began)
    found["unknown"] = unknown
    found["evaluated"] = {"workdir": str(workdir), "step": step, "learned": len(progress.calibration)}
    html.write(output, found, functools.partial(inputs.panels, store))
    tables.write_results(output, found)
    return found


def _judge(
    config: ConfigDict, progress: Progress, tests: Tests, learned: Sequence[str], ledger: Ledger, output: Path
) -> dict[str, Any]:
    """Judges all test images, writes what is found to the ledger and samples, and returns the rates of `unknown`."""
    model, quantile = evaluation.load(config, progress), config.decisions.quantile
    decided = decisions.describe(progress.calibration, quantile)
    decided["objects"] = {name: decided["objects"][name] for name in learned}
    decision_of, confidence_of = {}, {}
    judged: list[Judgement] = []
    for judgement in evaluation.judge(model, tests):
        name, own = judgement.object, judgement.decision
        if own is not None:
            decision_of[name] = own
            if judgement.prediction.object_logits is not None:
                confidence_of[name] = np.asarray(jax.nn.softmax(judgement.prediction.object_logits).max(-1))
        if name not in learned:
            continue
        if own is not None:
            number = list(progress.calibration).index(name)
            decided["objects"][name]["test"] = decisions.rates(own, judgement.truth, number)
        ledger.append("evaluation", step=0, object=name, method=judgement.method, **judgement.metrics)
        judged.append(judgement)
        if len(judged) == len(model.methods):
            samples.keep(output, 0, judged)
            judged = []
    unknown = decisions.unknown_rates(learned, decision_of, confidence_of)
    ledger.append("decisions", step=0, **decided)
    ledger.append("unknown", **unknown)
    return unknown


def _new_ledger(output: Path) -> Ledger:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: not a writable folder ({error.strerror}); choose another --output.") from error
    write_whole(output / "ledger.jsonl", b"")
    return Ledger(output / "ledger.jsonl")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
