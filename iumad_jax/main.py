"""Trains and evaluates one method under one protocol: python -m iumad_jax.main --config=configs/quickstart.py.

It uses all devices of this process. On several hosts, the same command is started on each, with --cluster where JAX
finds out by itself how they belong together (SLURM, Open MPI), or else with the last three flags, and with a --workdir
and a dataset that all share.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _train, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_bool("cluster", False, "Be one of the processes that SLURM or Open MPI started.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT, any free port of process 0's host.", flag_values=values)
    flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Which this is, from 0.", lower_bound=0, flag_values=values)


def _train(values: flags.FlagValues) -> str:
    config, workdir = cli.given_config(values)
    from iumad_jax import experiment
    from iumad_jax.report import tables
    from iumad_jax.runtime import joining  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.training.dataset_changes import DatasetChanged

    with joining.joined(values.coordinator, values.processes, values.process, values.cluster):
        try:
            results = experiment.run(config, workdir)
        except DatasetChanged as changed:
            print(tables.console(changed.results, workdir))
            raise
    return tables.console(results, workdir) if results else "Process 0 tells the results."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
