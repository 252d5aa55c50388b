"""Measure the robustness of a trained model to noise, blur, JPEG, brightness and depth noise.

    python -m iumad_jax.robustness --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

The test images of the run's dataset, or of the dataset that --config.dataset.KEY=VALUE names, are predicted unchanged
and with corruptions of several strengths. The table contains means over learned objects: I-AUROC, false alarms, misses,
images recognised correctly, and images taken as unknown, the latter also for objects that were never learned.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, cli.define_trained, _measure, changeable=("dataset",))


def _measure(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.inference import corruption_sweep  # loads JAX, so wrong flags are reported first
    from iumad_jax.runtime import snapshots

    return corruption_sweep.measure(values.config, workdir, snapshots.read(workdir, values.step))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
