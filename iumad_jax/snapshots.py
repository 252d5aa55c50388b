"""Orbax snapshots: one per incremental step, and the two newest within a step.

Every snapshot has a manifest, the SHA-256 of each of its files, because Orbax restores flipped bits silently. It is
written last: what has none was never finished.
"""

import copy
import hashlib
import json
import logging
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
        self._finished = self._manager(workdir / "snapshots", keep=None)
        self._within = self._manager(workdir / "snapshots_within_step", keep=2)
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._saving: Future[None] | None = None

    @staticmethod
    def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            create=False,
            multiprocessing_options=parallel.alone(),
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)  # Orbax would tell when it saves
        except OSError as error:
            raise UserError(f"{folder}: not a writable folder ({_reason(error)}); make room for one.") from error
        with _silent_threads():  # it reads what may be damaged
            return ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, snapshot: Snapshot) -> None:
        """Begins to save a snapshot; a finished step's stays, one within a step replaces the last but one before.

        Raises:
            UserError: the one before could not be written, as when the disk is full.
        """
        self.wait()
        step, updates, finished = snapshot.position
        manager, number = (self._finished, step) if finished else (self._within, step * _UPDATES + updates)
        kept = {key: getattr(snapshot, key) for key in ("variables", "optimizer", "losses", "memory")}
        arrays = jax.tree.map(np.array, kept)  # copies: training reuses its buffers
        record = copy.deepcopy(snapshot.record) | {"position": snapshot.position._asdict()}
        self._saving = self._thread.submit(_write, manager, number, arrays, record)

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
        there = [((number + 1) * _UPDATES, number, self._finished) for number in self._finished.all_steps()]
        there += [(number, number, self._within) for number in self._within.all_steps()]
        damaged: list[tuple[Path, str]] = []
        for _, number, manager in sorted(there, key=lambda one: one[0], reverse=True):
            folder = Path(manager.directory / str(number))
            if (damage := _damage(folder)) is None:
                for other, reason in damaged:
                    _set_aside(other, f"{reason}; going on from {folder}")
                with _silent_threads():
                    self._finished.reload()
                    self._within.reload()
                return _restore(manager, number)
            damaged.append((folder, damage))
        if damaged:
            told = "; ".join(f"{folder} {damage}" for folder, damage in damaged)
            raise UserError(f"no snapshot can be used: {told}; restore one, or start again in another --workdir.")
        return None

    def close(self) -> None:
        """Waits until everything is on disk and ends all threads.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._finished.close()
            self._within.close()


def read(workdir: Path, step: int | None = None) -> Snapshot:
    """The snapshot of a finished step, by default the last one that is whole; nothing in the workdir is changed.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = (workdir / "snapshots").absolute()
    steps: list[int] = []
    damaged: list[str] = []
    if folder.is_dir():
        with _silent_threads(), _reader(folder) as manager:
            steps = sorted(manager.all_steps())
            for number in reversed(steps) if step is None else {step} & set(steps):
                damage = _damage(folder / str(number))
                if damage is None:
                    for told in damaged:
                        print(f"iumad_jax: {told}; using {folder / str(number)}", file=sys.stderr)
                    return _restore(manager, number)
                damaged.append(f"{folder / str(number)} {damage}")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: restore it, or choose another --step or --workdir.")
    found = f"finished are {', '.join(map(str, steps))}" if steps else "none is finished"
    wanted = "any step" if step is None else f"step {step}"
    raise UserError(f"{folder} holds no snapshot of {wanted}; {found}.")


def _reader(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        read_only=True, enable_async_checkpointing=False, multiprocessing_options=parallel.alone()
    )
    return ocp.CheckpointManager(folder, options=options)


def _write(manager: ocp.CheckpointManager, number: int, arrays: Any, record: dict[str, Any]) -> None:
    try:
        with _silent_threads():
            manager.save(
                number,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)),
                force=True,
            )
        folder = Path(manager.directory / str(number))
        write_whole(folder / MANIFEST, json.dumps(hashes(folder), indent=1).encode())
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "os_error_code" not in str(error):  # not tensorstore's own OSError
            raise
        raise UserError(
            f"{manager.directory}: the snapshot could not be saved ({_reason(error)}); the one before it is intact,"
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
        return "was not finished or is damaged (it has no manifest)"
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


def _restore(manager: ocp.CheckpointManager, number: int) -> Snapshot:
    try:
        with _silent_threads():
            restored = manager.restore(
                number, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            )
        record = dict(restored.record)
        arrays = jax.tree.map(np.asarray, restored.arrays)  # NumPy computes in float64 where JAX does not
        return Snapshot(position=Position(**record.pop("position")), record=record, **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manager.directory / str(number)}: the snapshot cannot be read ({_reason(error)}); restore it."
        ) from error


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
