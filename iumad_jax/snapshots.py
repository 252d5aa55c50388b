"""Orbax snapshots: one per incremental step, and the newest one within a step."""

import hashlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from iumad_jax.errors import UserError
from iumad_jax.shapes import Variables


class Position(NamedTuple):
    """How far a run is. Randomness and the order of the data are functions of this and the seed."""

    step: int
    epochs: int  # done within the step
    finished: bool = False  # the step is trained and evaluated


class Snapshot(NamedTuple):
    """Everything needed to go on."""

    position: Position
    variables: dict[str, Variables]  # by system
    optimizer: list[Any]  # the leaves of its state; empty after a finished step
    record: dict[str, Any]  # what the ledger and the results held
    memory: dict[str, Any]  # of the strategy against forgetting


class Snapshots:
    """The snapshots of one workdir."""

    def __init__(self, workdir: Path) -> None:
        """Opens them; what a killed save left behind is removed."""
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._finished = self._manager(workdir / "snapshots", keep=None)
        self._within = self._manager(workdir / "snapshots_within_step", keep=1)

    @staticmethod
    def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, snapshot: Snapshot) -> None:
        """Saves a snapshot; a finished step's stays, one within a step replaces the one before.

        Raises:
            UserError: it cannot be written, as when the disk is full.
        """
        step, epochs, finished = snapshot.position
        manager, number = (self._finished, step) if finished else (self._within, step * 10**6 + epochs)
        kept = {"variables": snapshot.variables, "optimizer": snapshot.optimizer, "memory": snapshot.memory}
        arrays = jax.tree.map(np.asarray, kept)
        record = {"position": snapshot.position._asdict(), "sha256": _digest(arrays), **snapshot.record}
        try:
            with _silent_threads():
                manager.save(
                    number,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardSave(arrays),
                        record=ocp.args.JsonSave(record),
                    ),
                )
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "os_error_code" not in str(error):  # not tensorstore's own OSError
                raise
            raise UserError(
                f"{manager.directory}: the snapshot could not be saved ({_reason(error)}); the one before it is intact,"
                " so make room and run the same command again."
            ) from error

    def latest(self) -> Snapshot | None:
        """The snapshot of the furthest position, or None.

        Raises:
            UserError: it cannot be read.
        """
        managers = [manager for manager in (self._within, self._finished) if manager.latest_step() is not None]
        found = [_restore(manager, manager.latest_step()) for manager in managers]
        return max(found, key=lambda s: (s.position.step, s.position.finished), default=None)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._finished.close()
        self._within.close()


def read(workdir: Path, step: int | None = None) -> Snapshot:
    """The snapshot of a finished step, by default the last one; nothing in the workdir is changed.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder = (workdir / "snapshots").absolute()
    steps: list[int] = []
    if folder.is_dir():
        with _silent_threads(), _reader(folder) as manager:
            steps = sorted(manager.all_steps())
            if steps and step in (None, *steps):
                return _restore(manager, steps[-1] if step is None else step)
    found = f"finished are {', '.join(map(str, steps))}" if steps else "none is finished"
    wanted = "any step" if step is None else f"step {step}"
    raise UserError(f"{folder} holds no snapshot of {wanted}; {found}.")


def _reader(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def _restore(manager: ocp.CheckpointManager, number: int) -> Snapshot:
    try:
        with _silent_threads():
            restored = manager.restore(
                number, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            )
        record = dict(restored.record)
        if record.pop("sha256") != _digest(restored.arrays):
            raise ValueError("its arrays are not those that were saved")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory / str(number)}: the snapshot cannot be read ({_reason(error)}); remove this folder"
            " to go on from the one before."
        ) from error
    return Snapshot(position=Position(**record.pop("position")), record=record, **restored.arrays)


def size_of(tree: Any) -> int:
    """The bytes of all arrays."""
    return sum(np.asarray(array).nbytes for array in jax.tree.leaves(tree))


def _digest(arrays: Any) -> str:
    """Of all numbers: Orbax does not notice single flipped bits."""
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(arrays))).hexdigest()


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
