"""Learn new objects: a run that is finished goes on with objects that came later.

    python -m iumad_jax.learn --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=washer

One step is added to the run for each new object, whatever the protocol it began with. Without --objects, all objects of
the dataset that the run has not learned are. --config.dataset.root=FOLDER and other keys under dataset name another
dataset to learn from, and keys under train change how long and how it is trained, for these steps alone.

The first line tells how well the new objects are judged and what learning them did to the others. Interrupted, the same
command resumes.
"""

import json
import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _learn, changeable=("dataset", "train"), resumable=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("objects", "all", "New objects, separated by commas: all that are new.", flag_values=values)


def _learn(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax import config as configs
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.data import plan
    from iumad_jax.report import result_files, tables
    from iumad_jax.runtime import workdir as workdirs

    config = workdirs.read(workdir)
    before, now = (configs.flat(json.loads(c.to_json())) for c in (config, values.config))
    changes = {key: value for key, value in now.items() if value != before[key]}
    before_results = result_files.read(workdir)
    finished = len(before_results["steps"]) if before_results else 0
    steps = plan.with_new(config, workdir, values.objects, changes, finished)
    results = experiment.run(config, workdir, steps)
    if results is None:
        return "Process 0 prints the results."
    matrix = results["matrix"]["i_auroc"]
    effects = [tables.effect(matrix, results["steps"], step.index) for step in steps[finished:]]
    return "\n".join([*effects, "", tables.console(results, workdir)])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
