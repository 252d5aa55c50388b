"""What a part has found: a JSON file, written whole after every row."""

import json
from pathlib import Path
from typing import Any

from iumad_jax.runtime.storage import as_json, write_whole

Row = dict[str, Any]
UNFINISHED = "was not finished"


class Results:
    """The file of one part.

    part: its name. rehearsal: whether at tiny sizes on a CPU. state: how its last process ended. tried: keys of the
    rows of the call in progress. machines: what the rows were measured on. rows: by key; one with an "error" failed.
    """

    def __init__(self, path: Path, rehearsal: bool):
        """Open the file, or begin one that is there once something is written.

        Raises:
            ValueError: it is none of a part's, or belongs to a rehearsal and this is none, or the reverse.
        """
        self.path = path
        new = {"part": path.stem, "rehearsal": rehearsal, "state": "", "tried": [], "machines": [], "rows": {}}
        try:
            self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else new
            same = self.content["rehearsal"] == rehearsal and new.keys() <= self.content.keys()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of this command ({error!r}); give another --out.") from error
        if not same:
            raise ValueError(f"{path} is of a call with{'out' * rehearsal} --rehearse; give another --out.")

    @property
    def failed(self) -> dict[str, Row]:
        """The rows that are to be tried again."""
        return {key: row for key, row in self.content["rows"].items() if "error" in row}

    def is_due(self, key: str) -> bool:
        """Whether a row is missing or failed, and was not tried in this call."""
        rows = self.content["rows"]
        return key not in self.content["tried"] and (key not in rows or "error" in rows[key])

    def begin(self, key: str) -> None:
        """Note that a row is being measured, should the process not come back."""
        self.content["tried"].append(key)
        self.put(key, {"error": UNFINISHED})

    def put(self, key: str, row: Row) -> None:
        """Keep a row."""
        self.content["rows"][key] = row
        self.save()

    def machine(self, described: dict[str, Any]) -> int:
        """The place of a machine among those of this file."""
        machines = self.content["machines"]
        if described not in machines:
            machines.append(described)
        return machines.index(described)

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, (json.dumps(as_json(self.content), indent=1) + "\n").encode())
