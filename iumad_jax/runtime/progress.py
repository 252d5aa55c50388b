"""Where a run stands: exactly what a snapshot stores."""

from typing import Any, NamedTuple

import numpy as np

from iumad_jax.runtime.ledger import SHA256_OF_NOTHING
from iumad_jax.shapes import Calibration, StrategyState, Variables


class Position(NamedTuple):
    """How far a run is. Randomness and the order of the data are functions of this and the seed."""

    step: int
    updates: int  # done within the step
    finished: bool = False  # the step is trained and evaluated


class LedgerMark(NamedTuple):
    """How much of the ledger had been written, and its SHA-256."""

    lines: int
    sha256: str


class Progress(NamedTuple):
    """Everything that a run needs to go on, and a detector to work."""

    position: Position
    objects: tuple[str, ...]  # all objects of the run, in the order of learning, which is how they are numbered
    variables: dict[str, Variables]  # of the run's method and its baselines, by name; `frozen` ones are not stored
    frozen: dict[str, str]  # the SHA-256 of these, by the names of methods that have any
    recognition: Variables  # statistics of `recognition.observe`
    calibration: dict[str, Calibration]  # by object learned, after the last finished step: thresholds come from it
    optimizer: list[Any]  # the leaves of its state; empty between steps
    strategy_state: StrategyState  # what the strategy against forgetting keeps
    losses: dict[str, np.ndarray]  # of the updates of an epoch that is not finished
    ledger: LedgerMark
    seconds: float  # that the run took so far
    inputs: dict[str, Any]  # JSON: how a detector prepares images, see `Store.describe`


BEGINNING = Progress(
    position=Position(-1, 0, finished=True),
    objects=(),
    variables={},
    frozen={},
    recognition={},
    calibration={},
    optimizer=[],
    strategy_state={},
    losses={},
    ledger=LedgerMark(0, SHA256_OF_NOTHING),
    seconds=0.0,
    inputs={},
)
