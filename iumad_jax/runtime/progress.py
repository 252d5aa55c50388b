"""Progress of a run: the content of a snapshot."""

from typing import Any, NamedTuple

import numpy as np

from iumad_jax.runtime.ledger import SHA256_OF_NOTHING
from iumad_jax.shapes import Calibration, Scales, StrategyState, Variables


class Position(NamedTuple):
    """Position within a run. Randomness and the order of the data depend only on the position and the seed."""

    step: int
    updates: int  # number of updates made within the step
    finished: bool = False  # whether the step is trained and evaluated


class LedgerMark(NamedTuple):
    """Number of lines in the ledger when a snapshot is taken, and their SHA-256."""

    lines: int
    sha256: str


class Progress(NamedTuple):
    """Everything that is needed to resume a run or to load a detector."""

    position: Position
    objects: tuple[str, ...]  # objects of all steps begun so far, numbered in the order of learning
    variables: dict[str, Variables]  # by method, baselines included; `frozen` ones are not stored
    frozen: dict[str, str]  # SHA-256 of the frozen variables, by method that has any
    recognition: Variables  # statistics of `recognition.add_object`
    scales: dict[str, Scales]  # by method, for the objects learned up to the last finished step
    calibration: dict[str, Calibration]  # by learned object, as of the last finished step; determines the thresholds
    kept: dict[str, dict[str, Any]]  # by learned object: JSON that identifies its calibration images, see `kept`
    optimizer: list[Any]  # leaves of the optimiser's state; empty between steps
    strategy_state: StrategyState  # state of the strategy against forgetting
    losses: dict[str, np.ndarray]  # losses per update of an unfinished epoch
    ledger: LedgerMark
    seconds: float  # run time so far
    inputs: dict[str, Any]  # JSON: preprocessing settings for a detector, see `Store.describe`

    @property
    def retired(self) -> tuple[int, ...]:
        """Numbers of the objects that are no longer recognised."""
        return tuple(number for number, object_ in enumerate(self.calibration.values()) if object_.retired)


BEGINNING = Progress(
    position=Position(-1, 0, finished=True),
    objects=(),
    variables={},
    frozen={},
    recognition={},
    scales={},
    calibration={},
    kept={},
    optimizer=[],
    strategy_state={},
    losses={},
    ledger=LedgerMark(0, SHA256_OF_NOTHING),
    seconds=0.0,
    inputs={},
)
