"""Protocols: the order in which a run learns its objects."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from iumad_jax.errors import UserError, counted

OPEN = "open"  # the protocol of runs that learn every object that the dataset has, or will have, one per step


Act = Literal["learn", "update", "calibrate", "retire", "restore"]  # update: learn further images of learned objects
Images = Mapping[str, Mapping[str, Mapping[str, str]]]  # digests by object, split and image id


@dataclass(frozen=True)
class Step:
    """A step of a run."""

    index: int
    objects: tuple[str, ...]  # objects that the step learns, updates, calibrates, retires or takes back into use
    seen: tuple[str, ...]  # objects learned so far, including those of this step
    changes: Mapping[str, Any] = field(default_factory=dict)  # config keys whose values differ from the run's
    act: Act = "learn"
    images: Images = field(default_factory=dict)  # the new images of an update or calibration

    @property
    def learned(self) -> tuple[str, ...]:
        """Objects that the step learns for the first time."""
        return self.objects if self.act == "learn" else ()

    @property
    def new_images(self) -> int:
        """Number of new images of an update or calibration."""
        return sum(len(images) for splits in self.images.values() for images in splits.values())

    @property
    def trained(self) -> tuple[str, ...]:
        """Objects whose images the step learns from."""
        return self.objects if self.act in ("learn", "update") else ()


def steps(protocol: str, objects: tuple[str, ...]) -> tuple[Step, ...]:
    """Split the objects into the steps of a protocol "X-Y", or "open", which has one step for each object.

    The base step learns X objects and each later step Y new ones until all are learned; "X-0" has only the base step.

    Raises:
        UserError: If the protocol is neither, or the objects cannot be split accordingly.
    """
    match = re.fullmatch(r"(\d+)-(\d+)", "1-1" if protocol == OPEN else protocol)
    if not match:
        raise UserError(
            f'the protocol is "{protocol}"; use the form X-Y (base objects, new objects per step), such as 6-1, or'
            " open."
        )
    base, new = map(int, match.groups())
    remaining = len(objects) - base
    if base < 1 or remaining < 0 or (remaining % new if new else remaining):
        raise UserError(
            f"protocol {protocol} does not fit {counted(len(objects), 'objects')}: X must be 1 to {len(objects)} and Y"
            f" must divide the number of remaining objects (or be 0 if none remain); {len(objects)}-0 always fits."
        )
    ends = [base, *range(base + new, len(objects) + 1, new)] if new else [base]
    starts = [0, *ends[:-1]]
    return tuple(Step(i, objects[a:b], objects[:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True)))


def next_step(
    steps: Sequence[Step],
    objects: tuple[str, ...],
    changes: Mapping[str, Any],
    act: Act = "learn",
    images: Images | None = None,
) -> Step:
    """Return the step that follows others."""
    seen = steps[-1].seen if steps else ()
    return Step(len(steps), objects, seen + objects if act == "learn" else seen, changes, act, images or {})
