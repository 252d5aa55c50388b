"""How a dataset differs from what a run used: names, images, and what a finished run has not used."""

import itertools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax import protocol
from iumad_jax.continual.strategy import Strategy
from iumad_jax.data import readers
from iumad_jax.data.prepared import inventory
from iumad_jax.data.prepared.inventory import Inventory, Names
from iumad_jax.data.prepared.store import Store, open_store
from iumad_jax.errors import UserError
from iumad_jax.runtime import live
from iumad_jax.runtime.progress import Progress


class DatasetChanged(UserError):
    """The run is finished, but the dataset holds what it has not used."""

    def __init__(self, sentence: str, finished: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.results = finished  # what results.json holds


def compare_names(config: ConfigDict, noted: Inventory) -> Names:
    """How the dataset's objects differ from those that a run knows; new ones count if the config chooses all."""
    names = Names.of(noted, readers.available(config), lambda chosen: readers.open_reader(config, chosen))
    return names if config.dataset.objects == "all" else names._replace(new=())


def check_images(
    noted: Inventory,
    store: Store,
    strategy: Strategy,
    steps: tuple[protocol.Step, ...],
    progress: Progress,
    workdir: Path,
) -> None:
    """Compares the dataset with what the run used, and tells what has changed.

    Raises:
        UserError: the run cannot go on: objects were exchanged, or training images have changed that are still needed
            as they were.
    """
    if progress.objects != steps[-1].seen:
        raise UserError(
            f"{workdir}: this run learns {', '.join(progress.objects)}, but {', '.join(steps[-1].seen)} are chosen now;"
            " choose the same objects, or start another --workdir."
        )
    if told := inventory.exchanged(noted, store):
        raise UserError(" ".join(told))
    position = progress.position
    half_done = strategy.objects(steps[position.step]) if position.step >= 0 and not position.finished else ()
    for name, split in itertools.product(noted, inventory.SPLITS):
        change = inventory.changed_images(noted, store, name, split)
        if change is None:
            continue
        learned = split == "train" and name in progress.calibration
        if split == "train" and name in half_done:
            raise UserError(
                f"{change} while step {position.step} is half done with them; undo that, or remove"
                f" {workdir / 'snapshots_within_step'} to begin this step again."
            )
        if learned and not (strategy.incremental and store.reader.ids(name, "calibration")):
            why = "its thresholds come from" if strategy.incremental else "later steps train on"
            raise UserError(
                f"{change} since the run learned it, and {why} them; undo that, or start another --workdir."
            )
        live.log(f"{change}; {'the run has learned it as it was' if learned else 'it goes on with what is there now'}.")


def unused(config: ConfigDict, workdir: Path) -> str:
    """What the dataset holds that a finished run has not used, or holds no longer, in sentences; "" if it is the same.

    Nothing can be compared where the dataset is not there any more, which is told.
    """
    noted, told = inventory.read(workdir), []
    if not Path(config.dataset.root).is_dir():
        live.log(f"{workdir}: {config.dataset.root} is not there any more, so nothing tells whether it has changed.")
        return ""
    try:
        names = compare_names(config, noted)
        told += names.missing() + names.unlearned()
        if there := [name for name in noted if name not in (*names.gone, *names.renamed)]:
            store = open_store(config, readers.open_reader(config, there), workdir)
            told += inventory.exchanged(noted, store)
            pairs = itertools.product(there, inventory.SPLITS)
            changes = (inventory.changed_images(noted, store, name, split) for name, split in pairs)
            told += [f"{change} since it was used." for change in changes if change]
    except UserError as error:
        told.append(str(error))
    return " ".join(told)
