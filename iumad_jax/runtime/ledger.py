"""The ledger of a run: every event once, in order, one JSON object per line.

On one kind of CPU, two runs with the same config and seed write the same bytes: events contain no times, fields keep
their order, and floats are written with full precision.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import as_json, write_error

SHA256_OF_NOTHING = hashlib.sha256().hexdigest()


class Ledger:
    """Writer of a ledger file. Its length is the number of events.

    Opening a file preserves its events; an incomplete last line, left by a crash, is removed.
    """

    def __init__(self, path: Path):
        """Open or create the file.

        Raises:
            UserError: If the file cannot be read or written.
        """
        self.path = path
        self._modify(path.touch)
        self._keep(self._read().split(b"\n")[:-1])

    def __len__(self) -> int:
        return self._lines

    @property
    def sha256(self) -> str:
        """SHA-256 of all lines, by which `truncate` recognises the lines that a snapshot refers to."""
        return self._sha256.hexdigest()

    def append(self, event: str, **fields: Any) -> None:
        """Append one event and flush it to disk.

        Args:
            event: Kind of event, such as "epoch".
            fields: JSON values, NumPy or JAX numbers and arrays; NaN and infinity are written as null.

        Raises:
            UserError: If the disk is full or the file is not writable.
        """
        line = json.dumps(as_json({"event": event, **fields}), allow_nan=False) + "\n"

        def write() -> None:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

        self._modify(write)
        self._lines += 1
        self._sha256.update(line.encode())

    def truncate(self, lines: int, sha256: str) -> None:
        """Remove all events after the first `lines`, so that a resumed run continues from its snapshot.

        Raises:
            UserError: If these lines are missing or do not match `sha256`, or if the file is not writable.
        """
        kept = self._read().split(b"\n")[:-1][:lines]
        if hashlib.sha256(b"".join(line + b"\n" for line in kept)).hexdigest() != sha256:
            problem = "they were changed" if len(kept) == lines else f"only {len(kept)} are left"
            raise UserError(
                f"{self.path}: the snapshot was taken after {lines} lines, but {problem}; restore the file from a"
                " backup, or start again in an empty workdir."
            )
        self._keep(kept)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _keep(self, lines: list[bytes]) -> None:
        """Truncate the file to `lines`, which are its first lines."""
        content = b"".join(line + b"\n" for line in lines)
        self._modify(lambda: os.truncate(self.path, len(content)))
        self._lines, self._sha256 = len(lines), hashlib.sha256(content)

    def _modify(self, action: Callable[[], None]) -> None:
        """Run an action on the file, raising its OSError as UserError."""
        try:
            action()
        except OSError as error:
            raise write_error(self.path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """Read all complete events of a ledger.

    A last line without line end is skipped: it is being written, or a crash interrupted it.

    Raises:
        UserError: If the file cannot be read, or if a line, which the message names, is not an event.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from error
    events = []
    for number, line in enumerate(lines, 1):
        event = None
        with suppress(ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            event = json.loads(line)
        if not isinstance(event, dict) or "event" not in event:
            raise UserError(f"{path} line {number} is damaged (not a JSON event); restore the file from a backup.")
        events.append(event)
    return events


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}; restore the file or make it readable.")
