"""What a run holds, and how it begins: anew, or as its last snapshot left it."""

import dataclasses
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from iumad_jax import continual, decisions, inputs, interruption, methods, parallel, protocol, recognition, train
from iumad_jax import workdir as workdirs
from iumad_jax.continual.strategy import Memory, Strategy
from iumad_jax.data.pipeline import updates_per_epoch
from iumad_jax.data.sample import Reader
from iumad_jax.data.store import Store
from iumad_jax.methods.method import Method
from iumad_jax.report import live, tables
from iumad_jax.report.ledger import SHA256_OF_NOTHING, Ledger
from iumad_jax.report.live import Live
from iumad_jax.shapes import Variables
from iumad_jax.snapshots import Position, Snapshot, Snapshots


@dataclasses.dataclass
class Run:
    """What a run holds: the first group never changes, the second is what a snapshot keeps."""

    config: ConfigDict
    workdir: Path
    store: Store
    systems: dict[str, Method]  # the method of the config, then the floors, all under the same protocol
    strategy: Strategy
    optimizers: dict[str, optax.GradientTransformation]  # by name: that of the base step, and of later ones
    updates: dict[str, Any]  # by the optimiser's name; compiled once for every form that the strategy's memory takes
    snapshots: Snapshots
    ledger: Ledger
    inputs: dict[str, Any]  # what a detector must know of the images
    live: Live

    variables: dict[str, Variables]  # by system, and those of `recognition`
    matrices: dict[str, dict[str, np.ndarray]]  # system -> metric -> (steps, objects)
    decisions: list[decisions.Decisions]  # after every step
    position: Position
    optimizer_leaves: list[Any]
    losses: dict[str, np.ndarray]  # of the updates of an epoch that is not finished
    memory: Memory  # of the strategy
    began: float  # on the monotonic clock, moved back by the time that earlier runs took
    saved: float  # on the same

    def due(self) -> bool:
        """Whether it is time for a snapshot, or to end."""
        late = time.monotonic() - self.saved > 60 * self.config.snapshots.every_minutes
        return late or self.snapshots.failed or interruption.requested()

    def save(self) -> None:
        """Takes a snapshot, which is written while the run goes on, and ends the run if that is asked for."""
        self.saved = time.monotonic()
        if not parallel.is_first():
            return
        record = {
            "ledger_lines": len(self.ledger),
            "ledger_sha256": self.ledger.sha256,
            "matrices": jax.tree.map(np.ndarray.tolist, self.matrices),
            "decisions": self.decisions,
            "inputs": self.inputs,
            "seconds": time.monotonic() - self.began,
        }
        self.variables, self.memory = jax.tree.map(np.asarray, (self.variables, self.memory))  # as they come back
        kept = self.position, self.variables, self.optimizer_leaves, self.losses, record, self.memory
        self.snapshots.save(Snapshot(*kept))
        interruption.check()


def start(config: ConfigDict, workdir: Path, reader: Reader, steps: tuple[protocol.Step, ...], held: ExitStack) -> Run:
    """The run as it stood when its last snapshot was taken, or at its very beginning.

    What would stop it later is refused before anything is written. `held` gives up the workdir in the end.
    """
    systems = methods.systems(config, len(reader.objects))
    method = systems[config.method]
    strategy = continual.build(config, method, len(reader.objects))
    optimizers = {own.optimizer: train.make_optimizer(own) for own in (train.of_step(config, i) for i in (0, 1))}
    check_training(config, method, strategy, reader, steps)
    live.check(config.report.tensorboard)
    store = inputs.open_store(config, reader, workdir)
    if parallel.is_first():
        held.enter_context(workdirs.claimed(workdir, config))
    saved = held.enter_context(closing(Snapshots(workdir)))
    ledger = parallel.in_first(Ledger, workdir / "ledger.jsonl")
    snapshot = saved.latest()
    if snapshot is None:
        example = jax.tree.map(lambda array: array[:1], store.get(reader.objects[0], "train").batch)
        keys = jax.random.split(jax.random.key(config.seed), len(systems))
        variables = {
            name: jax.jit(system.init)(key, example) for (name, system), key in zip(systems.items(), keys, strict=True)
        }
        variables["recognition"] = recognition.no_statistics(example)
        matrices = {
            name: {metric: np.full((len(steps), len(reader.objects)), np.nan) for metric in tables.METRICS}
            for name in systems
        }
        told = {"ledger_lines": 0, "ledger_sha256": SHA256_OF_NOTHING}
        record = {**told, "matrices": matrices, "decisions": [], "seconds": 0.0}
        snapshot = Snapshot(Position(-1, 0, finished=True), variables, [], {}, record, {})
    ledger.truncate(snapshot.record["ledger_lines"], snapshot.record["ledger_sha256"])
    matrices = {
        name: {metric: np.array(rows) for metric, rows in by_metric.items()}
        for name, by_metric in snapshot.record["matrices"].items()
    }
    nans = config.debug.nans
    updates = {name: train.make_update(method, optimizer, strategy, nans) for name, optimizer in optimizers.items()}
    return Run(
        config,
        workdir,
        store,
        systems,
        strategy,
        optimizers,
        updates,
        saved,
        ledger,
        inputs.describe(store),
        held.enter_context(closing(parallel.in_first(Live, workdir, config.report.tensorboard))),
        snapshot.variables,
        matrices,
        snapshot.record["decisions"],
        snapshot.position,
        snapshot.optimizer,
        snapshot.losses,
        snapshot.memory,
        time.monotonic() - snapshot.record["seconds"],
        time.monotonic(),
    )


def check_training(
    config: ConfigDict, method: Method, strategy: Strategy, reader: Reader, steps: tuple[protocol.Step, ...]
) -> None:
    """Raises UserError unless every step can be trained."""
    if not is_trained(config, method):
        return
    train.learning_rates(config.train, updates_per_epoch=1)
    for step in steps:
        images = sum(len(reader.ids(name, "train")) for name in strategy.objects(step))
        updates_per_epoch(images, config.train.batch_size)


def is_trained(config: ConfigDict, method: Method) -> bool:
    """Whether there is anything to train."""
    return method.loss is not None and config.train.epochs > 0
