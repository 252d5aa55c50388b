"""Systems x modalities x protocols x seeds: python -m iumad_jax.benchmark --config=configs/benchmark.py."""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli, experiment
from iumad_jax.errors import UserError
from iumad_jax.report import comparison

SYSTEMS: dict[str, dict[str, Any]] = {  # what a system changes in the config that all share
    "uniad": {"method": "uniad", "continual.strategy": "finetune"},
    "iuf": {"method": "iuf", "continual.strategy": "iuf"},
    "ib_iumad": {"method": "ib_iumad", "continual.strategy": "iuf"},
    "ib_iumad-finetune": {"method": "ib_iumad", "continual.strategy": "finetune"},
    "ib_iumad-replay": {"method": "ib_iumad", "continual.strategy": "replay"},
    "ib_iumad-joint": {"method": "ib_iumad", "continual.strategy": "joint"},
    "ib_iumad-no_mamba": {"method": "ib_iumad", "continual.strategy": "iuf", "model.mamba": False},
    "ib_iumad-no_bottleneck": {"method": "ib_iumad", "continual.strategy": "iuf", "model.bottleneck": False},
}


def benchmark(config: ConfigDict, workdir: Path) -> str:
    """Runs every cell that is not finished yet and returns the table of all in the workdir, written after each.

    Pictures are drawn at the end. A cell that cannot be trained is told and left out, which is an error in the end.

    Args:
        config: a run's config, with `config.benchmark` (explained in configs/benchmark.py).
        workdir: every cell is a run in a folder of its own in there, and may have come from another command.
    """
    todo, table, stopped = list(cells(config)), "", []
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # most cells share their programs
    for number, (cell, name) in enumerate(todo, 1):
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


def cells(config: ConfigDict) -> Iterator[tuple[ConfigDict, str]]:
    """The config and the name of every run, the first seed of all before the second of any.

    The floors do not depend on the system: only the first one's runs have them.

    Raises:
        UserError: there is no such system.
    """
    plan = config.benchmark
    systems, modalities, protocols = (plan[key].split(",") for key in ("systems", "modalities", "protocols"))
    if not set(systems) <= set(SYSTEMS):
        raise UserError(f'config.benchmark.systems is "{plan.systems}"; use names of {", ".join(SYSTEMS)}.')
    most = max(plan.seeds, plan.seeds_of_one_modality)
    for seed, protocol, modality, system in product(range(most), protocols, modalities, systems):
        if seed >= (plan.seeds if "+" in modality else plan.seeds_of_one_modality):
            continue
        cell = config.copy_and_resolve_references()
        with cell.unlocked():
            del cell.benchmark
        changes = SYSTEMS[system] | {"protocol": protocol, "modality": modality, "seed": seed}
        cell.update_from_flattened_dict(changes)
        if system != systems[0]:
            cell.floors = ""
        yield cell, comparison.name(system, modality, protocol, seed)


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
