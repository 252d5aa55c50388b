"""Learn new objects, or more of a learned one: a finished run goes on with what came later.

    python -m iumad_jax.learn --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=washer

One step is added to the run for each new object, whatever the protocol it began with. Without --objects, all objects of
the dataset that the run has not learned are. --config.dataset.root=FOLDER and other keys under dataset name another
dataset to learn from, and keys under train change how long and how it is trained, for these steps alone.

--update learns further good images of objects that the run has learned: images that it has not used yet, added to the
dataset (such as false alarms that a person called good) or in another one that --config.dataset.root names.

--after=N --output=NEW undoes what the run learned after step N: NEW becomes a copy of the run as it was then, and goes
on with the objects named by --objects, if any. The run itself is not changed.

The first lines tell how well the objects of the step are judged and what it did to the others. Interrupted, the same
command resumes (after --after, with --workdir=NEW).
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _learn, changeable=("dataset", "train"), resumable=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    help_ = "Objects, separated by commas. Default: all that are new; with --update, all with new images; with --after,"
    flags.DEFINE_string("objects", None, f"{help_} none.", flag_values=values)
    flags.DEFINE_bool("update", False, "Learns further images of learned objects.", flag_values=values)
    flags.DEFINE_integer(
        "after", None, "Undoes all steps after this one, in a copy.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string("output", None, "New folder for the copy of --after.", flag_values=values)


def _learn(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    if values.output and values.after is None:
        raise UserError("--output is the folder of the copy that --after=STEP makes; add --after, or omit --output.")
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.training import additions, undo

    config, changes = cli.run_and_changes(values)
    (steps, finished), objects = additions.begun(workdir), values.objects or "all"
    if values.after is not None:
        steps, finished, objects = steps[: values.after + 1], values.after + 1, values.objects
    if objects and values.update:
        steps = additions.with_further(config, workdir, steps, finished, "update", objects, changes)
    elif objects:
        steps = additions.with_new(config, steps, objects, changes, finished)
    if values.after is not None:
        undo.copy_until(workdir, values.after, cli.path(values, "output"))
        workdir = Path(values.output)
    return experiment.go_on(config, workdir, steps, finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
