"""Train and compare a grid of runs: method variants, modalities, protocols and seeds.

    python -m iumad_jax.benchmark --config=benchmark

Tables and pictures are written to the workdir. The same command resumes an interrupted benchmark.
"""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from iumad_jax import cli
from iumad_jax.errors import UserError

_EPOCHS = {"simplenet": 4, "destseg": 2, "diad": 3, "cdad": 3}  # times config.train.epochs in benchmarks, to converge
VARIANTS: dict[str, dict[str, Any]] = {  # method variants of benchmarks: the keys that each one changes
    "uniad": {"method": "uniad", "continual.strategy": "finetune"},
    "uniad-iuf": {"method": "uniad", "continual.strategy": "iuf"},
    "uniad-isvd": {"method": "uniad", "continual.strategy": "isvd"},
    "uniad-replay": {"method": "uniad", "continual.strategy": "replay"},
    "iuf": {"method": "iuf", "continual.strategy": "iuf"},
    "simplenet": {"method": "simplenet", "continual.strategy": "finetune"},
    "simplenet-iuf": {"method": "simplenet", "continual.strategy": "iuf"},
    "simplenet-replay": {"method": "simplenet", "continual.strategy": "replay", "continual.replay.residual": True},
    "destseg": {"method": "destseg", "continual.strategy": "finetune"},
    "destseg-group": {"method": "destseg", "continual.strategy": "finetune", "destseg.norm": "group"},
    "destseg-iuf": {"method": "destseg", "continual.strategy": "iuf"},
    "destseg-replay": {"method": "destseg", "continual.strategy": "replay", "continual.replay.image_size": 128},
    "diad": {"method": "diad", "continual.strategy": "finetune"},
    "diad-replay": {"method": "diad", "continual.strategy": "replay"},
    "cdad": {"method": "cdad", "continual.strategy": "isvd"},
    "cdad-finetune": {"method": "cdad", "continual.strategy": "finetune"},
    "cdad-replay": {"method": "cdad", "continual.strategy": "replay"},
    "ib_iumad": {"method": "ib_iumad", "continual.strategy": "iuf"},
    "ib_iumad-finetune": {"method": "ib_iumad", "continual.strategy": "finetune"},
    "ib_iumad-isvd": {"method": "ib_iumad", "continual.strategy": "isvd"},
    "ib_iumad-replay": {"method": "ib_iumad", "continual.strategy": "replay"},
    "ib_iumad-joint": {"method": "ib_iumad", "continual.strategy": "joint"},
    "ib_iumad-no_mamba": {"method": "ib_iumad", "continual.strategy": "iuf", "model.mamba": False},
    "ib_iumad-no_bottleneck": {"method": "ib_iumad", "continual.strategy": "iuf", "model.bottleneck": False},
}
_KEYS = {"variants", "modalities", "protocols", "seeds", "seeds_of_one_modality"}


def benchmark(config: ConfigDict, workdir: Path) -> str:
    """Run every unfinished cell, that is one run of the grid, and return the table of all finished cells.

    The table is also written after each cell.

    Args:
        config: Config of a run, with `config.benchmark` (explained in configs/benchmark.py).
        workdir: Folder of the tables, and of one run per cell in `cells/`.

    Raises:
        UserError: If a cell cannot be trained; the others are run first.
    """
    grid, table, stopped = list(cells(config)), "", []
    import jax  # after the config was checked, so that mistakes are reported without loading JAX

    from iumad_jax import experiment
    from iumad_jax.report import comparison

    for number, (cell, key) in enumerate(grid, 1):
        name = comparison.name(*key)
        print(f"cell {number} of {len(grid)}: {name}", flush=True)
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
            f"{len(stopped)} of {len(grid)} cells stopped: {', '.join(stopped)}; correct the errors printed above."
        )
    return table


def cells(config: ConfigDict) -> Iterator[tuple[ConfigDict, tuple[str, str, str, int]]]:
    """Yield the config of every run of a benchmark, seed by seed.

    Baselines do not depend on the variant, so only runs of the first variant include them.

    Yields:
        The config and its (variant, modality, protocol, seed).

    Raises:
        UserError: If a key or a variant is unknown.
    """
    plan = config.benchmark
    if set(plan) != _KEYS:
        raise UserError(f"config.benchmark has the keys {', '.join(plan)}; use {', '.join(sorted(_KEYS))}.")
    variants, modalities, protocols = (plan[key].split(",") for key in ("variants", "modalities", "protocols"))
    if not set(variants) <= set(VARIANTS):
        raise UserError(
            f'config.benchmark.variants is "{plan.variants}"; use comma-separated names of {", ".join(VARIANTS)}.'
        )
    seeds = max(plan.seeds, plan.seeds_of_one_modality)
    for seed, protocol, modality, variant in product(range(seeds), protocols, modalities, variants):
        if seed >= (plan.seeds if "+" in modality else plan.seeds_of_one_modality):
            continue
        cell = config.copy_and_resolve_references()
        with cell.unlocked():
            del cell.benchmark
        changes = VARIANTS[variant] | {"protocol": protocol, "modality": modality, "seed": seed}
        cell.update_from_flattened_dict(changes)
        cell.train.epochs *= _EPOCHS.get(cell.method, 1)
        if variant != variants[0]:
            cell.baselines = ""
        yield cell, (variant, modality, protocol, seed)


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
