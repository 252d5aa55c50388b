"""Learn new objects: a run that is finished goes on with objects that came later.

    python -m iumad_jax.learn --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=washer

One step is added to the run for each new object, whatever the protocol it began with. Without --objects, all objects of
the dataset that the run has not learned are. --config.dataset.root=FOLDER and other keys under dataset name another
dataset to learn from, and keys under train change how long and how it is trained, for these steps alone.

--after=N --output=NEW undoes what the run learned after step N: NEW becomes a copy of the run as it was then, and goes
on with the objects named by --objects, if any. The run itself is not changed.

The first lines tell how well the new objects are judged and what learning them did to the others. Interrupted, the same
command resumes (after --after, with --workdir=NEW).
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _learn, changeable=("dataset", "train"), resumable=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    help_ = "New objects, separated by commas. Default: all that are new; with --after, none."
    flags.DEFINE_string("objects", None, help_, flag_values=values)
    flags.DEFINE_integer(
        "after", None, "Undoes all steps after this one, in a copy.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("output", None, "New folder for the copy of --after.", flag_values=values)


def _learn(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    if values.output and values.after is None:
        raise UserError("--output is the folder of the copy that --after=STEP makes; add --after, or omit --output.")
    from iumad_jax import config as configs
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.data import plan
    from iumad_jax.report import result_files
    from iumad_jax.runtime import workdir as workdirs
    from iumad_jax.training import undo
    from iumad_jax.training.dataset_changes import DatasetChanged

    config = workdirs.read(workdir)
    before, now = (configs.flat(json.loads(c.to_json())) for c in (config, values.config))
    changes = {key: value for key, value in now.items() if value != before[key]}
    earlier, steps, objects = result_files.read(workdir), plan.read(workdir), values.objects or "all"
    finished = len(earlier["steps"]) if earlier else 0
    if values.after is not None:
        steps, finished, objects = steps[: values.after + 1], values.after + 1, values.objects
    if not steps:
        raise UserError(
            f"{workdir} has no plan.json, so no step has begun; start the run again with its first command."
        )
    if objects:
        steps = plan.with_new(config, steps, objects, changes, finished)
    if values.after is not None:
        undo.copy_until(workdir, values.after, cli.path(values, "output"))
        workdir = Path(values.output)
    try:
        results = experiment.run(config, workdir, steps)
    except DatasetChanged as changed:
        print(_describe(changed.results, finished, workdir))
        raise
    assert results is not None  # one process
    return _describe(results, finished, workdir)


def _describe(results: dict[str, Any], finished: int, workdir: Path) -> str:
    """Describe what the steps after the first finished ones did, and then all results."""
    from iumad_jax.report import tables

    matrix, steps = results["matrix"]["i_auroc"], results["steps"]
    effects = [tables.effect_line(matrix, steps, step) for step in range(finished, len(steps))]
    return "\n".join([*effects, "", tables.console(results, workdir)]).lstrip("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
