"""Inventory of the dataset that a run used, stored as `dataset.json` in the workdir, and later changes to it."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from iumad_jax.data.prepared import records
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.sample import Reader, Split
from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import write_whole

Images = dict[str, str | None]  # digest of the image files by id; None until the run has used the image
Inventory = dict[str, dict[str, Images]]  # images by object and split

SPLIT_NAMES: dict[Split, str] = {"train": "training", "calibration": "validation", "test": "test"}  # names in messages
_SHOWN = 5  # largest number of names in a message


def read(workdir: Path) -> Inventory:
    """Read the inventory of the run in a workdir; it is empty if no run has begun there.

    Raises:
        UserError: If the file is damaged or cannot be read.
    """
    file = workdir / "dataset.json"
    try:
        inventory = json.loads(file.read_bytes())
        if not all(
            isinstance(digest, str | None)
            for splits in inventory.values()
            for images in splits.values()
            for digest in images.values()
        ):
            raise ValueError("a digest is not a string")
        return inventory
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not a dataset inventory ({error}); restore it from a backup, or choose another --workdir."
        ) from error


def record_images(workdir: Path, store: Store, objects: Iterable[str], splits: Sequence[Split]) -> None:
    """Record the current images of objects and splits as used by the run.

    Raises:
        UserError: If the inventory cannot be written, or an image cannot be read.
    """
    reader = store.reader
    new: Inventory = {
        name: {split: dict.fromkeys(reader.ids(name, split)) for split in SPLIT_NAMES} for name in reader.objects
    }
    inventory = new | read(workdir)
    for name in objects:
        for split in splits:
            inventory[name][split] = {**store.digests(name, split)}
    write(workdir, inventory)


def write(workdir: Path, inventory: Inventory) -> None:
    """Write the inventory of a run.

    Raises:
        UserError: If it cannot be written.
    """
    write_whole(workdir / "dataset.json", json.dumps(inventory, indent=1).encode())


class NameChanges(NamedTuple):
    """Differences between the object names of a dataset and those of a run."""

    gone: tuple[str, ...]  # objects of the run that the dataset no longer holds
    renamed: dict[str, str]  # new name by name in the run
    new: tuple[str, ...]  # objects that the run does not have

    @classmethod
    def compare(
        cls, inventory: Inventory, present: Sequence[str], open_reader: Callable[[Sequence[str]], Reader]
    ) -> "NameChanges":
        """Compare names; an object counts as renamed if one of its training images is found under a new name.

        Args:
            inventory: Inventory of the run.
            present: Objects that the dataset holds now.
            open_reader: Function that opens a reader for the named objects.
        """
        new = [name for name in present if name not in inventory]
        absent = {name: _inventory_digests(inventory, name) for name in inventory if name not in present}
        digests_of_new = {name: _read_digests(open_reader, name) for name in new if any(absent.values())}
        renamed: dict[str, str] = {}
        for name, digests in absent.items():
            candidates = [other for other, found in digests_of_new.items() if digests & found]
            renamed |= {name: candidates[0]} if candidates else {}
        gone = tuple(name for name in inventory if name not in present and name not in renamed)
        return cls(gone, renamed, tuple(name for name in new if name not in renamed.values()))

    def missing_messages(self) -> list[str]:
        """Describe each object that the dataset no longer holds under its name, one sentence per object."""
        return [
            *(
                f"{name} was renamed to {new_name}; rename it back to {name}, its name in this run."
                for name, new_name in self.renamed.items()
            ),
            *(
                f"{name} is missing, but belongs to this run; restore it, or choose another --workdir."
                for name in self.gone
            ),
        ]

    def new_object_messages(self, workdir: Path) -> list[str]:
        """Describe the objects that the run does not have, in a single sentence; empty if there are none."""
        if not self.new:
            return []
        return [
            f"The dataset also holds {_shortened(self.new)}, added after this run began and not learned by it; learn"
            f" all of it with python -m iumad_jax.learn --workdir={workdir}, or start a run in another --workdir."
        ]


def exchange_messages(inventory: Inventory, store: Store) -> list[str]:
    """Describe each object that holds the images of another, for example after two names were exchanged."""
    present = [name for name in inventory if name in store.reader.objects]
    replaced = [
        name
        for name in present
        if (digests := _inventory_digests(inventory, name)) and not digests & _present_digests(store, name)
    ]
    messages = []
    for name in present if replaced else []:
        digests = _present_digests(store, name)
        if not _inventory_digests(inventory, name) & digests:
            messages += [
                f"{name} holds the images of {other}; rename both as they were when this run began."
                for other in replaced
                if other != name and _inventory_digests(inventory, other) & digests
            ]
    return messages


def changed_images(inventory: Inventory, store: Store, object_: str, split: Split) -> str | None:
    """Describe how the images of an object and split differ from the inventory; None if they do not.

    Raises:
        UserError: If an image cannot be read.
    """
    before = inventory[object_].get(split, {})
    if any(before.values()):
        now: Images = {**store.digests(object_, split)}
    else:  # compare only the ids of images that the run has not used yet
        now = dict.fromkeys(store.reader.ids(object_, split))
    kinds = {
        "added": [id_ for id_ in now if id_ not in before],
        "removed": [id_ for id_ in before if id_ not in now],
        "changed": [id_ for id_ in now if before.get(id_) not in (None, now[id_])],
    }
    changes = [f"{len(ids)} {kind} ({_shortened(ids)})" for kind, ids in kinds.items() if ids]
    return f"{object_}'s {SPLIT_NAMES[split]} images: {', '.join(changes)}" if changes else None


def _inventory_digests(inventory: Inventory, name: str) -> set[str]:
    """Return the digests of an object's training images in the inventory."""
    return {digest for digest in inventory[name].get("train", {}).values() if digest}


def _present_digests(store: Store, name: str) -> set[str]:
    """Return the digests of an object's training images in the dataset as it is now."""
    return set(store.digests(name, "train").values())


def _read_digests(open_reader: Callable[[Sequence[str]], Reader], name: str) -> set[str]:
    """Compute the digests of a new object's training images; empty if they cannot be read."""
    try:
        return set(digests(open_reader([name]), name, "train").values())
    except UserError:
        return set()


def digests(reader: Reader, name: str, split: Split) -> dict[str, str]:
    """Compute the digest of each image's files by id.

    Raises:
        UserError: If a file cannot be read.
    """
    return {
        id_: records.digest([records.hash_file(file, None)["sha256"] for file in reader.files(name, split, id_)])
        for id_ in reader.ids(name, split)
    }


def _shortened(names: Sequence[str]) -> str:
    """Join the first names and append the number of the others."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
