"""A workdir belongs to one config, and to versions of this package that know its format."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.runtime.storage import locked, write_whole

FORMAT = 3  # of everything in a workdir; a version that changes it converts or refuses what older ones wrote
_NAME = "config.json"


def check(workdir: Path, config: ConfigDict) -> None:
    """Checks that the workdir is new, or the one that an earlier run of this config claimed.

    Raises:
        UserError: it belongs to another config, or cannot be read.
    """
    if not (workdir / _NAME).exists():
        return
    before, now = configs.flat(read(workdir).to_dict()), configs.flat(json.loads(config.to_json()))
    differing = [key for key in before | now if before.get(key) != now.get(key) and not key.startswith("debug.")]
    if differing:
        changes = ", ".join(f"config.{key} ({before.get(key)} there, {now.get(key)} now)" for key in differing)
        raise UserError(f"{workdir}: holds a run of another config, differing in {changes}; choose another --workdir.")


def content(workdir: Path) -> dict[str, str]:
    """What a run in this workdir goes on from: its config, snapshots and results, those that are there."""
    files = (_NAME, "results.json", "snapshots/*/sha256.json", "snapshots_within_step/*/sha256.json")
    found = sorted(file for pattern in files for file in workdir.glob(pattern))
    return {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def read(workdir: Path) -> ConfigDict:
    """The config of the run that is kept in a workdir.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = workdir / _NAME
    try:
        kept = json.loads(file.read_text())
        format_ = kept.pop("format", 0)
        config = ConfigDict(kept)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no run; give the --workdir of one.") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # also of JSON that is no object
        raise UserError(f"{file}: not the config of a run ({error}); choose another --workdir.") from error
    if format_ != FORMAT:
        which = "an older" if format_ in range(FORMAT) else "another"
        raise UserError(
            f"{file}: this run was made by {which} version of iumad_jax (run format {format_}; this version reads"
            f" {FORMAT}); use that version, or start again in another --workdir."
        )
    found = configs.flat(config.to_dict())
    for key, value in configs.flat(configs.paper("1-0").to_dict()).items():
        if type(found.get(key)) is not type(value):
            raise UserError(f"{file}: has no config.{key} of type {type(value).__name__}; choose another --workdir.")
    configs.check(config)
    return config


@contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the workdir with a place for pictures, notes the config in it, and keeps other processes out meanwhile.

    Raises:
        UserError: another process has it, it belongs to another config, or it cannot be written.
    """
    with ExitStack() as held:
        try:
            (workdir / "pictures").mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(workdir / "lock"))
        except TimeoutError as error:
            told = "another process runs here; wait for it, or choose another --workdir."
            raise UserError(f"{workdir}: {told}") from error
        except OSError as error:
            told = f"not a writable folder ({error.strerror}); choose another --workdir."
            raise UserError(f"{workdir}: {told}") from error
        check(workdir, config)  # another process may have claimed it meanwhile
        content = {"format": FORMAT} | json.loads(config.to_json())
        write_whole(workdir / _NAME, (json.dumps(content, indent=2) + "\n").encode())
        yield
