"""Ownership of a workdir: it belongs to one config and one run format, and one process at a time."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import locked, write_whole

FORMAT = 10  # version of all files in a workdir; a change must convert or refuse older versions
_NAME = "config.json"
FILES = "backbone.weights", "diffusion.weights", "diffusion.autoencoder"  # which may move; their content is checked
_FREE = ("debug.", "dataset.trust", *FILES)  # keys that may change when a run is continued


def check(workdir: Path, config: ConfigDict) -> None:
    """Check that no run of another config has begun in the workdir.

    Raises:
        UserError: If one has, or the workdir cannot be read.
    """
    if not (workdir / _NAME).exists():
        return
    before, now = configs.flat(read(workdir).to_dict()), configs.flat(json.loads(config.to_json()))
    differing = [key for key in before | now if before.get(key) != now.get(key) and not key.startswith(_FREE)]
    begun = set(content(workdir)) > {_NAME} or (workdir / "dataset.json").exists()
    if differing and begun:  # what was refused before its first step may be corrected
        changes = ", ".join(f"config.{key} was {before.get(key)} and is now {now.get(key)}" for key in differing)
        raise UserError(f"{workdir} holds a run of another config: {changes}; choose another --workdir.")


def content(workdir: Path) -> dict[str, str]:
    """Return the SHA-256, by path, of the existing files that a run resumes from: config, snapshots and results."""
    patterns = (_NAME, "plan.json", "results.json", "snapshots/*/sha256.json", "snapshots_within_step/*/sha256.json")
    files = sorted(file for pattern in patterns for file in workdir.glob(pattern))
    return {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def moved_files(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Return the files of weights that the config names elsewhere than the run in a workdir, by key."""
    if not (workdir / _NAME).exists():
        return {}
    before, now = (configs.flat(values.to_dict()) for values in (read(workdir), config))
    return {key: now[key] for key in FILES if now[key] != before[key]}


def read(workdir: Path) -> ConfigDict:
    """Read the config of the run in a workdir.

    Raises:
        UserError: If the workdir holds no run, or if its config cannot be read.
    """
    file = workdir / _NAME
    try:
        values = json.loads(file.read_text())
        format_ = values.pop("format", 0)
        config = ConfigDict(values)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no run; choose the --workdir of a run.") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # damaged, or JSON but no object
        raise UserError(f"{file} is not the config of a run ({error}); choose another --workdir.") from error
    if format_ != FORMAT:
        age = "an older" if format_ in range(FORMAT) else "another"
        raise UserError(
            f"{file}: this run was made by {age} version of iumad_jax (run format {format_}; this version reads"
            f" {FORMAT}); use that version, or start again in another --workdir."
        )
    flat_config = configs.flat(config.to_dict())
    for key, value in configs.flat(configs.paper("1-0").to_dict()).items():
        if type(flat_config.get(key)) is not type(value):
            raise UserError(f"{file} has no config.{key} of type {type(value).__name__}; choose another --workdir.")
    configs.check(config)
    return config


@contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Create and lock the workdir and write the config to it. The lock keeps other processes out.

    Raises:
        UserError: If another process holds the workdir, if it belongs to another config, or if it cannot be written.
    """
    with ExitStack() as stack:
        try:
            (workdir / "pictures").mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(workdir / "lock"))
        except TimeoutError as error:
            raise UserError(
                f"{workdir} is in use by another process; wait until it ends or choose another --workdir."
            ) from error
        except OSError as error:
            raise UserError(f"{workdir} cannot be written ({error.strerror}); choose another --workdir.") from error
        check(workdir, config)  # again, since another process may have claimed the workdir before the lock was held
        content = {"format": FORMAT} | json.loads(config.to_json())
        write_whole(workdir / _NAME, (json.dumps(content, indent=2) + "\n").encode())
        yield
