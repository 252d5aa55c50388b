"""Derives a run's history from its ledger: objects and metrics of every step, decisions and sizes."""

import itertools
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from iumad_jax.errors import UserError
from iumad_jax.metrics import interval_of_mean
from iumad_jax.report import effects
from iumad_jax.report.tables import METRICS, summarise
from iumad_jax.runtime.ledger import read

HEADERS = ("step", "finished (UTC)", "images", "what it did", "largest other change", "mean of all", "changed keys")
_KINDS = ("step", "before", "evaluation", "decisions", "snapshot")

Matrices = dict[str, Float[np.ndarray, "steps objects"]]  # by metric; NaN where not yet learned or undefined
Intervals = dict[str, dict[str, Any]]  # by metric: see `result_files`
Kinds = dict[str, dict[str, float | None]]  # by kind of defect: see `evaluation.Judgement.kinds`


class History(NamedTuple):
    """Measurements of all finished steps."""

    steps: tuple[tuple[str, ...], ...]  # objects learned at each step
    acts: list[dict[str, Any]]  # by step: `act`, `objects` and, before an update or calibration, `before` by object
    tested: dict[str, int]  # by object: the step after which it was tested last, if its maps may have changed since
    matrices: dict[str, Matrices]  # by method: the run's method first, then its baselines
    intervals: dict[str, Intervals]  # by method
    kinds: dict[str, dict[str, Kinds]]  # by method and object, after its last test
    decisions: list[dict[str, Any]]  # by step: `inference.thresholds.describe`, with test rates
    bytes: dict[str, int]  # by method: bytes that it stores
    strategy_bytes: int  # bytes that the strategy stores in addition

    @property
    def objects(self) -> tuple[str, ...]:
        """Columns of the matrices, in the order of learning."""
        return sum(self.steps, ())


def history(events: Iterable[Mapping[str, Any]], last_step: int | None = None) -> History:
    """Collect the events of finished steps; events of an unfinished step are ignored.

    Objects that a step did not test keep the values of their last test.

    Args:
        events: Events of a ledger, in order.
        last_step: Last step to include; None includes all finished steps.
    """
    by_kind: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in _KINDS}
    for event in events:
        by_kind.get(event["event"], []).append(event)
    count = len(by_kind["snapshot"][: None if last_step is None else last_step + 1])  # the last event of each step
    begun = by_kind["step"][:count]
    steps = tuple(tuple(event["objects"]) if event["act"] == "learn" else () for event in begun)
    last: Mapping[str, Any] = by_kind["snapshot"][count - 1] if count else {"bytes": {}, "strategy_bytes": 0}
    objects: tuple[str, ...] = sum(steps, ())
    matrices: dict[str, Matrices] = {
        method: {metric: np.full((count, len(objects)), np.nan) for metric in METRICS} for method in last["bytes"]
    }
    for event in by_kind["evaluation"]:
        if event["step"] < count:
            for metric, matrix in matrices[event["method"]].items():
                value = event[metric]
                matrix[event["step"], objects.index(event["object"])] = np.nan if value is None else value
    for matrix in itertools.chain.from_iterable(by_metric.values() for by_metric in matrices.values()):
        for before, row in itertools.pairwise(matrix):  # objects that were not tested again keep their last values
            row[:] = np.where(np.isnan(row), before, row)
    last_evaluations = {(e["method"], e["object"]): e for e in by_kind["evaluation"] if e["step"] < count}
    intervals = {
        method: _intervals(matrix, [last_evaluations.get((method, name)) for name in objects])
        for method, matrix in matrices.items()
    }
    kinds: dict[str, dict[str, Kinds]] = {method: {} for method in matrices}
    for (method, name), event in last_evaluations.items():
        kinds[method][name] = event.get("kinds", {})  # missing in ledgers of older versions
    decisions = [
        {key: value for key, value in event.items() if key not in ("event", "step")}
        for event in by_kind["decisions"][:count]
    ]
    for before_step, after_step in itertools.pairwise(decisions):
        for name, record in before_step["objects"].items():
            if "test" in record:
                after_step["objects"][name].setdefault("test", record["test"])
    acts = [{"act": event["act"], "objects": list(event["objects"]), "before": {}} for event in begun]
    for event in by_kind["before"]:
        if event["step"] < count:
            values = {key: value for key, value in event.items() if key not in ("event", "step", "object")}
            acts[event["step"]]["before"][event["object"]] = values
    changed = max((step for step, event in enumerate(begun) if event["act"] in ("learn", "update")), default=0)
    last_tests = {name: event["step"] for (_, name), event in last_evaluations.items()}
    tested = {name: step for name, step in last_tests.items() if step < changed}
    return History(steps, acts, tested, matrices, intervals, kinds, decisions, last["bytes"], last["strategy_bytes"])


def _intervals(matrices: Matrices, evaluations: Sequence[Mapping[str, Any] | None]) -> Intervals:
    """Collect the intervals of all objects after the last step from their evaluations, None without test images."""
    intervals = {}
    for metric, matrix in matrices.items():
        ends = [[None, None] if event is None else event["intervals"][metric] for event in evaluations]
        errors = [None if event is None else event["standard_errors"][metric] for event in evaluations]
        mean = interval_of_mean(matrix[-1], np.array(errors, float))
        intervals[metric] = {"objects": np.array(ends, float), "mean": mean}
    return intervals


def results(config: Mapping[str, Any], history: History, seconds: float) -> dict[str, Any]:
    """Assemble the content of results.json, see `result_files`.

    Args:
        config: Config of the run.
        history: History of the run's ledger.
        seconds: Run time.
    """
    following = [act["act"] for act in history.acts[1:]] + ["learn"]
    ends = [step for step, act in enumerate(following) if act in ("learn", "update")]  # others train nothing
    by_method = {
        name: {
            "matrix": matrix,
            "summary": summarise({metric: np.asarray(rows)[ends] for metric, rows in matrix.items()}),
            "intervals": history.intervals[name],
            "kinds": history.kinds[name],
            "bytes": history.bytes[name],
        }
        for name, matrix in history.matrices.items()
    }
    return {
        "config": config,
        "protocol": config["protocol"],
        "objects": list(history.objects),
        "steps": [list(step) for step in history.steps],
        "acts": history.acts,
        "tested": history.tested,
        **by_method.pop(config["method"]),
        "baselines": by_method,
        "strategy_bytes": history.strategy_bytes,
        "decisions": history.decisions,
        "seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("iumad-jax", "jax", "flax", "optax", "numpy")},
        },
    }


def table_of_steps(method: str, workdir: Path) -> str:
    """Format a table of a run's finished steps.

    Args:
        method: Method of the run.
        workdir: Workdir of the run.

    Raises:
        UserError: If the ledger cannot be read, or no step is finished.
    """
    measured = history(read(workdir / "ledger.jsonl"))
    if not measured.steps:
        raise UserError(f"{workdir}: no step is finished yet; let the run finish its first step.")
    rows = rows_of_steps(workdir, measured.matrices[method]["i_auroc"], measured.acts, measured.decisions)
    return tabulate(rows, HEADERS, "github", disable_numparse=True)


def rows_of_steps(
    workdir: Path, matrix: Any, acts: Sequence[dict[str, Any]], decisions: Sequence[dict[str, Any]]
) -> list[list[str]]:
    """Describe each finished step of a run under `HEADERS`; for the other arguments see `effects.effect`.

    Raises:
        UserError: If the ledger cannot be read.
    """
    begun = [event for event in read(workdir / "ledger.jsonl") if event["event"] == "step"]
    live = read(workdir / "live.jsonl") if (workdir / "live.jsonl").exists() else []
    ends = {event["step"]: event["time"] for event in live if event["event"] == "snapshot"}
    rows = []
    for step in range(len(acts)):
        changes = " ".join(f"{key}={value}" for key, value in begun[step]["changes"].items())
        time = ends.get(step, "")[:16].replace("T", " ")
        effect = effects.effect(matrix, acts, decisions, step)
        rows.append([str(step), time, str(begun[step]["images"]), *effect, changes or "-"])
    return rows
