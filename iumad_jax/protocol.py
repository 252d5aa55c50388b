"""Which objects are learned when."""

import re
from dataclasses import dataclass

from iumad_jax.errors import UserError


@dataclass(frozen=True)
class Step:
    """One incremental step: training sees only the objects it learns, evaluation all seen so far."""

    index: int
    learned: tuple[str, ...]
    seen: tuple[str, ...]


def steps(protocol: str, objects: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps of "X-Y": X base objects, then Y new ones per step until all are learned; "X-0" is one step.

    Raises:
        UserError: the text is not two numbers, or they do not divide the objects.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", protocol)
    if not match:
        raise UserError(
            f'protocol "{protocol}" is not of the form X-Y (base objects, new objects per step), such as 6-1.'
        )
    base, new = map(int, match.groups())
    rest = len(objects) - base
    if base < 1 or rest < 0 or (rest % new if new else rest):
        raise UserError(
            f"protocol {protocol} does not fit {len(objects)} objects: X must be 1 to {len(objects)} and Y must divide"
            f" the objects that remain after X (or be 0 when none remain); {len(objects)}-0 always fits."
        )
    ends = [base, *range(base + new, len(objects) + 1, new)] if new else [base]
    starts = [0, *ends[:-1]]
    return tuple(Step(i, objects[a:b], objects[:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True)))
