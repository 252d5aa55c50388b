"""Train and evaluate a method: it learns the objects of a dataset step by step.

    python -m iumad_jax.main --config=quickstart

Results, tables, pictures and a report are written to the workdir. The same command resumes an interrupted run.

All devices of the process are used. On several hosts, start the same command on each, with --cluster under SLURM or
Open MPI, else with --coordinator, --processes and --process. The workdir and the dataset must be on a shared disk.
"""

import sys

from absl import flags

from iumad_jax import cli


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _train, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_bool(
        "cluster", False, "Detect coordinator, processes and rank from SLURM or Open MPI.", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with any free port.", flag_values=values)
    flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Rank of this process, from 0.", lower_bound=0, flag_values=values)


def _train(values: flags.FlagValues) -> str:
    config, workdir = cli.config_and_workdir(values)
    from iumad_jax import experiment  # loads JAX, so wrong flags are reported first
    from iumad_jax.report import tables
    from iumad_jax.runtime import joining
    from iumad_jax.training.dataset_changes import DatasetChanged

    with joining.joined(values.coordinator, values.processes, values.process, values.cluster):
        try:
            results = experiment.run(config, workdir)
        except DatasetChanged as changed:
            print(tables.console(changed.results, workdir))
            raise
    return tables.console(results, workdir) if results else "Process 0 prints the results."


if __name__ == "__main__":
    sys.exit(main(sys.argv))
