"""Tells what each step of a run did to its own objects and to those learned before."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from iumad_jax.metrics import final
from iumad_jax.report import tables


class Effect(NamedTuple):
    """What a step did, in I-AUROC; "-" where undefined."""

    outcome: str  # what became of the step's objects; their thresholds where test images do not tell
    change: str  # of the other object that changed most; "" without one
    mean: str  # of all objects learned so far


def effect(matrix: Any, acts: Sequence[dict[str, Any]], decisions: Sequence[dict[str, Any]], step: int) -> Effect:
    """Measure what a step did to its own objects and to those learned before.

    Args:
        matrix: I-AUROC of every object after every step; NaN or None where undefined.
        acts: What was done at each step, see `result_files`.
        decisions: Thresholds and rates of each step, see `result_files`.
        step: Number of the step.
    """
    learned = [name for act in acts[: step + 1] if act["act"] == "learn" for name in act["objects"]]
    values, act = np.asarray(matrix, float)[: step + 1, : len(learned)], acts[step]
    after = dict(zip(learned, values[step], strict=True))
    records = [record["objects"] for record in decisions[max(step - 1, 0) : step + 1]]  # before and after the step
    outcome = ", ".join(_outcome(name, act, after[name], records) for name in act["objects"])
    others = [column for column, name in enumerate(learned) if name not in act["objects"]]
    changes, change = values[step, others] - values[step - 1, others], ""
    if act["act"] in ("learn", "update") and np.isfinite(changes).any():
        largest = int(np.nanargmax(np.abs(changes)))
        change = f"{learned[others[largest]]} {changes[largest]:+.3f}"
    done = "learned" if act["act"] == "learn" else f"{act['act']}d"  # updated, calibrated, retired or restored
    return Effect(f"{done} {outcome}", change, tables.cell(final(values)))


def _outcome(name: str, act: dict[str, Any], value: float, records: Sequence[dict[str, Any]]) -> str:
    """Describe what became of an object: its I-AUROC or threshold, with what this and error rates were before."""
    if act["act"] == "retire":
        return name
    if (before := act["before"].get(name)) is None:
        thresholds = " to ".join(tables.cell(known[name]["image"]["threshold"]) for known in records if name in known)
        return f"{name} (threshold {thresholds})" if tables.undefined(value) else f"{name} {tables.cell(value)}"
    rates = records[-1][name].get("test", {})
    changes = [f"{name} {tables.cell(before['i_auroc'])} to {tables.cell(value)}"]
    for rate in ("false_alarms", "misses"):
        changes.append(f"{tables.RATES[rate]} {tables.percent(before[rate])} to {tables.percent(rates.get(rate))}")
    return f"{changes[0]} ({', '.join(changes[1:])})"


def in_one_line(matrix: Any, acts: Sequence[dict[str, Any]], decisions: Sequence[dict[str, Any]], step: int) -> str:
    """Format `effect` in one line."""
    outcome, change, mean = effect(matrix, acts, decisions, step)
    others = f"; largest change of another object: {change}" if change else ""
    of_all = "" if mean == "-" else f"; mean of all {mean} (I-AUROC)"
    return f"step {step}: {outcome}{others}{of_all}"
