"""Measure the cost of snapshots within a step.

    python -m tests.harness.saving --config=quickstart

The config's method trains on random images, in rounds of --updates updates. At the start of every second round a
snapshot is saved as in a run: training waits while it is copied; then another thread hashes and writes it. A round
should last longer than the writing.
"""

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from absl import flags
from tabulate import tabulate

from iumad_jax import cli

_OBJECTS = 10


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_integer("updates", 20, "Number of updates per round.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "rounds",
        5,
        "Number of rounds with a save, and of rounds without; one more warms up.",
        lower_bound=1,
        flag_values=values,
    )


def _measure(values: flags.FlagValues) -> str:
    import jax

    from iumad_jax import config as configs
    from iumad_jax import methods
    from iumad_jax.data.batches import training_input
    from iumad_jax.models.backbone import FeatureExtractor
    from iumad_jax.runtime.progress import BEGINNING, Position
    from iumad_jax.runtime.snapshots import Snapshots, size_of
    from iumad_jax.shapes import Batch
    from iumad_jax.training.epochs import train_epochs
    from iumad_jax.training.optimization import make_optimizer
    from iumad_jax.training.update import initial_state, make_update

    config, _ = cli.config_and_workdir(values)
    rng, size, count = np.random.default_rng(0), config.input.size, 2 * config.train.batch_size
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)
    shape = jax.eval_shape(extractor.init_with_output, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))[0]
    features: Any = rng.normal(size=(count, config.backbone.grid**2, shape.shape[-1])).astype(np.float32)
    images: Any = rng.uniform(0, 255, (count, size, size, 3)).astype(np.float32)
    objects: Any = rng.integers(0, _OBJECTS, count).astype(np.int32)
    modalities = configs.modalities(config)
    batch = Batch(dict.fromkeys(modalities, features), dict.fromkeys(modalities, images), objects)
    method, optimizer = methods.build(config.method, config), make_optimizer(config.train)
    variables = jax.jit(method.init)(jax.random.key(0), jax.tree.map(lambda array: array[:1], batch))
    variables = method.grow(variables, _OBJECTS, jax.random.key(0))
    round_ends: list[float] = []
    copying: list[float] = []  # seconds per snapshot
    updates = 0

    def pause() -> bool:
        nonlocal updates
        updates += 1
        if updates % values.updates:
            return False
        round_ends.append(time.perf_counter())
        return len(round_ends) % 2 == 1

    state = initial_state(variables, optimizer, 0, [])
    total = values.updates * (2 * values.rounds + 1) + 1  # training cannot pause after the last update
    stream, update = training_input([batch], config.train.batch_size, 0, 0), make_update(method, optimizer)
    with tempfile.TemporaryDirectory() as folder, closing(Snapshots(Path(folder))) as snapshots:
        for paused in train_epochs(update, state, stream, lambda _: 1e-4, jax.random.key(0), total, 1, pause=pause):
            progress = BEGINNING._replace(
                position=Position(0, paused.updates),
                variables={config.method: paused.state.variables},
                optimizer=jax.tree.leaves(paused.state.optimizer),
                losses=paused.history,
            )
            start = time.perf_counter()
            snapshots.save(progress)
            copying.append(time.perf_counter() - start)
    with_save, without = (float(np.median(np.diff(round_ends)[first::2])) for first in (0, 1))
    share = (with_save - without) / (60 * config.snapshots.every_minutes)
    rows = [
        ("snapshot", f"{size_of((progress.variables, progress.optimizer, progress.losses)) / 1e6:.1f}", "MB"),
        ("an update", f"{1e3 * without / values.updates:.1f}", "ms"),
        ("copying a snapshot, while training waits", f"{1e3 * np.median(copying):.1f}", "ms"),
        (f"delay of {values.updates} updates during a save", f"{1e3 * (with_save - without):.0f}", "ms"),
        (f"delay with a save every {config.snapshots.every_minutes:g} minutes", f"{100 * share:.2f}", "% of the time"),
    ]
    table = tabulate(rows, ["", "", ""], "simple", disable_numparse=True, colalign=["left", "right", "left"])
    return f"{config.method}, {psutil.cpu_count()} CPU cores\n{table}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
