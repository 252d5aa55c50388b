"""Results of a part: a JSON file that is rewritten after every row."""

import json
from pathlib import Path
from typing import Any

from iumad_jax.runtime.storage import as_json, write_whole

Row = dict[str, Any]
UNFINISHED = "was not finished"


class Results:
    """File of one part, with these keys.

    part: name of the part. rehearsal: whether it ran at tiny sizes on a CPU. state: how its last process ended. tried:
    keys of the rows that the current call has tried. machines: descriptions of the machines that measured the rows.
    rows: results by key; a row with the key "error" failed.
    """

    def __init__(self, path: Path, rehearsal: bool):
        """Open the file. A missing file is created when the first row is written.

        Raises:
            ValueError: If the file was not written by this command, or if only one of the file and this call is a
                rehearsal.
        """
        self.path = path
        new = {"part": path.stem, "rehearsal": rehearsal, "state": "", "tried": [], "machines": [], "rows": {}}
        try:
            self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else new
            is_compatible = self.content["rehearsal"] == rehearsal and new.keys() <= self.content.keys()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} contains no results of this command ({error!r}); choose another --out."
            ) from error
        if not is_compatible:
            raise ValueError(f"{path} was written with{'out' * rehearsal} --rehearse; choose another --out.")

    @property
    def failed(self) -> dict[str, Row]:
        """Rows to try again."""
        return {key: row for key, row in self.content["rows"].items() if "error" in row}

    def is_due(self, key: str) -> bool:
        """Return whether a row is missing or failed and was not tried in this call."""
        rows = self.content["rows"]
        return key not in self.content["tried"] and (key not in rows or "error" in rows[key])

    def begin(self, key: str) -> None:
        """Mark a row as tried and unfinished, in case the process dies while it measures the row."""
        self.content["tried"].append(key)
        self.put(key, {"error": UNFINISHED})

    def put(self, key: str, row: Row) -> None:
        """Store a row."""
        self.content["rows"][key] = row
        self.save()

    def machine(self, description: dict[str, Any]) -> int:
        """Return the index of a machine in this file and add the machine if it is new."""
        machines = self.content["machines"]
        if description not in machines:
            machines.append(description)
        return machines.index(description)

    def save(self) -> None:
        """Write the file atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, (json.dumps(as_json(self.content), indent=1) + "\n").encode())
