"""Compares a dataset with the objects and images that a run has used."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax.continual.strategy import Strategy
from iumad_jax.data import plan, readers
from iumad_jax.data.prepared import inventory
from iumad_jax.data.prepared.inventory import Inventory, NameChanges
from iumad_jax.data.prepared.store import Store, open_store
from iumad_jax.data.readers.joined import Absent, reader_of
from iumad_jax.data.sample import Reader, Split
from iumad_jax.errors import UserError
from iumad_jax.protocol import Step
from iumad_jax.runtime import live
from iumad_jax.runtime.progress import Progress

GOOD: tuple[Split, ...] = ("train", "calibration")


class DatasetChanged(UserError):
    """Error for a finished run whose dataset has changed since."""

    def __init__(self, message: str, results: dict[str, Any]) -> None:
        super().__init__(message)
        self.results = results  # content of results.json


def compare_names(config: ConfigDict, noted: Inventory, steps: Sequence[Step]) -> list[NameChanges]:
    """Compare the names of the objects of each of a run's datasets with those of the run.

    New objects are reported only in the dataset of the config, if it selects all objects.
    """
    compared, own = [], config.dataset.objects == "all"
    for dataset, names in plan.datasets(config, steps):
        recorded = {name: noted[name] for name in names if name in noted}
        if recorded and not Path(dataset.dataset.root).is_dir() and dataset.dataset.name == "folder":
            compared.append(NameChanges(tuple(recorded), {}, ()))
            continue
        available = [name for name in readers.available(dataset) if name in recorded or name not in noted]
        changes = NameChanges.compare(recorded, available, functools.partial(readers.open_reader, dataset))
        is_own = own and dataset.dataset == config.dataset
        compared.append(changes if is_own else changes._replace(new=()))
        own = own and not is_own  # reported once
    return compared


def used_images(workdir: Path, steps: Sequence[Step]) -> Inventory:
    """Return the inventory of a run, including the new images of its updates and calibrations.

    Without test images of objects that may be tested on those of another dataset.
    """
    used = inventory.read(workdir)
    learned = {name: step for step in steps for name in step.learned}
    for step in steps:
        for name in step.images.keys() & used.keys():
            if plan.is_same_dataset(step, learned[name]):
                for split, images in step.images[name].items():
                    used[name].setdefault(split, {}).update(images)
            else:
                used[name].pop("test", None)
    return used


def new_images(workdir: Path, steps: Sequence[Step], reader: Reader, name: str) -> dict[str, dict[str, str]]:
    """Return the digests of a learned object's training and calibration images that the run has not used."""
    used = [inventory.read(workdir).get(name, {}), *(step.images.get(name, {}) for step in steps)]
    known = {digest for images in used for split in GOOD for digest in images.get(split, {}).values()}
    new: dict[str, dict[str, str]] = {}
    for split in GOOD:
        found = inventory.digests(reader, name, split)
        new[split] = {id_: digest for id_, digest in found.items() if digest not in known}
    return new


def check_new_images(reader: Reader, step: Step) -> None:
    """Check that the new images of an update or calibration are there, unchanged.

    Raises:
        UserError: If they are not.
    """
    for name, splits in step.images.items():
        for split in GOOD:
            found = inventory.digests(reader, name, split)
            lost = [id_ for id_, digest in splits.get(split, {}).items() if found.get(id_) != digest]
            if lost:
                raise UserError(
                    f"step {step.index} has begun to {step.act} {name}, but {len(lost)} of its new images are missing"
                    f" or changed ({', '.join(lost[:5])}); restore them, or go on from before with learn --after."
                )


def check_images(
    noted: Inventory,
    store: Store,
    strategy: Strategy,
    steps: tuple[Step, ...],
    progress: Progress,
    workdir: Path,
) -> None:
    """Compare the dataset with the inventory that an unfinished run has noted, and log harmless changes.

    Raises:
        UserError: If the run cannot continue because objects were exchanged, or because training images that it still
            needs were changed.
    """
    if progress.objects != steps[-1].seen[: len(progress.objects)]:
        raise UserError(
            f"{workdir}: this run has learned {', '.join(progress.objects)}, but its plan.json begins with"
            f" {', '.join(steps[-1].seen)}; restore plan.json from a backup, or choose another --workdir."
        )
    if messages := inventory.exchange_messages(noted, store):
        raise UserError(" ".join(messages))
    position = progress.position
    within = steps[position.step] if position.step >= 0 and not position.finished else None
    in_training = strategy.objects(within) if within and not within.images else ()
    for name, split in ((name, split) for name in noted for split in inventory.SPLIT_NAMES if split in noted[name]):
        if isinstance(reader_of(store.reader, name, split), Absent):
            continue
        change = inventory.changed_images(noted, store, name, split)
        if change is None:
            continue
        learned = split != "test" and name in progress.calibration
        if split == "train" and name in in_training:
            raise UserError(
                f"{change} in the middle of step {position.step}, which trains on them; undo the change, or remove"
                f" {workdir / 'snapshots_within_step'} to restart the step."
            )
        if learned and split == "train" and not strategy.incremental:
            raise UserError(
                f"{change} since the run learned this object, and later steps train on these images; undo the change,"
                " or choose another --workdir."
            )
        consequence = "the run has learned the earlier images" if learned else "the run continues with the current ones"
        live.log(f"{change}; {consequence}.")


def describe_changes(config: ConfigDict, workdir: Path, new_objects: bool = True) -> str:
    """Describe how the dataset differs from what a finished run has used.

    A missing dataset cannot be compared, which is logged and not counted as a change. Objects that the run has not
    learned count only if `new_objects` is True.

    Returns:
        One sentence per change; "" if nothing has changed.
    """
    steps, messages = plan.read(workdir), []
    noted = used_images(workdir, steps)
    try:
        for (dataset, names), found in zip(
            plan.datasets(config, steps), compare_names(config, noted, steps), strict=True
        ):
            if not Path(dataset.dataset.root).is_dir():
                live.log(f"{workdir}: {dataset.dataset.root} no longer exists, so its changes cannot be detected.")
                continue
            for name in found.gone:
                live.log(f"{name} is no longer in {dataset.dataset.root}; it is judged on images that the run kept.")
            messages += found._replace(gone=()).missing_messages()
            messages += found.new_object_messages(workdir) if new_objects else []
            in_use = [name for name in names if name not in plan.retired(steps)]
            if present := [name for name in in_use if name in noted and name not in (*found.gone, *found.renamed)]:
                store = open_store(dataset, readers.open_reader(dataset, present), workdir)
                messages += inventory.exchange_messages({name: noted[name] for name in names if name in noted}, store)
                more: dict[str, list[str]] = {"learn --update": [], "calibrate": []}
                tested = False
                for name in present:
                    splits = [split for split in inventory.SPLIT_NAMES if split in noted[name]]
                    changes = {split: inventory.changed_images(noted, store, name, split) for split in splits}
                    messages += [f"{change} since the run used them." for change in changes.values() if change]
                    tested |= bool(changes.get("test"))
                    new = new_images(workdir, steps, store.reader, name) if any(changes.values()) else {}
                    if any(new.values()):
                        more["learn --update" if new["train"] else "calibrate"].append(name)
                own_flags = plan.dataset_flags(config, dataset)
                messages += [
                    f"For the new images, run python -m iumad_jax.{command} --workdir={workdir}"
                    f" {' '.join((f'--objects={chr(44).join(objects)}', *own_flags))}."
                    for command, objects in more.items()
                    if objects
                ]
                if tested:
                    flags = " ".join((f"--workdir={workdir}", *own_flags))
                    messages.append(f"For the test images, run python -m iumad_jax.evaluate {flags}.")
    except UserError as error:
        messages.append(str(error))
    return " ".join(messages)
