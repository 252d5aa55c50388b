"""Steps that are added to a run after it began."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax import protocol
from iumad_jax.data import plan, readers
from iumad_jax.data.formats.files import select
from iumad_jax.errors import UserError
from iumad_jax.protocol import Act, Step
from iumad_jax.report import result_files
from iumad_jax.training.dataset_changes import new_images

_FIXED = {
    "dataset.objects": "use --objects",
    "dataset.prepared": "a run has one folder of prepared images",
    "train.optimizer": "config.continual.optimizer is that of all steps but the first",
}


def begun(workdir: Path) -> tuple[tuple[Step, ...], int]:
    """Return the steps of a run, and how many of them are finished, with results.

    Raises:
        UserError: If no step has begun.
    """
    results = result_files.read(workdir)
    if steps := plan.read(workdir):
        return steps, len(results["steps"]) if results else 0
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
    learned = set(itertools.chain.from_iterable(step.learned for step in steps[:finished]))
    selected = select(names, readers.available(changed), "--objects")
    known = [name for name in selected if name in learned]
    if known and (names != "all" or len(known) == len(selected)):
        raise UserError(
            f"the run has learned {', '.join(known)} already; add --update to learn further images of it, add the"
            f" images of a new object to {changed.dataset.root}, or name their folder with --config.dataset.root."
        )
    for step in steps[finished:]:
        if set(step.learned) & set(selected):
            _check_same_changes(step, changes)
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
    planned = _planned(steps[finished:], act, names, changes)
    objects, available = in_use(steps[: finished + len(planned)], names), readers.available(dataset)
    images: dict[str, dict[str, dict[str, str]]] = {name: {} for name in objects}
    if present := [name for name in objects if name in available]:
        reader = readers.open_reader(dataset, present)
        images |= {name: _chosen(act, new_images(workdir, steps, reader, name)) for name in present}
    if planned and not any(images.values()):
        return steps
    missing = [name for name, splits in images.items() if not splits]
    if (missing and names != "all") or len(missing) == len(images):
        kind = "training" if act == "update" else "good"
        raise UserError(
            f"{dataset.dataset.root} has no {kind} images of {', '.join(missing) or names} that the run has not used;"
            " add some, or name their dataset with --config.dataset.root."
        )
    images = {name: splits for name, splits in images.items() if splits}
    return (*steps, protocol.next_step(steps, tuple(images), changes, act, images))


def _chosen(act: Act, new: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return those of an object's new images that an update or calibration would use; may be empty."""
    if act == "update":
        return {split: images for split, images in new.items() if images} if new["train"] else {}
    split = "calibration" if new["calibration"] else "train"
    return {split: new[split]} if new[split] else {}


def _planned(steps: Sequence[Step], act: Act, names: str, changes: Mapping[str, Any]) -> list[Step]:
    """Return those of the unfinished steps that do something to the named objects.

    Raises:
        UserError: If they have other changes.
    """
    chosen = set(_split(names))
    found = [step for step in steps if step.act == act and (names == "all" or chosen & set(step.objects))]
    for step in found:
        _check_same_changes(step, changes)
    return found


def _check_same_changes(step: Step, changes: Mapping[str, Any]) -> None:
    """Raise UserError if a step that has begun has other changes."""
    if step.changes != changes:
        keys = " ".join(f"--config.{key}={value}" for key, value in step.changes.items()) or "without changed keys"
        raise UserError(f"the run has begun to {step.act} {', '.join(step.objects)} {keys}; finish it so first.")


def _split(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in names.split(",")))


def with_retired(steps: tuple[Step, ...], finished: int, names: str) -> tuple[Step, ...]:
    """Add a step that retires learned objects; a planned step that does the same is continued with.

    Raises:
        UserError: If an object is not learned or is retired already, or if none would remain.
    """
    if _planned(steps[finished:], "retire", names, {}):
        return steps
    objects = in_use(steps[:finished], names)
    if set(objects) == set(in_use(steps[:finished], "all")):
        raise UserError(f"--objects={names} would retire every object of the run; leave at least one.")
    return (*steps, protocol.next_step(steps, objects, {}, "retire"))


def with_restored(steps: tuple[Step, ...], finished: int, names: str) -> tuple[Step, ...]:
    """Add a step that takes retired objects back into use; a planned step that does the same is continued with.

    Raises:
        UserError: If an object is not retired.
    """
    if _planned(steps[finished:], "restore", names, {}):
        return steps
    retired, chosen = plan.retired(steps[:finished]), _split(names)
    for name in chosen:
        if name not in retired:
            remedy = f"choose any of {', '.join(sorted(retired))}" if retired else "no object is"
            raise UserError(f'"{name}" is not retired; {remedy}.')
    return (*steps, protocol.next_step(steps, chosen, {}, "restore"))


def in_use(steps: Sequence[Step], names: str = "all") -> tuple[str, ...]:
    """Return those of the named objects, separated by commas, that are learned and not retired.

    Raises:
        UserError: If a named object is not among them.
    """
    if not steps:
        raise UserError("the run is not finished yet; finish it with its first command, and then run this one again.")
    retired = plan.retired(steps)
    remaining = tuple(name for name in steps[-1].seen if name not in retired)
    chosen = remaining if names == "all" else _split(names)
    for name in chosen:
        if name in retired:
            raise UserError(f"{name} is retired; retire --undo takes it back into use.")
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
