"""Orbax snapshots: one per incremental step, and the two newest within a step.

Every snapshot has a manifest, the SHA-256 of each of its files, because Orbax restores flipped bits silently. It gets
its name when that is written, too: what a crash leaves behind has another name.
"""

import copy
import hashlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from iumad_jax import parallel
from iumad_jax.errors import UserError
from iumad_jax.report.ledger import write_whole
from iumad_jax.shapes import Variables

MANIFEST = "sha256.json"
_UPDATES = 10**12  # more than a step has
_UNFINISHED = ".unfinished"  # in the names of snapshots until they are whole


class Position(NamedTuple):
    """How far a run is. Randomness and the order of the data are functions of this and the seed."""

    step: int
    updates: int  # done within the step
    finished: bool = False  # the step is trained and evaluated


class Snapshot(NamedTuple):
    """Everything needed to go on."""

    position: Position
    variables: dict[str, Variables]  # by system
    optimizer: list[Any]  # the leaves of its state; empty after a finished step
    losses: dict[str, np.ndarray]  # of the updates of an epoch that is not finished
    record: dict[str, Any]  # what the ledger and the results held
    memory: dict[str, Any]  # of the strategy against forgetting


class Snapshots:
    """The snapshots of one workdir, written by a thread of its own while training goes on."""

    def __init__(self, workdir: Path) -> None:
        """Opens them; what a killed save left behind is removed.

        Raises:
            UserError: the workdir is not writable.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._finished, self._within = ((workdir / name).absolute() for name in ("snapshots", "snapshots_within_step"))
        for folder in (self._finished, self._within):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for unfinished in folder.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(unfinished)
            except OSError as error:
                raise UserError(f"{folder}: not a writable folder ({_reason(error)}); make room for one.") from error
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._saving: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begins to save a snapshot; a finished step's stays, one within a step replaces the last but one before.

        Raises:
            UserError: the one before could not be written, as when the disk is full.
        """
        self.wait()
        step, updates, finished = snapshot.position
        folder = self._finished / str(step) if finished else self._within / str(step * _UPDATES + updates)
        kept = {key: getattr(snapshot, key) for key in ("variables", "optimizer", "losses", "memory")}
        arrays = jax.tree.map(np.array, kept)  # copies: training reuses its buffers
        record = copy.deepcopy(snapshot.record) | {"position": snapshot.position._asdict()}
        self._saving = self._thread.submit(_write, folder, arrays, record, None if finished else 2)

    @property
    def failed(self) -> bool:
        """Whether the last snapshot could not be written, which the next `save` or `wait` tells."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            UserError: it cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> Snapshot | None:
        """The snapshot of the furthest position that is as it was written, or None if none was ever taken.

        Damaged ones beyond it are set aside.

        Raises:
            UserError: all are damaged, or it cannot be read.
        """
        self.wait()
        there = [((number + 1) * _UPDATES, folder) for number, folder in _numbered(self._finished)]
        there += _numbered(self._within)
        damaged: list[tuple[Path, str]] = []
        for _, folder in sorted(there, reverse=True):
            if (damage := _damage(folder)) is None:
                for other, reason in damaged:
                    _set_aside(other, f"{reason}; going on from {folder}")
                return _restore(folder)
            damaged.append((folder, damage))
        if damaged:
            told = "; ".join(f"{folder} {damage}" for folder, damage in damaged)
            raise UserError(f"no snapshot can be used: {told}; restore one, or start again in another --workdir.")
        return None

    def close(self) -> None:
        """Waits until everything is on disk and ends the thread.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def read(workdir: Path, step: int | None = None) -> Snapshot:
    """The snapshot of a finished step, by default the last one that is whole; nothing in the workdir is changed.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = (workdir / "snapshots").absolute()
    there = dict(_numbered(folder))
    damaged: list[str] = []
    for number in sorted(there, reverse=True) if step is None else {step} & set(there):
        damage = _damage(there[number])
        if damage is None:
            for told in damaged:
                print(f"iumad_jax: {told}; using {there[number]}", file=sys.stderr)
            return _restore(there[number])
        damaged.append(f"{there[number]} {damage}")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: restore it, or choose another --step or --workdir.")
    found = f"finished are {', '.join(map(str, sorted(there)))}" if there else "none is finished"
    wanted = "any step" if step is None else f"step {step}"
    raise UserError(f"{folder} holds no snapshot of {wanted}; {found}.")


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The snapshots in a folder, by number."""
    return [(int(one.name), one) for one in folder.glob("*") if one.name.isdecimal()]


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Orbax's, for this process alone. Its CheckpointManager would read all snapshots' metadata, also damaged ones."""
    alone = parallel.alone()
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        record=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    with _silent_threads(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _write(folder: Path, arrays: Any, record: dict[str, Any], keep: int | None) -> None:
    """Writes a snapshot and, of all beside it, keeps the newest ones."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            checkpointer.save(unfinished, args=args, force=True)
        write_whole(unfinished / MANIFEST, json.dumps(hashes(unfinished), indent=1).encode())
        if folder.exists():  # of the same position, from which the run went on
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for _, old in sorted(_numbered(folder.parent), reverse=True)[keep:] if keep else []:
            shutil.rmtree(old)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "os_error_code" not in str(error):  # not tensorstore's own OSError
            raise
        raise UserError(
            f"{folder.parent}: the snapshot could not be saved ({_reason(error)}); what was saved before is intact,"
            " so make room and run the same command again."
        ) from error


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path within the folder."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            with file.open("rb") as stream:
                hashes[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _damage(folder: Path) -> str | None:
    """What is wrong with a snapshot, None if all of its files are as they were written."""
    try:
        noted, found = json.loads((folder / MANIFEST).read_bytes()), hashes(folder)
        if noted == found:
            return None
        differing = sorted(file for file in noted | found if noted.get(file) != found.get(file))
        return f"is damaged ({differing[0]} is missing or not as it was written)"
    except FileNotFoundError:
        return "is damaged (its manifest is missing)"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"
    except (ValueError, TypeError, RecursionError):
        return "is damaged (its manifest is not as it was written)"


def _set_aside(folder: Path, reason: str) -> None:
    """Keeps a damaged snapshot under another name and says so."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"{folder} {reason.split(';')[0]} but cannot be set aside ({_reason(error)}).") from error
    print(f"iumad_jax: {folder} {reason}; it is kept as {aside.name}.", file=sys.stderr, flush=True)


def _restore(folder: Path) -> Snapshot:
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = checkpointer.restore(folder, args=args)
        record = dict(restored.record)
        arrays = jax.tree.map(np.asarray, restored.arrays)  # NumPy computes in float64 where JAX does not
        return Snapshot(position=Position(**record.pop("position")), record=record, **arrays)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: the snapshot cannot be read ({_reason(error)}); restore it.") from error


def size_of(tree: Any) -> int:
    """The bytes of all arrays."""
    return sum(np.asarray(array).nbytes for array in jax.tree.leaves(tree))


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Orbax's threads print and log a traceback of every error that they hand on.

    After an error they stay silent: the last of them fail only then, and the run ends with it.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hooks = [logger.level for logger in loggers], (threading.excepthook, sys.unraisablehook)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    threading.excepthook, sys.unraisablehook = hooks


def _reason(error: Exception) -> str:
    """What went wrong, without the path to it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    last = str(error).splitlines()[0].rsplit(": ", 1)[-1] if str(error) else type(error).__name__
    return last.split(" [")[0]  # what tensorstore adds in brackets
