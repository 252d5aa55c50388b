"""Atomic file writes and file locks."""

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
    """Convert a value to JSON types: arrays become lists, NaN and infinity become null."""
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
                raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")
            return as_json(array.tolist())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: if writing fails, the previous file remains.

    Raises:
        UserError: If the disk is full or the folder is not writable.
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
        raise write_error(path, error) from error


@contextmanager
def locked(file: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file. If the process is killed, the operating system releases the lock.

    Args:
        file: Lock file, created if missing.
        waiting: Message to print before waiting for another process; None to raise TimeoutError instead.

    Raises:
        TimeoutError: If another process holds the lock and `waiting` is None.
        OSError: If the file cannot be written.
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


def make_folder(folder: Path) -> None:
    """Create a folder for results, with its parents, unless it exists.

    Raises:
        UserError: If it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}); choose another folder.") from error


def write_error(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be written."""
    return UserError(f"cannot write {path}: {error.strerror}; make room on the disk or choose another folder.")
