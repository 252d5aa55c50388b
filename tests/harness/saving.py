"""What snapshots within a step cost: python -m tests.harness.saving --config=FILE.

The config's method trains on noise of its sizes, in rounds of some updates. As every second round begins, a snapshot is
taken as in a run: copied while training waits, then written and hashed by another thread, which a round should outlast.
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
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _measure)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_integer("updates", 20, "Of a round.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 5, "Of each kind, after a first one.", lower_bound=1, flag_values=values)


def _measure(values: flags.FlagValues) -> str:
    import jax

    from iumad_jax import config as configs
    from iumad_jax import methods
    from iumad_jax.data.batches import training_input
    from iumad_jax.models.efficientnet import FeatureExtractor
    from iumad_jax.runtime.progress import BEGINNING, Position
    from iumad_jax.runtime.snapshots import Snapshots, size_of
    from iumad_jax.shapes import Batch
    from iumad_jax.training.epochs import train_epochs
    from iumad_jax.training.optimization import make_optimizer
    from iumad_jax.training.update import initial_state, make_update

    config, _ = cli.given_config(values)
    rng, size, count = np.random.default_rng(0), config.input.size, 2 * config.train.batch_size
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)
    shape = jax.eval_shape(extractor.init_with_output, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))[0]
    features: Any = rng.normal(size=(count, config.backbone.grid**2, shape.shape[-1])).astype(np.float32)
    images: Any = rng.uniform(0, 255, (count, size, size, 3)).astype(np.float32)
    objects: Any = rng.integers(0, _OBJECTS, count).astype(np.int32)
    modalities = configs.modalities(config)
    batch = Batch(dict.fromkeys(modalities, features), dict.fromkeys(modalities, images), objects)
    method, optimizer = methods.build(config.method, config, _OBJECTS), make_optimizer(config.train)
    variables = jax.jit(method.init)(jax.random.key(0), jax.tree.map(lambda array: array[:1], batch))
    ends: list[float] = []  # of rounds
    copying: list[float] = []
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        if asked % values.updates:
            return False
        ends.append(time.perf_counter())
        return len(ends) % 2 == 1

    state, total = (
        initial_state(variables, optimizer, 0, []),
        values.updates * (2 * values.rounds + 1) + 1,
    )  # nobody pauses after the last
    stream, update = training_input([batch], config.train.batch_size, 0, 0), make_update(method, optimizer)
    with tempfile.TemporaryDirectory() as folder, closing(Snapshots(Path(folder))) as saved:
        for reached in train_epochs(update, state, stream, lambda _: 1e-4, jax.random.key(0), total, 1, pause=pause):
            progress = BEGINNING._replace(
                position=Position(0, reached.updates),
                variables={config.method: reached.state.variables},
                optimizer=jax.tree.leaves(reached.state.optimizer),
                losses=reached.history,
            )
            began = time.perf_counter()
            saved.save(progress)
            copying.append(time.perf_counter() - began)
    beside, alone = (float(np.median(np.diff(ends)[kind::2])) for kind in (0, 1))
    share = (beside - alone) / (60 * config.snapshots.every_minutes)
    rows = [
        ("snapshot", f"{size_of((progress.variables, progress.optimizer, progress.losses)) / 1e6:.1f}", "MB"),
        ("an update", f"{1e3 * alone / values.updates:.1f}", "ms"),
        ("a save: copying, while training waits", f"{1e3 * np.median(copying):.1f}", "ms"),
        (f"a save: {values.updates} updates beside it take longer by", f"{1e3 * (beside - alone):.0f}", "ms"),
        (f"a save every {config.snapshots.every_minutes:g} minutes", f"{100 * share:.2f}", "% of the time"),
    ]
    table = tabulate(rows, ["", "", ""], "simple", disable_numparse=True, colalign=["left", "right", "left"])
    return f"{config.method}, {psutil.cpu_count()} CPU cores\n{table}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
