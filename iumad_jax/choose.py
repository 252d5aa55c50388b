"""Compare settings on synthetic defects in calibration images, without looking at test images.

    python -m iumad_jax.choose --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

Every method of the runs is compared with every combination of modalities (config.combine) and every image score
(config.score). The table lists means over objects; the setting with the highest mean of the three metrics comes first.
A run keeps its combination and its score; use others in a new run. Synthetic defects are stains, bumps and dents: if
real defects look different, another setting may be better.
"""

import sys
from pathlib import Path

from absl import flags

from iumad_jax import cli
from iumad_jax.runtime import workdir as workdirs


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _choose)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "Folders of trained runs, separated by commas.", flag_values=values)
    help_ = "Largest number of calibration images per object."
    flags.DEFINE_integer("images", 16, help_, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("defects", 4, "Number of defective copies per image.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the defects.", lower_bound=0, flag_values=values)


def _choose(values: flags.FlagValues) -> str:
    cli.path(values, "workdir")
    folders = [Path(name) for name in values.workdir.split(",")]
    for folder in folders:
        workdirs.read(folder)
    from iumad_jax.inference import choosing  # loads JAX, so wrong flags are reported first

    return choosing.compare(folders, values.images, values.defects, values.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
