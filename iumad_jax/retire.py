"""Retire objects: the model no longer recognises them or decides about them. Their results stay.

    python -m iumad_jax.retire --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=bolt

python -m iumad_jax.learn --after=N undoes it.
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


def _retire(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    if not values.objects:
        raise UserError("--objects is missing; name the objects to retire.")
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.runtime import workdir as workdirs
    from iumad_jax.training import additions

    config = workdirs.read(workdir)
    steps, finished = additions.begun(workdir)
    return experiment.go_on(config, workdir, additions.with_retired(steps, finished, values.objects), finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
