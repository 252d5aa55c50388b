"""A workdir belongs to one config."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax.errors import UserError


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir and notes the config in it, or checks that it is the one noted by an earlier run.

    Raises:
        UserError: the workdir cannot be written, or belongs to another config.
    """
    file = workdir / "config.json"
    wanted = json.loads(config.to_json())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(wanted, indent=2))
            unfinished.rename(file)
            return
        noted = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error}); choose another --workdir.") from error
    except OSError as error:
        raise UserError(f"{workdir}: not a writable folder ({error.strerror}); choose another --workdir.") from error
    before, now = _flat(noted), _flat(wanted)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(f"config.{key} ({before.get(key)} there, {now.get(key)} now)" for key in differing)
        raise UserError(f"{workdir}: holds a run of another config, differing in {changes}; choose another --workdir.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
