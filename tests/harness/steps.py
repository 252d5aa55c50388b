"""Show what the steps of a finished run cost: seconds, bytes on disk, recognition.

    python -m tests.harness.steps --workdir=RUN --steps=10,100

The first step is step 1 here. `learning` lasts until the first object has been evaluated, thresholds included;
`evaluation` is the rest. Bytes are those of the step's snapshot, without arrays that it shares with earlier ones.
"""

import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tabulate import tabulate

from iumad_jax import cli
from iumad_jax.errors import UserError

HEADERS = ("step", "learning s", "training s", "evaluation s", "snapshot MB", "I-AUROC of all", "recognised")


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_list("steps", "10,100", "Numbers of steps, separated by commas.", flag_values=values)
    flags.DEFINE_integer("around", 0, "Steps before and after each, of which medians are shown.", flag_values=values)


def _measure(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.report.history import history  # loads JAX, so wrong flags are reported first
    from iumad_jax.runtime import ledger
    from iumad_jax.runtime import workdir as workdirs

    config = workdirs.read(workdir)
    measured = history(ledger.read(workdir / "ledger.jsonl"))
    seconds = _seconds(ledger.read(workdir / "live.jsonl"))
    added = list(_bytes_added(workdir / "snapshots", len(measured.steps)))
    quality = measured.matrices[config.method]["i_auroc"]
    rows = []
    for number in map(int, values.steps):
        if not 0 < number <= len(measured.steps):
            raise UserError(f"--steps has {number}, but {workdir} has {len(measured.steps)} finished steps.")
        nearby = range(max(number - 1 - values.around, 1), min(number + values.around, len(measured.steps)))
        cost = np.median([[*seconds[step], added[step] / 1e6] for step in nearby or [0]], axis=0)
        objects = measured.decisions[number - 1]["objects"].values()
        recognised = np.mean([record["test"]["recognised"] for record in objects])
        rows.append([number, *cost, np.nanmean(quality[number - 1]), recognised])
    return tabulate(rows, HEADERS, "github", floatfmt=("d", ".1f", ".1f", ".1f", ".2f", ".3f", ".3f"))


def _seconds(events: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Return the seconds of learning, of the training in it, and of evaluation, by step."""
    durations, ended = [], None
    for event in events:
        time = datetime.fromisoformat(event["time"])
        if event["event"] == "step":
            begun = trained = time
            evaluated = None
        elif event["event"] == "epoch":
            trained = time
        elif event["event"] == "evaluation":
            evaluated = evaluated or time
        elif event["event"] == "snapshot":
            learned = evaluated or time
            spans = learned - (ended or begun), trained - begun, time - learned
            durations.append(tuple(span.total_seconds() for span in spans))
            ended = time
    return durations


def _bytes_added(folder: Path, steps: int) -> Iterator[int]:
    """Yield the bytes that each step's snapshot adds to the disk."""
    stored = {file.stem: file.stat().st_size for file in (folder / "by_object").iterdir()}
    seen: set[str] = set()
    for step in range(steps):
        files = [file for file in (folder / str(step)).rglob("*") if file.is_file()]
        names = "".join(file.read_text() for file in files if file.name in ("by_object.json", "metadata"))
        shared = stored.keys() & set(re.findall(r"\b[0-9a-f]{64}\b", names))
        yield sum(file.stat().st_size for file in files) + sum(stored[name] for name in shared - seen)
        seen |= shared


if __name__ == "__main__":
    sys.exit(main(sys.argv))
