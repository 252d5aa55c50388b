"""What a trained model makes of worse photographs and depth: python -m iumad_jax.robustness --workdir=FOLDER.

The test images of the run's dataset, or of the one that --config.dataset.KEY=VALUE names, are judged as they are and
with faults of several strengths. Told are means over learned objects of the I-AUROC and of how often decisions err,
also on images that are taken for unknown; and which share is, of images of learned objects and of those never learned.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, cli.define_trained, _measure, dataset=True)


def _measure(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.inference import fault_sweep  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.runtime import snapshots

    return fault_sweep.measure(values.config, workdir, snapshots.read(workdir, values.step))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
