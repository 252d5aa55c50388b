"""Trains and evaluates one method under one protocol: python -m iumad_jax.main --config=configs/quickstart.py."""

import sys

from absl import flags

from iumad_jax import commands


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return commands.execute(str(__doc__), arguments, _define, _train, resumable=True)


def _define(values: flags.FlagValues) -> None:
    commands.define_config(values)
    commands.define_workdir(values)


def _train(values: flags.FlagValues) -> str:
    config, workdir = commands.given_config(values)
    from iumad_jax import experiment  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.report import tables

    return tables.console(experiment.run(config, workdir), workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
