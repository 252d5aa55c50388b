"""Copies a run as it was after a step, which undoes what it learned later."""

import shutil
from pathlib import Path

from iumad_jax.data import plan
from iumad_jax.data.prepared import inventory
from iumad_jax.errors import UserError
from iumad_jax.runtime import ledger, snapshots
from iumad_jax.runtime.storage import write_error, write_whole

_SHARED = ("config.json", "snapshots/by_object", "prepared")  # the same after all steps


def copy_until(workdir: Path, step: int, output: Path) -> None:
    """Copy a run as it was after a step to a new folder, which appears only when it is complete.

    Raises:
        UserError: If the step has no intact snapshot, the folder exists, or it cannot be written.
    """
    progress, all_steps = snapshots.read(workdir, step), plan.read(workdir)
    steps, undone = all_steps[: step + 1], all_steps[step + 1 :]
    if output.exists():
        raise UserError(f"--output={output} exists; choose a new folder for the run without its later steps.")
    unfinished = output.with_name(f"{output.name}.unfinished")
    names = [*_SHARED, *(f"snapshots/{number}" for number in range(step + 1))]
    for folder in ("samples", "pictures"):
        names += [f"{folder}/{file.name}" for file in (workdir / folder).glob("*") if _number(file) <= step]
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in names:
            source, target = workdir / name, unfinished / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.exists():
                shutil.copy2(source, target)
        for name, count in {"ledger.jsonl": progress.ledger.lines, "live.jsonl": _end_of_step(workdir, step)}.items():
            lines = (workdir / name).read_bytes().splitlines(keepends=True)
            write_whole(unfinished / name, b"".join(lines[:count]))
        recorded = {name: images for name, images in inventory.read(workdir).items() if name in steps[-1].seen}
        for name in {name for undone_step in undone for name in undone_step.images} & set(recorded):
            recorded[name].pop("test", None)  # it may be that of another dataset
        inventory.write(unfinished, recorded)
        plan.write(unfinished, steps)
        unfinished.rename(output)
    except OSError as error:
        raise write_error(output, error) from error


def _number(file: Path) -> int:
    """Return the step in the name of a file such as step2_nut.jpg; -1 for files of no step."""
    digits = file.name.removeprefix("step").partition("_")[0]
    return int(digits) if digits.isdecimal() else -1


def _end_of_step(workdir: Path, step: int) -> int:
    """Return the number of lines of live.jsonl up to the end of a step."""
    events = enumerate(ledger.read(workdir / "live.jsonl"), 1)
    ends = [number for number, event in events if (event["event"], event.get("step")) == ("snapshot", step)]
    return ends[-1] if ends else 0
