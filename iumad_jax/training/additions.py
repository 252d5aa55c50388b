"""Steps that are added to a run after it began."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax import protocol
from iumad_jax.data import plan, readers
from iumad_jax.data.prepared import inventory
from iumad_jax.data.sample import Reader
from iumad_jax.errors import UserError
from iumad_jax.protocol import Act, Step
from iumad_jax.runtime import snapshots

_FIXED = {
    "dataset.objects": "use --objects",
    "dataset.prepared": "a run has one folder of prepared images",
    "train.optimizer": "config.continual.optimizer is that of all steps but the first",
}


def begun(workdir: Path) -> tuple[tuple[Step, ...], int]:
    """Return the steps of a run, and how many of them are finished.

    Raises:
        UserError: If no step has begun.
    """
    if steps := plan.read(workdir):
        return steps, snapshots.last_step(workdir) + 1
    raise UserError(f"{workdir} has no plan.json, so no step has begun; start the run again with its first command.")


def with_new(
    config: ConfigDict, steps: tuple[Step, ...], names: str, changes: Mapping[str, Any], finished: int
) -> tuple[Step, ...]:
    """Add one step for each new object to the steps of a run.

    Args:
        config: Config of the run.
        steps: Steps planned so far, at least one.
        names: "all" for all objects that the run has not learned, or names separated by commas.
        changes: Keys under `dataset` and `train` with other values than the run's, for these steps.
        finished: Number of finished steps. Objects of planned steps that are not finished are continued with.

    Raises:
        UserError: If a key cannot be changed, an object is learned already or does not exist, none is new, or an
            unfinished step has other changes.
    """
    changed = _checked(config, changes)
    changed.dataset.objects = names
    learned = set(itertools.chain.from_iterable(step.learned for step in steps[:finished]))
    selected = readers.objects(changed)
    known = [name for name in selected if name in learned]
    if known and (names != "all" or len(known) == len(selected)):
        raise UserError(
            f"the run has learned {', '.join(known)} already; add --update to learn further images of it, add the"
            f" images of a new object to {changed.dataset.root}, or name their folder with --config.dataset.root."
        )
    for step in steps[finished:]:
        if set(step.learned) & set(selected) and step.changes != changes:
            keys = " ".join(f"--config.{key}={value}" for key, value in step.changes.items()) or "without changed keys"
            raise UserError(f"the run has begun to learn {', '.join(step.learned)} {keys}; finish it so first.")
    return plan.with_objects(steps, [name for name in selected if name not in steps[-1].seen], changes)


def with_further(
    config: ConfigDict,
    workdir: Path,
    steps: tuple[Step, ...],
    finished: int,
    act: Act,
    names: str,
    changes: Mapping[str, Any],
) -> tuple[Step, ...]:
    """Add a step that updates or calibrates learned objects with images that the run has not used.

    Args:
        config: Config of the run.
        workdir: Workdir of the run.
        steps: Steps planned so far, at least one.
        finished: Number of finished steps. A planned step that does the same is continued with.
        act: "update", which learns from new training images, with new calibration images beside them, or "calibrate",
            which needs only calibration images; without any, it takes new training images.
        names: "all" for all objects that have such images, or names separated by commas.
        changes: Keys under `dataset` and `train` with other values than the run's, for this step.

    Raises:
        UserError: If a key cannot be changed, an object is not learned or is retired, or there are no new images.
    """
    dataset = _checked(config, changes)
    if _is_planned(steps[finished:], act, names):
        return steps
    objects, available = in_use(steps, names), readers.available(dataset)
    images: dict[str, dict[str, dict[str, str]]] = {name: {} for name in objects}
    if present := [name for name in objects if name in available]:
        reader = readers.open_reader(dataset, present)
        images |= {name: _new_images(workdir, steps, act, reader, name) for name in present}
    missing = [name for name, splits in images.items() if not splits]
    if (missing and names != "all") or len(missing) == len(images):
        kind = "training" if act == "update" else "good"
        raise UserError(
            f"{dataset.dataset.root} has no {kind} images of {', '.join(missing) or names} that the run has not used;"
            " add some, or name their dataset with --config.dataset.root."
        )
    images = {name: splits for name, splits in images.items() if splits}
    return (*steps, protocol.next_step(steps, tuple(images), changes, act, images))


def _new_images(workdir: Path, steps: Sequence[Step], act: Act, reader: Reader, name: str) -> dict[str, dict[str, str]]:
    """Return the digests of an object's images, by split, that an update or calibration would use; may be empty."""
    new = {}
    for split in ("train", "calibration"):
        used = [inventory.read(workdir)[name], *(step.images.get(name, {}) for step in steps)]
        known = set(itertools.chain.from_iterable(images.get(split, {}).values() for images in used))
        digests = inventory.digests(reader, name, split)
        new[split] = {id_: digest for id_, digest in digests.items() if digest not in known}
    if act == "update":
        return {split: images for split, images in new.items() if images} if new["train"] else {}
    split = "calibration" if new["calibration"] else "train"
    return {split: new[split]} if new[split] else {}


def _is_planned(steps: Sequence[Step], act: Act, names: str) -> bool:
    """Return whether one of the steps does something to the named objects."""
    return any(step.act == act and (names == "all" or set(step.objects) == set(_split(names))) for step in steps)


def _split(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",")))


def with_retired(steps: tuple[Step, ...], finished: int, names: str) -> tuple[Step, ...]:
    """Add a step that retires learned objects; a planned step that does the same is continued with.

    Raises:
        UserError: If an object is not learned or is retired already, or if none would remain.
    """
    if _is_planned(steps[finished:], "retire", names):
        return steps
    objects = in_use(steps, names)
    if set(objects) == set(in_use(steps, "all")):
        raise UserError(f"--objects={names} would retire every object of the run; leave at least one.")
    return (*steps, protocol.next_step(steps, objects, {}, "retire"))


def in_use(steps: Sequence[Step], names: str = "all") -> tuple[str, ...]:
    """Return those of the named objects, separated by commas, that are learned and not retired.

    Raises:
        UserError: If a named object is not among them.
    """
    retired = {name for step in steps if step.act == "retire" for name in step.objects}
    remaining = tuple(name for name in steps[-1].seen if name not in retired)
    chosen = remaining if names == "all" else _split(names)
    for name in chosen:
        if name in retired:
            raise UserError(f"{name} is retired; learn --after=STEP goes on from a step before that.")
        if name not in remaining:
            raise UserError(f'the run has not learned "{name}"; choose any of {", ".join(remaining)}.')
    return chosen


def _checked(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Return the changed config of a step, after checking that its keys can be changed."""
    for key in _FIXED.keys() & changes.keys():
        raise UserError(f"--config.{key} cannot be changed here; {_FIXED[key]}.")
    changed = plan.changed_config(config, changes)
    configs.check(changed)
    return changed
