"""Trains a grid of runs into one table: python -m iumad_jax.benchmark --config=configs/benchmark.py.

Systems x modalities x protocols x seeds, one run per cell.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax import config as configs
from iumad_jax.errors import UserError


def benchmark(config: ConfigDict, workdir: Path) -> str:
    """Runs every cell that is not finished yet and returns the table of all in the workdir, written after each.

    Pictures are drawn at the end. A cell that cannot be trained is told and left out, which is an error in the end.

    Args:
        config: a run's config, with `config.benchmark` (explained in configs/benchmark.py).
        workdir: every cell is a run in a folder of its own in there, and may have come from another command.
    """
    todo, table, stopped = list(configs.cells(config)), "", []
    import jax  # after the config was looked at: a mistake is told at once

    from iumad_jax import experiment
    from iumad_jax.report import comparison

    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # most cells share their programs
    for number, (cell, key) in enumerate(todo, 1):
        name = comparison.name(*key)
        print(f"cell {number} of {len(todo)}: {name}", flush=True)
        cell.dataset.prepared = cell.dataset.prepared or str(workdir / "prepared")
        try:
            experiment.run(cell, workdir / "cells" / name)
        except UserError as error:
            print(f"{name} stopped: {error}", file=sys.stderr, flush=True)
            stopped.append(name)
        jax.clear_caches()
        table = comparison.write(workdir)
    comparison.draw(workdir)
    if stopped:
        print(table)
        raise UserError(f"{len(stopped)} of {len(todo)} cells stopped: {', '.join(stopped)}; the reasons stand above.")
    return table


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _benchmark, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string(
        "workdir", "runs/benchmark", "Where the runs, tables and pictures are kept.", flag_values=values
    )


def _benchmark(values: flags.FlagValues) -> str:
    config, _ = cli.given_config(values)
    if "benchmark" not in config:
        raise UserError("--config has no benchmark key; start from configs/benchmark.py.")
    return benchmark(config, Path(values.workdir))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
