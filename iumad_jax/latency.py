"""Measure the time of a prediction, by part, in JAX and in onnxruntime.

    python -m iumad_jax.latency --workdir=runs/quickstart_6-4_ib_iumad_rgb+depth_replay_seed0

Times are medians over repetitions, excluding the first call, which compiles. The image has 640 x 480 pixels of noise,
so the dataset is not needed. onnxruntime needs the extra iumad-jax[export].
"""

import sys

from absl import flags

from iumad_jax import cli
from iumad_jax.runtime import workdir as workdirs


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    flags.DEFINE_integer("repetitions", 20, "Number of timed calls per measurement.", lower_bound=1, flag_values=values)


def _measure(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.export import timing  # loads JAX, so wrong flags are reported first

    config = workdirs.read(workdir)
    cli.tell_slow("compiling the model for every engine and batch size, a few minutes.")
    return timing.measure(config, workdir, values.step, values.repetitions)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
