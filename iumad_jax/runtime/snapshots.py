"""Orbax snapshots: one per incremental step, and the two newest within a step.

A snapshot holds a `progress.Progress`, less the frozen arrays of methods.

Every snapshot has a manifest, the SHA-256 of each of its files, because Orbax restores flipped bits silently. It gets
its name when that is written, too: what a crash leaves behind has another name.

What belongs to one object and never changes again is written once, as `snapshots/by_object/<SHA-256>.npy`, and shared
by all later snapshots: the arrays under every key BY_OBJECT of the variables and of the strategy's state.
"""

import hashlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from iumad_jax.errors import UserError
from iumad_jax.runtime import processes
from iumad_jax.runtime.progress import LedgerMark, Position, Progress
from iumad_jax.runtime.shared_arrays import Index, SharedArrays, join, separate
from iumad_jax.runtime.storage import as_json, write_whole
from iumad_jax.shapes import Calibration, Variables

MANIFEST = "sha256.json"
_SHARED = "by_object.json"  # in a snapshot: which shared arrays it has
_ARRAYS = ("variables", "recognition", "optimizer", "strategy_state", "losses")  # fields; others are JSON
_UPDATES = 10**12  # more than a step has
_UNFINISHED = ".unfinished"  # in the names of snapshots until they are whole


class Snapshots:
    """The snapshots of one workdir, written by a thread of its own while training goes on."""

    def __init__(self, workdir: Path) -> None:
        """Opens them; what a killed save left behind is removed.

        Raises:
            UserError: the workdir is not writable.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._shared = _shared_arrays(workdir)
        self._finished, self._within = ((workdir / name).absolute() for name in ("snapshots", "snapshots_within_step"))
        for folder in (self._finished, self._within):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for unfinished in folder.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(unfinished)
            except OSError as error:
                raise UserError(f"{folder}: not a writable folder ({_reason(error)}); make room for one.") from error
        self.last_save = time.monotonic()  # when it began; at first, when these were opened
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._saving: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Begins to save a snapshot; a finished step's stays, one within a step replaces the last but one before.

        Only the first of several processes does.

        Raises:
            UserError: a number in it is not finite, or the one before could not be written, as when the disk is full.
        """
        self.last_save = time.monotonic()
        if not processes.is_process_zero():
            return
        self.wait()
        step, updates, finished = progress.position
        folder = self._finished / str(step) if finished else self._within / str(step * _UPDATES + updates)
        kept = progress._replace(variables={name: stored(of_one) for name, of_one in progress.variables.items()})
        arrays = jax.tree.map(np.array, {key: getattr(kept, key) for key in _ARRAYS})  # training reuses its buffers
        calibration = {name: (one.score, one.peak, one.distance[:, :2]) for name, one in progress.calibration.items()}
        _check_finite(arrays | {"calibration": calibration}, folder)
        record = {key: value for key, value in progress._asdict().items() if key not in _ARRAYS}
        record |= {name: value._asdict() for name, value in record.items() if name in ("position", "ledger")}
        record["calibration"] = {name: one._asdict() for name, one in progress.calibration.items()}
        keep = None if finished else 2
        self._saving = self._thread.submit(_write, folder, self._shared, arrays, as_json(record), keep)

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

    def latest(self) -> Progress | None:
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
            if (damage := _damage(folder, self._shared)) is None:
                for other, reason in damaged:
                    _set_aside(other, f"{reason}; going on from {folder}")
                return _restore(folder, self._shared)
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


def read(workdir: Path, step: int | None = None) -> Progress:
    """The snapshot of a finished step, by default the last one that is whole; nothing in the workdir is changed.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder, shared = (workdir / "snapshots").absolute(), _shared_arrays(workdir)
    there = dict(_numbered(folder))
    damaged: list[str] = []
    for number in sorted(there, reverse=True) if step is None else {step} & set(there):
        damage = _damage(there[number], shared)
        if damage is None:
            for told in damaged:
                print(f"iumad_jax: {told}; using {there[number]}", file=sys.stderr)
            return _restore(there[number], shared)
        damaged.append(f"{there[number]} {damage}")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: restore it, or choose another --step or --workdir.")
    found = f"finished are {', '.join(map(str, sorted(there)))}" if there else "none is finished"
    wanted = "any step" if step is None else f"step {step}"
    raise UserError(f"{folder} holds no snapshot of {wanted}; {found}.")


def _shared_arrays(workdir: Path) -> SharedArrays:
    return SharedArrays((workdir / "snapshots").absolute() / "by_object")


def _check_finite(arrays: dict[str, Any], folder: Path) -> None:
    """Raises UserError if a number is not finite, before anything is written."""
    for path, array in jax.tree.leaves_with_path(arrays):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{folder}: no snapshot is saved, because {name} is not finite; look for broken images among those"
                " learned last, or lower config.train.learning_rate."
            )


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The snapshots in a folder, by number."""
    return [(int(one.name), one) for one in folder.glob("*") if one.name.isdecimal()]


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Orbax's, for this process alone. Its CheckpointManager would read all snapshots' metadata, also damaged ones."""
    alone = processes.single_process()
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        record=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    with _silent_threads(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _write(folder: Path, shared: SharedArrays, arrays: Any, record: dict[str, Any], keep: int | None) -> None:
    """Writes a snapshot and, of all beside it, keeps the newest ones."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    arrays, by_object = separate(arrays)
    try:
        index = shared.write(by_object)
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            checkpointer.save(unfinished, args=args, force=True)
        write_whole(unfinished / _SHARED, json.dumps(index).encode())
        write_whole(unfinished / MANIFEST, json.dumps(hashes(unfinished), indent=1).encode())
        if folder.exists():  # of the same position, from which the run went on
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for _, old in sorted(_numbered(folder.parent), reverse=True)[keep:] if keep else []:
            shutil.rmtree(old)
    except (OSError, ValueError, UserError) as error:
        if isinstance(error, ValueError) and "os_error_code" not in str(error):  # not tensorstore's own OSError
            raise
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise UserError(
            f"{folder.parent}: the snapshot could not be saved ({_reason(cause)}); what was saved before is intact,"
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


def _damage(folder: Path, shared: SharedArrays) -> str | None:
    """What is wrong with a snapshot, None if all of its files are as they were written."""
    try:
        noted, found = json.loads((folder / MANIFEST).read_bytes()), hashes(folder)
        if noted == found:
            damaged = shared.damaged(_index(folder))
            return damaged and f"is damaged ({shared.folder.name}/{damaged} is missing or not as it was written)"
        differing = sorted(file for file in noted | found if noted.get(file) != found.get(file))
        return f"is damaged ({differing[0]} is missing or not as it was written)"
    except FileNotFoundError:
        return "is damaged (its manifest is missing)"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"
    except (ValueError, TypeError, AttributeError, RecursionError):
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


def _index(folder: Path) -> Index:
    return json.loads((folder / _SHARED).read_bytes())


def _restore(folder: Path, shared: SharedArrays) -> Progress:
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = checkpointer.restore(folder, args=args)
        arrays = jax.tree.map(np.asarray, restored.arrays)  # NumPy computes in float64 where JAX does not
        record = dict(restored.record)
        return Progress(
            **join(arrays, shared.read(_index(folder))),
            position=Position(**record.pop("position")),
            objects=tuple(record.pop("objects")),
            calibration={name: _calibration(one) for name, one in record.pop("calibration").items()},
            ledger=LedgerMark(**record.pop("ledger")),
            **record,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}: the snapshot cannot be read ({_reason(error)}); restore it.") from error


def _calibration(record: dict[str, Any]) -> Calibration:
    """As it was, infinite distances having been written as null."""
    arrays = {
        key: np.nan_to_num(np.array(value, np.float32), nan=np.inf)
        for key, value in record.items()
        if not isinstance(value, bool)
    }
    return Calibration(**record | arrays)


def stored(variables: Variables) -> Variables:
    """What snapshots store of a method's variables: all but frozen ones."""
    return {key: value for key, value in variables.items() if key != "frozen"}


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
