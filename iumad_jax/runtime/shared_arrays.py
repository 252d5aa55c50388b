"""Arrays shared by snapshots: the unchanging arrays of each object are stored once, in files named by SHA-256."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import write_whole
from iumad_jax.shapes import BY_OBJECT

ByObject = dict[str, tuple[Any, ...]]  # by path in a tree: one nested dictionary of arrays per object
Index = dict[str, list[dict[str, str]]]  # by path in a tree: per object the SHA-256 of each array, by array path


@dataclass
class Item:
    """An array to write, or one that is written."""

    array: np.ndarray | None  # None if it is written
    digest: str = ""  # its SHA-256, if it is written


Items = dict[str, list[dict[str, Item]]]  # by path in a tree: per object each array, by array path


def separate(tree: Any, path: str = "") -> tuple[Any, ByObject]:
    """Split nested dictionaries into the values under keys BY_OBJECT, by path, and a tree without these keys."""
    if not isinstance(tree, dict):
        return tree, {}
    remaining: dict[str, Any] = {}
    shared: ByObject = {}
    for key, value in tree.items():
        if key == BY_OBJECT:
            shared[f"{path}{key}"] = value
        else:
            remaining[key], shared_below = separate(value, f"{path}{key}/")
            shared |= shared_below
    return remaining, shared


def join(tree: Any, shared: ByObject) -> Any:
    """Insert the values that `separate` removed into the tree, in place."""
    for path, value in shared.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = value
    return tree


class SharedArrays:
    """Folder of arrays in files named by their SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact: set[str] = set()  # SHA-256 of the files that this process has written or verified
        self._items: dict[int, tuple[Any, Item]] = {}  # by id: arrays copied or read last, which keep their ids so

    def copy(self, shared: ByObject) -> Items:
        """Copy the arrays for `write`, except those of the previous call and those read: they never change."""
        known, self._items = self._items, {}

        def item(array: Any) -> Item:
            found = known[id(array)][1] if id(array) in known else Item(np.array(array))
            self._items[id(array)] = array, found
            return found

        return {
            path: [jax.tree.map(item, flatten_dict(arrays, sep="/")) for arrays in objects]
            for path, objects in shared.items()
        }

    def write(self, items: Items) -> Index:
        """Write the arrays that are not written yet, and return the index of all arrays.

        Raises:
            UserError: If the disk is full or the folder is not writable.
        """
        for item in jax.tree.leaves(items):
            if item.array is not None:
                item.digest, item.array = self._write(item.array), None
        return jax.tree.map(lambda item: item.digest, items)

    def read(self, index: Index) -> ByObject:
        """Read the arrays of an index.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If a file holds no array.
        """

        def load(digest: str) -> np.ndarray:
            array = np.load(self._file(digest))
            if self._is_intact(digest):
                self._items[id(array)] = array, Item(None, digest)
            return array

        return {
            path: tuple(unflatten_dict(jax.tree.map(load, digests), sep="/") for digests in objects)
            for path, objects in index.items()
        }

    def damaged(self, index: Index) -> str | None:
        """Return the name of a missing or damaged file of the index, or None if all files are intact.

        Raises:
            OSError: If a file cannot be read.
        """
        digests = {digest for objects in index.values() for arrays in objects for digest in arrays.values()}
        return next((f"{digest}.npy" for digest in sorted(digests) if not self._is_intact(digest)), None)

    def write_object(self, arrays: Any) -> dict[str, str]:
        """Write the arrays of one object and return the SHA-256 of each, by path.

        Raises:
            UserError: As `write`.
        """
        return {name: self._write(np.asarray(array)) for name, array in flatten_dict(arrays, sep="/").items()}

    def read_object(self, digests: dict[str, str]) -> Any:
        """Memory-map the arrays of one object, after comparing them with their SHA-256.

        Raises:
            UserError: If a file is missing or damaged.
        """
        for digest in digests.values():
            if not self._is_intact(digest):
                raise UserError(f"{self._file(digest)} is missing or was changed; restore it from a backup.")
        arrays = {name: np.load(self._file(digest), mmap_mode="r") for name, digest in digests.items()}
        return unflatten_dict(arrays, sep="/")

    def _write(self, array: np.ndarray) -> str:
        """Write an array unless its file is intact, and return its SHA-256."""
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        if not self._is_intact(digest):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file(digest), content.getvalue())
            self._intact.add(digest)
        return digest

    def _is_intact(self, digest: str) -> bool:
        if digest not in self._intact and self._file(digest).exists():
            with self._file(digest).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == digest:
                    self._intact.add(digest)
        return digest in self._intact

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.npy"
