"""What a ledger tells: which objects were learned when, every metric after every step, decisions and sizes."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from iumad_jax.report.tables import METRICS, summarise

Matrices = dict[str, Float[np.ndarray, "steps objects"]]  # by metric; NaN where not learned yet or undefined


class History(NamedTuple):
    """All that was measured in the steps that were finished."""

    steps: tuple[tuple[str, ...], ...]  # the objects learned at each
    matrices: dict[str, Matrices]  # by method, the run's own one first, then its baselines
    decisions: list[dict[str, Any]]  # after every step, of `inference.thresholds.describe` with test rates
    bytes: dict[str, int]  # by method: what it keeps
    strategy_bytes: int  # what the strategy against forgetting keeps beside that

    @property
    def objects(self) -> tuple[str, ...]:
        """The columns of the matrices, in the order of learning."""
        return sum(self.steps, ())


def history(events: Iterable[Mapping[str, Any]], last_step: int | None = None) -> History:
    """Derives everything from the events of a ledger; what an unfinished step has written counts for nothing.

    Args:
        events: in order.
        last_step: of those that count; by default all.
    """
    of_kind: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in ("step", "evaluation", "decisions", "snapshot")}
    for event in events:
        of_kind.get(event["event"], []).append(event)
    done = len(of_kind["snapshot"][: None if last_step is None else last_step + 1])  # each the last event of its step
    steps = tuple(tuple(event["learned"]) for event in of_kind["step"][:done])
    last: Mapping[str, Any] = of_kind["snapshot"][done - 1] if done else {"bytes": {}, "strategy_bytes": 0}
    objects: tuple[str, ...] = sum(steps, ())
    matrices: dict[str, Matrices] = {
        method: {metric: np.full((done, len(objects)), np.nan) for metric in METRICS} for method in last["bytes"]
    }
    for event in of_kind["evaluation"]:
        if event["step"] < done:
            for metric, matrix in matrices[event["method"]].items():
                value = event[metric]
                matrix[event["step"], objects.index(event["object"])] = np.nan if value is None else value
    decisions = [
        {key: value for key, value in event.items() if key not in ("event", "step")}
        for event in of_kind["decisions"][:done]
    ]
    return History(steps, matrices, decisions, last["bytes"], last["strategy_bytes"])


def results(config: Mapping[str, Any], history: History, seconds: float) -> dict[str, Any]:
    """What results.json holds (see `tables`): the run's own method and, as `baselines`, its baselines.

    Args:
        config: of the run.
        history: of its ledger.
        seconds: that it took.
    """
    by_method = {
        name: {"matrix": matrix, "summary": summarise(matrix), "bytes": history.bytes[name]}
        for name, matrix in history.matrices.items()
    }
    return {
        "config": config,
        "protocol": config["protocol"],
        "objects": list(history.objects),
        "steps": [list(step) for step in history.steps],
        **by_method.pop(config["method"]),
        "baselines": by_method,
        "strategy_bytes": history.strategy_bytes,
        "decisions": history.decisions,
        "seconds": seconds,
        "versions": {package: version(package) for package in ("iumad-jax", "jax", "flax", "optax", "numpy")},
    }
