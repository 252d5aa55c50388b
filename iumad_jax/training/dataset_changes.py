"""Compares a dataset with the objects and images that a run has used."""

import functools
import itertools
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
from iumad_jax.errors import UserError
from iumad_jax.protocol import Step
from iumad_jax.runtime import live
from iumad_jax.runtime.progress import Progress


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

    Objects that were updated or calibrated with images of another dataset are left out.
    """
    used = inventory.read(workdir)
    learned = {name: step for step in steps for name in step.learned}
    for step in steps:
        for name in step.images.keys() & used.keys():
            if plan.is_same_dataset(step, learned[name]):
                for split, images in step.images[name].items():
                    used[name].setdefault(split, {}).update(images)
            else:
                del used[name]
    return used


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
    present = [name for name in noted if not isinstance(reader_of(store.reader, name), Absent)]
    position = progress.position
    in_training = strategy.objects(steps[position.step]) if position.step >= 0 and not position.finished else ()
    for name, split in itertools.product(present, inventory.SPLIT_NAMES):
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
            if present := [name for name in names if name in noted and name not in (*found.gone, *found.renamed)]:
                store = open_store(dataset, readers.open_reader(dataset, present), workdir)
                messages += inventory.exchange_messages({name: noted[name] for name in names if name in noted}, store)
                pairs = itertools.product(present, inventory.SPLIT_NAMES)
                changes = (inventory.changed_images(noted, store, name, split) for name, split in pairs)
                messages += [f"{change} since the run used them." for change in changes if change]
                pairs = itertools.product(present, ("train", "calibration"))
                more = {name for name, split in pairs if set(store.reader.ids(name, split)) - set(noted[name][split])}
                if more:
                    flags = f"--update --workdir={workdir} --objects={','.join(sorted(more))}"
                    messages.append(f"Learn the added images with python -m iumad_jax.learn {flags}.")
    except UserError as error:
        messages.append(str(error))
    return " ".join(messages)
