"""Train and compare a grid of runs: method variants, modalities, protocols and seeds.

    python -m iumad_jax.benchmark --config=benchmark

Tables and pictures are written to the workdir. The same command resumes an interrupted benchmark.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax import config as configs
from iumad_jax.errors import UserError


def benchmark(config: ConfigDict, workdir: Path) -> str:
    """Run every unfinished cell, that is one run of the grid, and return the table of all finished cells.

    The table is also written after each cell.

    Args:
        config: Config of a run, with `config.benchmark` (explained in configs/benchmark.py).
        workdir: Folder of the tables, and of one run per cell in `cells/`.

    Raises:
        UserError: If a cell cannot be trained; the others are run first.
    """
    cells, table, stopped = list(configs.cells(config)), "", []
    import jax  # after the config was checked, so that mistakes are reported without loading JAX

    from iumad_jax import experiment
    from iumad_jax.report import comparison

    for number, (cell, key) in enumerate(cells, 1):
        name = comparison.name(*key)
        print(f"cell {number} of {len(cells)}: {name}", flush=True)
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
        raise UserError(
            f"{len(stopped)} of {len(cells)} cells stopped: {', '.join(stopped)}; correct the errors printed above."
        )
    return table


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _benchmark, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string("workdir", "runs/benchmark", "Folder of the runs, tables and pictures.", flag_values=values)


def _benchmark(values: flags.FlagValues) -> str:
    config, _ = cli.config_and_workdir(values)
    if "benchmark" not in config:
        raise UserError("--config has no key benchmark; use --config=benchmark, or a copy of it.")
    return benchmark(config, Path(values.workdir))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
