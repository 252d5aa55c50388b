"""Files that are there whole or not at all, and locks."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from iumad_jax.errors import UserError


def as_json(value: Any) -> Any:
    """The value in JSON's own types: arrays as lists, NaN and infinity as null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
        case _:
            array = np.asarray(value)
            if array.dtype == object:
                raise TypeError(f"{type(value).__name__} has no form in JSON")
            return as_json(array.tolist())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or, when that fails, as it was before.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise not_written(path, error) from error


@contextmanager
def locked(file: Path, waiting: str | None = None) -> Iterator[None]:
    """Keeps other processes out that lock the same file. The system gives up the lock of one that is killed.

    Args:
        file: which need not be there.
        waiting: what to say before waiting for another process.

    Raises:
        TimeoutError: another process is there, and this one is not to wait.
        OSError: the file cannot be written.
    """
    lock = FileLock(file)
    try:
        held = lock.acquire(blocking=False)
    except TimeoutError:
        if waiting is None:
            raise
        print(waiting, file=sys.stderr)
        held = lock.acquire()
    with held:
        yield


def not_written(path: Path, error: OSError) -> UserError:
    """The sentence for a file that cannot be written."""
    return UserError(f"cannot write {path}: {error.strerror}; make room, or choose another folder")
