"""What a dataset held when a run used it, kept as `dataset.json` in the workdir, and what has changed since."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from iumad_jax.data import records
from iumad_jax.data.sample import Reader, Split
from iumad_jax.data.store import Store
from iumad_jax.errors import UserError
from iumad_jax.report.ledger import write_whole

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
        return {name: {split: dict(images) for split, images in splits.items()} for name, splits in found.items()}
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


def gone(noted: Inventory, present: Sequence[str], open_reader: Callable[[Sequence[str]], Reader]) -> Iterator[str]:
    """One sentence for each noted object that the dataset does not hold any more; a renamed one is recognised.

    Args:
        noted: what the run used.
        present: objects that the dataset holds now.
        open_reader: a reader of some of them.
    """
    new = [name for name in present if name not in noted]
    for name in noted:
        if name in present:
            continue
        used = {digest for digest in noted[name].get("train", {}).values() if digest}
        renamed = [other for other in new if used & _digests(open_reader([other]), other)]
        yield (
            f"{name} is called {renamed[0]} now; name it {name} again, as this run knows it."
            if renamed
            else f"{name} is gone, which belongs to this run; put it back, or start another --workdir without it."
        )


def unknown(noted: Inventory, present: Sequence[str]) -> str | None:
    """A sentence about objects that the dataset holds and the run does not know; None if there are none."""
    new = [name for name in present if name not in noted]
    if not new:
        return None
    return (
        f"the dataset also holds {_some(new)}, which this run does not learn, as it was not there when the run began;"
        " start another --workdir to learn all."
    )


def changed_images(noted: Inventory, store: Store, object_: str, split: Split) -> str | None:
    """How the images of an object and split differ from those that the run knows; None if they do not.

    Raises:
        UserError: an image cannot be read.
    """
    before, now = noted[object_].get(split, {}), store.digests(object_, split)
    kinds = {
        "added": [id_ for id_ in now if id_ not in before],
        "removed": [id_ for id_ in before if id_ not in now],
        "changed": [id_ for id_ in now if before.get(id_) not in (None, now[id_])],
    }
    told = [f"{len(ids)} {kind} ({_some(ids)})" for kind, ids in kinds.items() if ids]
    return f"{object_}'s {SPLITS[split]} images: {', '.join(told)}" if told else None


def _digests(reader: Reader, name: str) -> set[str]:
    """The digests of an object's training images, read anew."""
    return {
        records.digest([records.hashed(file, None)["sha256"] for file in reader.files(name, "train", id_)])
        for id_ in reader.ids(name, "train")
    }


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
