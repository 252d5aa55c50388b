"""Arrays that snapshots share: what belongs to one object and never changes is written once, under its SHA-256."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from iumad_jax.runtime.storage import write_whole
from iumad_jax.shapes import BY_OBJECT

ByObject = dict[str, tuple[Any, ...]]  # by path in a tree: nested dictionaries of arrays, one for each object
Index = dict[str, list[dict[str, str]]]  # the same with the SHA-256 of each array, by its path


def separate(tree: Any, path: str = "") -> tuple[Any, ByObject]:
    """Splits nested dictionaries into what changes and what stands under keys BY_OBJECT."""
    if not isinstance(tree, dict):
        return tree, {}
    rest: dict[str, Any] = {}
    shared: ByObject = {}
    for key, value in tree.items():
        if key == BY_OBJECT:
            shared[f"{path}{key}"] = value
        else:
            rest[key], below = separate(value, f"{path}{key}/")
            shared |= below
    return rest, shared


def join(tree: Any, shared: ByObject) -> Any:
    """Puts back what `separate` took out, into the tree itself."""
    for path, value in shared.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node[parent]
        node[key] = value
    return tree


class SharedArrays:
    """A folder of arrays, each named after the SHA-256 of its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact: set[str] = set()  # files that this process has written or compared with their names

    def write(self, shared: ByObject) -> Index:
        """Writes the arrays that are not there yet, or not as they were written.

        Raises:
            UserError: the disk is full or the folder not writable.
        """
        return {path: [self._write_one(one) for one in objects] for path, objects in shared.items()}

    def read(self, index: Index) -> ByObject:
        """Reads the arrays of an index.

        Raises:
            OSError: a file cannot be read.
            ValueError: it holds no array.
        """
        return {
            path: tuple(
                unflatten_dict({name: np.load(self._file(digest)) for name, digest in one.items()}, sep="/")
                for one in objects
            )
            for path, objects in index.items()
        }

    def damaged(self, index: Index) -> str | None:
        """Names a file of the index that is missing or not as it was written; None if there is none.

        Raises:
            OSError: one cannot be read.
        """
        digests = {digest for objects in index.values() for one in objects for digest in one.values()}
        return next((f"{digest}.npy" for digest in sorted(digests) if not self._is_intact(digest)), None)

    def _write_one(self, arrays: Any) -> dict[str, str]:
        written = {}
        for name, array in flatten_dict(arrays, sep="/").items():
            content = io.BytesIO()
            np.save(content, np.asarray(array), allow_pickle=False)
            digest = written[name] = hashlib.sha256(content.getvalue()).hexdigest()
            if not self._is_intact(digest):
                self.folder.mkdir(exist_ok=True)
                write_whole(self._file(digest), content.getvalue())
                self._intact.add(digest)
        return written

    def _is_intact(self, digest: str) -> bool:
        if digest not in self._intact and self._file(digest).exists():
            with self._file(digest).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == digest:
                    self._intact.add(digest)
        return digest in self._intact

    def _file(self, digest: str) -> Path:
        return self.folder / f"{digest}.npy"
