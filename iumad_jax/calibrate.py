"""Set the thresholds of learned objects anew, from good images that the run has not used.

    python -m iumad_jax.calibrate --workdir=runs/folder_open_ib_iumad_rgb+depth_replay_seed0 --objects=bolt

Nothing is trained: the images join those that the run keeps of the object, which set its thresholds and scales. They
are its new validation images or, if there are none, its new training images, of the run's dataset or of another one
that --config.dataset.root names. The first line tells the error rates on test images before and after.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _calibrate, changeable=("dataset",), resumable=True)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    help_ = "Learned objects, separated by commas. Default: all that have new images."
    flags.DEFINE_string("objects", None, help_, flag_values=values)


def _calibrate(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.training import additions

    config, changes = cli.run_and_changes(values)
    steps, finished = additions.begun(workdir)
    steps = additions.with_further(config, workdir, steps, finished, "calibrate", values.objects or "all", changes)
    return experiment.go_on(config, workdir, steps, finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
