"""The ledger of a run: every event once, in order, one JSON object per line.

Two runs with one seed write the same bytes: no clock, fields in the order given, floats that read back as they were.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import as_json, not_written

SHA256_OF_NOTHING = hashlib.sha256().hexdigest()


class Ledger:
    """The ledger a run writes; its length is the number of its events.

    Opening keeps what is there, less a last line that a crash left unfinished.
    """

    def __init__(self, path: Path):
        """Open or create the file.

        Raises:
            UserError: the file cannot be read or written.
        """
        self.path = path
        self._change(path.touch)
        self._cut(self._read().split(b"\n")[:-1])

    def __len__(self) -> int:
        return self._lines

    @property
    def sha256(self) -> str:
        """Of all lines, so that what a snapshot had seen is known again."""
        return self._sha256.hexdigest()

    def append(self, event: str, **fields: Any) -> None:
        """Write one event to disk, for good before this returns.

        Args:
            event: what happened.
            fields: JSON values, numpy or jax numbers and arrays; NaN and infinity are written as null.

        Raises:
            UserError: the disk is full or the file not writable.
        """
        line = json.dumps(as_json({"event": event, **fields}), allow_nan=False) + "\n"

        def write() -> None:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

        self._change(write)
        self._lines += 1
        self._sha256.update(line.encode())

    def truncate(self, lines: int, sha256: str) -> None:
        """Forget all events but the first `lines`, so that a resumed run goes on from what its snapshot had seen.

        Raises:
            UserError: these lines are not what `sha256` was told of, or the file is not writable.
        """
        kept = self._read().split(b"\n")[:-1][:lines]
        if hashlib.sha256(b"".join(line + b"\n" for line in kept)).hexdigest() != sha256:
            changed = "they are not as they were written"
            found = changed if len(kept) == lines else f"{len(kept)} of them are there"
            raise UserError(
                f"{self.path}: the snapshot had seen {lines} lines, but {found}; "
                "restore the file, or start again in an empty workdir"
            )
        self._cut(kept)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error

    def _cut(self, lines: list[bytes]) -> None:
        """Keeps the first lines, which are these."""
        content = b"".join(line + b"\n" for line in lines)
        self._change(lambda: os.truncate(self.path, len(content)))
        self._lines, self._sha256 = len(lines), hashlib.sha256(content)

    def _change(self, change: Callable[[], None]) -> None:
        try:
            change()
        except OSError as error:
            raise not_written(self.path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All complete events of a ledger; a last line without its end is one being written, or a crash, and left out.

    Raises:
        UserError: the file cannot be read, or a line is not an event, naming the line.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    events = []
    for number, line in enumerate(lines, 1):
        event = None
        with suppress(ValueError, RecursionError):  # also of decoding
            event = json.loads(line)
        if not isinstance(event, dict) or "event" not in event:
            raise UserError(f"{path} line {number} is damaged: not a JSON object with an event; restore the file")
        events.append(event)
    return events
