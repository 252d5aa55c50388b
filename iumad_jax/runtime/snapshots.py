"""Orbax snapshots: one per finished step, and the two newest within steps.

A snapshot stores a `progress.Progress` without the frozen arrays of methods.

Every snapshot has a manifest with the SHA-256 of each file, because Orbax restores flipped bits without an error. The
folder is renamed to its final name after the manifest is written, so snapshots left incomplete by a crash are
recognised by their names.

Arrays of one object that never change, under the keys BY_OBJECT of the variables and of the strategy's state, are
written once to `snapshots/by_object/<SHA-256>.npy` and shared by all later snapshots.
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
from iumad_jax.runtime.shared_arrays import Index, Items, SharedArrays, join, separate
from iumad_jax.runtime.storage import as_json, write_whole
from iumad_jax.shapes import Calibration, Scale, Scales, Variables

MANIFEST = "sha256.json"
_SHARED = "by_object.json"  # file in a snapshot: index of its shared arrays
_ARRAYS = ("variables", "recognition", "optimizer", "strategy_state", "losses")  # fields of Progress not in JSON
_UPDATES = 10**12  # more updates than any step has
_UNFINISHED = ".unfinished"  # suffix of snapshots that are being written


class Snapshots:
    """Snapshots of one workdir, written by a background thread while training continues."""

    def __init__(self, workdir: Path) -> None:
        """Open the snapshots of a workdir and remove incomplete ones.

        Raises:
            UserError: If the workdir is not writable.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.shared = shared_arrays(workdir)
        self._finished, self._within = ((workdir / name).absolute() for name in ("snapshots", "snapshots_within_step"))
        for folder in (self._finished, self._within):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for unfinished in folder.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(unfinished)
            except OSError as error:
                raise UserError(
                    f"{folder} cannot be written ({_reason(error)}); make room on the disk or choose another --workdir."
                ) from error
        self.last_save = time.monotonic()  # start of the last save; before the first, the time of opening
        self._thread = ThreadPoolExecutor(1, "snapshots")
        self._saving: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Start saving a snapshot in the background. Only process 0 saves.

        Snapshots of finished steps are kept; of those within steps, only the two newest.

        Raises:
            UserError: If a number is not finite, or if the previous snapshot could not be written.
        """
        self.last_save = time.monotonic()
        if not processes.is_process_zero():
            return
        self.wait()
        step, updates, finished = progress.position
        folder = self._finished / str(step) if finished else self._within / str(step * _UPDATES + updates)
        variables = {name: stored(values) for name, values in progress.variables.items()}
        fields = progress._replace(variables=variables)._asdict()
        arrays, by_object = separate({key: fields[key] for key in _ARRAYS})
        arrays = jax.tree.map(np.array, arrays)  # copies, as training reuses its buffers
        items = self.shared.copy(by_object)
        calibration = {
            name: (scores.score, scores.peak, scores.distance[:, :2]) for name, scores in progress.calibration.items()
        }
        new = jax.tree.map(lambda item: item.array, items)
        _check_finite(arrays | new | {"calibration": calibration, "scales": progress.scales}, folder)
        record = {key: value for key, value in fields.items() if key not in _ARRAYS}
        record |= {name: value._asdict() for name, value in record.items() if name in ("position", "ledger")}
        record["calibration"] = {name: scores._asdict() for name, scores in progress.calibration.items()}
        record["scales"] = {
            name: {m: scale._asdict() for m, scale in scales.items()} for name, scales in progress.scales.items()
        }
        keep = None if finished else 2
        self._saving = self._thread.submit(_write, folder, self.shared, arrays, items, as_json(record), keep)

    @property
    def failed(self) -> bool:
        """Whether the last snapshot could not be written. The next `save` or `wait` raises the error."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until the last snapshot is on disk.

        Raises:
            UserError: If it cannot be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> Progress | None:
        """Return the intact snapshot of the furthest position, or None if no snapshot was ever taken.

        Damaged snapshots of later positions are set aside.

        Raises:
            UserError: If all snapshots are damaged, or if the snapshot cannot be read.
        """
        self.wait()
        folders = [((step + 1) * _UPDATES, folder) for step, folder in _numbered(self._finished)]
        folders += _numbered(self._within)
        damages: list[tuple[Path, str]] = []
        for _, folder in sorted(folders, reverse=True):
            if (damage := _damage(folder, self.shared)) is None:
                for damaged_folder, description in damages:
                    _set_aside(damaged_folder, description, folder)
                return _restore(folder, self.shared)
            damages.append((folder, damage))
        if damages:
            reasons = "; ".join(f"{folder} {damage}" for folder, damage in damages)
            raise UserError(
                f"no snapshot can be used: {reasons}; restore one from a backup, or start again in another --workdir."
            )
        return None

    def close(self) -> None:
        """Wait until the last snapshot is on disk and stop the thread.

        Raises:
            UserError: If the snapshot cannot be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def last_step(workdir: Path) -> int:
    """Return the last finished step of which there is a snapshot, intact or not; -1 if there is none."""
    return max((step for step, _ in _numbered(workdir / "snapshots")), default=-1)


def read(workdir: Path, step: int | None = None, after: int = -1) -> Progress:
    """Read the snapshot of a finished step, by default the last intact one. The workdir is not changed.

    Args:
        workdir: Workdir of a run.
        step: Number of the step; None for the last one with an intact snapshot.
        after: Number of a step; its snapshot and earlier ones are ignored.

    Raises:
        UserError: If the snapshot does not exist or is damaged.
    """
    folder, shared = (workdir / "snapshots").absolute(), shared_arrays(workdir)
    folder_by_step = {number: snapshot for number, snapshot in _numbered(folder) if number > after}
    problems: list[str] = []
    for number in sorted(folder_by_step, reverse=True) if step is None else {step} & set(folder_by_step):
        damage = _damage(folder_by_step[number], shared)
        if damage is None:
            for problem in problems:
                print(f"iumad_jax: {problem}; using {folder_by_step[number]} instead.", file=sys.stderr)
            return _restore(folder_by_step[number], shared)
        problems.append(f"{folder_by_step[number]} {damage}")
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; restore it from a backup, or choose another --step or another --workdir."
        )
    if not workdir.is_dir():
        raise UserError(f"{workdir} does not exist; choose the --workdir of a run.")
    if not folder_by_step:
        raise UserError(f"{folder} holds no snapshot of a finished step; let the run finish its first step.")
    steps = ", ".join(map(str, sorted(folder_by_step)))
    raise UserError(f"{folder} holds no snapshot of step {step}; choose one of the finished steps {steps}.")


def shared_arrays(workdir: Path) -> SharedArrays:
    """Return the arrays that the snapshots of a workdir share."""
    return SharedArrays((workdir / "snapshots").absolute() / "by_object")


def _check_finite(arrays: dict[str, Any], folder: Path) -> None:
    """Raise UserError if a number is not finite."""
    for path, array in jax.tree.leaves_with_path(arrays):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{folder} is not saved, because {name} is not finite; look for damaged images among those learned"
                " last, or lower config.train.learning_rate."
            )


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """List the snapshots in a folder with the numbers that are their names."""
    return [(int(snapshot.name), snapshot) for snapshot in folder.glob("*") if snapshot.name.isdecimal()]


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    """Open an Orbax checkpointer for this process only.

    Orbax's CheckpointManager is not used because it reads the metadata of all snapshots, including damaged ones.
    """
    options = processes.single_process()
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        record=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    with _silent_threads(), ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        yield checkpointer


def _write(
    folder: Path, shared: SharedArrays, arrays: Any, items: Items, record: dict[str, Any], keep: int | None
) -> None:
    """Write a snapshot and delete all but the `keep` newest ones beside it; None keeps all."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    try:
        index = shared.write(items)
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record))
            checkpointer.save(unfinished, args=args, force=True)
        write_whole(unfinished / _SHARED, json.dumps(index).encode())
        write_whole(unfinished / MANIFEST, json.dumps(hashes(unfinished), indent=1).encode())
        if folder.exists():  # an earlier snapshot of the same position, from which the run was resumed
            shutil.rmtree(folder)
        unfinished.rename(folder)
        for _, old in sorted(_numbered(folder.parent), reverse=True)[keep:] if keep else []:
            shutil.rmtree(old)
    except (OSError, ValueError, UserError) as error:
        if isinstance(error, ValueError) and "os_error_code" not in str(error):  # how tensorstore reports OS errors
            raise
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise UserError(
            f"{folder.parent}: the snapshot could not be saved ({_reason(cause)}); earlier snapshots are intact, so"
            " make room on the disk and run the same command again."
        ) from error


def hashes(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of every file in a snapshot except the manifest, by path relative to the folder."""
    hashes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            with file.open("rb") as stream:
                hashes[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _damage(folder: Path, shared: SharedArrays) -> str | None:
    """Describe the damage of a snapshot, as the predicate of a sentence; None if all files are intact."""
    try:
        expected, actual = json.loads((folder / MANIFEST).read_bytes()), hashes(folder)
        if expected == actual:
            damaged = shared.damaged(_index(folder))
            return damaged and f"is damaged ({shared.folder.name}/{damaged} is missing or was changed)"
        differing = sorted(file for file in expected | actual if expected.get(file) != actual.get(file))
        return f"is damaged ({differing[0]} is missing or was changed)"
    except FileNotFoundError:
        return "is damaged (its manifest is missing)"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "is damaged (its manifest was changed)"


def _set_aside(folder: Path, damage: str, replacement: Path) -> None:
    """Rename a damaged snapshot and print which snapshot replaces it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"{folder} {damage} but cannot be renamed ({_reason(error)}); make its folder writable."
        ) from error
    message = f"{folder} {damage}; it was renamed to {aside.name}, and the run continues from {replacement}."
    print(f"iumad_jax: {message}", file=sys.stderr, flush=True)


def _index(folder: Path) -> Index:
    return json.loads((folder / _SHARED).read_bytes())


def _restore(folder: Path, shared: SharedArrays) -> Progress:
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = checkpointer.restore(folder, args=args)
        arrays = jax.tree.map(np.asarray, restored.arrays)  # NumPy, which computes in float64 where JAX does not
        record = dict(restored.record)
        return Progress(
            **join(arrays, shared.read(_index(folder))),
            position=Position(**record.pop("position")),
            objects=tuple(record.pop("objects")),
            calibration={name: _calibration(scores) for name, scores in record.pop("calibration").items()},
            scales={name: _scales(scales) for name, scales in record.pop("scales").items()},
            ledger=LedgerMark(**record.pop("ledger")),
            **record,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} cannot be read ({_reason(error)}); restore it from a backup.") from error


def _calibration(record: dict[str, Any]) -> Calibration:
    """Restore a calibration from its record, in which infinite distances are null."""
    arrays = {
        key: np.nan_to_num(np.array(value, np.float32), nan=np.inf)
        for key, value in record.items()
        if isinstance(value, list)
    }
    return Calibration(**record | arrays)


def _scales(record: dict[str, Any]) -> Scales:
    return {m: Scale(**{key: np.array(v, np.float32) for key, v in scale.items()}) for m, scale in record.items()}


def stored(variables: Variables) -> Variables:
    """Return the variables of a method that snapshots store: all but the frozen ones."""
    return {key: value for key, value in variables.items() if key != "frozen"}


def size_of(tree: Any) -> int:
    """Return the size of all arrays in bytes."""
    return sum(np.asarray(array).nbytes for array in jax.tree.leaves(tree))


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Silence Orbax's threads, which print and log a traceback of every error that they also raise.

    After an error they remain silenced, because some of them fail only later, while the run ends with the error.
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
    """Return the reason of an error without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    last = str(error).splitlines()[0].rsplit(": ", 1)[-1] if str(error) else type(error).__name__
    return last.split(" [")[0]  # drops the details that tensorstore appends in brackets
