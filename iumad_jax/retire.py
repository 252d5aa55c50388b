"""Retire objects: the model no longer recognises them or decides about them. Their results stay.

    python -m iumad_jax.retire --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=bolt

--undo takes retired objects back into use, with what the run has learned since; of a trained method, their thresholds
are set anew from the calibration images that the run keeps.
"""

import sys

from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _retire, resumable=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string("objects", None, "Learned objects, separated by commas.", flag_values=values)
    flags.DEFINE_bool("undo", False, "Takes retired objects back into use.", flag_values=values)


def _retire(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    if not values.objects:
        raise UserError("--objects is missing; name the objects to retire, or with --undo those to take back.")
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.runtime import workdir as workdirs
    from iumad_jax.training import additions

    config = workdirs.read(workdir)
    steps, finished = additions.begun(workdir)
    add = additions.with_restored if values.undo else additions.with_retired
    return experiment.go_on(config, workdir, add(steps, finished, values.objects), finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
