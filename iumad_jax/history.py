"""Show what a run learned, when, from how many images, and what each step did to the objects learned before.

    python -m iumad_jax.history --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

Values are I-AUROC on test images. A step that was trained with other config keys than the run lists them.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _show)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)


def _show(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.report import history  # loads JAX, so wrong flags are reported first
    from iumad_jax.runtime import workdir as workdirs

    return history.table_of_steps(workdirs.read(workdir).method, workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
