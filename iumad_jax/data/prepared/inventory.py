"""What a dataset held when a run used it, kept as `dataset.json` in the workdir, and what has changed since."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from iumad_jax.data.prepared import records
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.sample import Reader, Split
from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import write_whole

Images = dict[str, str | None]  # by id: a digest of the image's files, None until the run has used them
Inventory = dict[str, dict[str, Images]]  # by object and split

SPLITS: dict[Split, str] = {"train": "training", "calibration": "validation", "test": "test"}  # and their names
_SHOWN = 5  # names in a sentence


def read(workdir: Path) -> Inventory:
    """What the dataset held when the run in this workdir used it; nothing if no run has begun there.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    file = workdir / "dataset.json"
    try:
        found = json.loads(file.read_bytes())
        if not all(
            isinstance(digest, str | None)
            for splits in found.values()
            for images in splits.values()
            for digest in images.values()
        ):
            raise ValueError("a digest is no text")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not the inventory of a dataset ({error}); restore it, or choose another --workdir."
        ) from error


def note(workdir: Path, store: Store, objects: Iterable[str], splits: Sequence[Split]) -> None:
    """Notes the images of some objects and splits as the run uses them now.

    Raises:
        UserError: it cannot be written, or an image cannot be read.
    """
    reader = store.reader
    noted = read(workdir) or {
        name: {split: dict.fromkeys(reader.ids(name, split)) for split in SPLITS} for name in reader.objects
    }
    for name in objects:
        for split in splits:
            noted[name][split] = {**store.digests(name, split)}
    write_whole(workdir / "dataset.json", json.dumps(noted, indent=1).encode())


class Names(NamedTuple):
    """How the objects of a dataset differ from those that a run knows."""

    gone: tuple[str, ...]
    renamed: dict[str, str]  # from the name that the run knows
    new: tuple[str, ...]

    @classmethod
    def of(cls, noted: Inventory, present: Sequence[str], open_reader: Callable[[Sequence[str]], Reader]) -> "Names":
        """Compares names; an object is renamed if a new name has its images.

        Args:
            noted: what the run used.
            present: objects that the dataset holds now.
            open_reader: makes a reader of some of them.
        """
        new = [name for name in present if name not in noted]
        renamed: dict[str, str] = {}
        for name in noted:
            used = set() if name in present else _used(noted, name)
            found = [other for other in new if used & _digests(open_reader, other)] if used else []
            renamed |= {name: found[0]} if found else {}
        gone = tuple(name for name in noted if name not in present and name not in renamed)
        return cls(gone, renamed, tuple(name for name in new if name not in renamed.values()))

    def missing(self) -> list[str]:
        """One sentence for each object that the dataset does not hold under its name any more."""
        return [
            *(
                f"{name} is called {now} now; name it {name} again, as this run knows it."
                for name, now in self.renamed.items()
            ),
            *(
                f"{name} is gone, which belongs to this run; put it back, or start another --workdir."
                for name in self.gone
            ),
        ]

    def unlearned(self) -> list[str]:
        """A sentence about objects that the run does not know, if there are any."""
        if not self.new:
            return []
        return [
            f"The dataset also holds {_some(self.new)}, which this run does not learn, as it was not there when the run"
            " began; start another --workdir to learn all."
        ]


def exchanged(noted: Inventory, store: Store) -> list[str]:
    """One sentence for each object that holds the images of another one, such as where two names were exchanged."""
    present = [name for name in noted if name in store.reader.objects]
    strangers = [name for name in present if (used := _used(noted, name)) and not used & _held(store, name)]
    found = []
    for name in present if strangers else []:
        held = _held(store, name)
        if not _used(noted, name) & held:
            found += [
                f"{name} holds the images of {other}; give both the names that this run knows."
                for other in strangers
                if other != name and _used(noted, other) & held
            ]
    return found


def changed_images(noted: Inventory, store: Store, object_: str, split: Split) -> str | None:
    """How the images of an object and split differ from those that the run knows; None if they do not.

    Raises:
        UserError: an image cannot be read.
    """
    before = noted[object_].get(split, {})
    if any(before.values()):
        now: Images = {**store.digests(object_, split)}
    else:  # what the run has not used yet is not read for this
        now = dict.fromkeys(store.reader.ids(object_, split))
    kinds = {
        "added": [id_ for id_ in now if id_ not in before],
        "removed": [id_ for id_ in before if id_ not in now],
        "changed": [id_ for id_ in now if before.get(id_) not in (None, now[id_])],
    }
    told = [f"{len(ids)} {kind} ({_some(ids)})" for kind, ids in kinds.items() if ids]
    return f"{object_}'s {SPLITS[split]} images: {', '.join(told)}" if told else None


def _used(noted: Inventory, name: str) -> set[str]:
    """The digests of an object's training images as the run used them."""
    return {digest for digest in noted[name].get("train", {}).values() if digest}


def _held(store: Store, name: str) -> set[str]:
    """The same as they are now."""
    return set(store.digests(name, "train").values())


def _digests(open_reader: Callable[[Sequence[str]], Reader], name: str) -> set[str]:
    """The same of an object that the run does not know; nothing if it cannot be read."""
    try:
        reader = open_reader([name])
        return {
            records.digest([records.hashed(file, None)["sha256"] for file in reader.files(name, "train", id_)])
            for id_ in reader.ids(name, "train")
        }
    except UserError:
        return set()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
