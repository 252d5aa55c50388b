"""How long a trained model takes to look at an image: python -m iumad_jax.latency --workdir=FOLDER.

In JAX, and in onnxruntime where the packages of iumad-jax[export] are installed. The image is the first test image of
the run's dataset, or of the one that --config.dataset.KEY=VALUE names. Medians of repetitions after a first call, which
compiles.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure, dataset=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    flags.DEFINE_integer("repetitions", 20, "Of every measurement.", lower_bound=1, flag_values=values)


def _measure(values: flags.FlagValues) -> str:
    workdir = cli.path(values, "workdir")
    from iumad_jax.export import timing  # after the flags: a typo is told at once, before JAX is loaded

    return timing.measure(values.config, workdir, values.step, values.repetitions)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
