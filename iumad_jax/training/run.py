"""`Run`: all that a run works with, wired once. `start` opens one where its last snapshot left it."""

import dataclasses
import functools
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from iumad_jax import continual, methods, protocol
from iumad_jax.continual.strategy import Strategy
from iumad_jax.data import readers
from iumad_jax.data.prepared import inventory
from iumad_jax.data.prepared.store import Store, open_store
from iumad_jax.errors import UserError
from iumad_jax.inference import recognition
from iumad_jax.methods.method import Method, sha256_of, with_frozen
from iumad_jax.runtime import live, preemption, processes
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.live import Live
from iumad_jax.runtime.progress import BEGINNING, LedgerMark, Progress
from iumad_jax.runtime.snapshots import Snapshots
from iumad_jax.training.dataset_changes import check_images, compare_names
from iumad_jax.training.optimization import learning_rates, make_optimizer, optimizer_name, step_config, step_optimizer
from iumad_jax.training.update import make_update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run works with."""

    config: ConfigDict
    workdir: Path
    steps: tuple[protocol.Step, ...]
    store: Store
    methods: dict[str, Method]  # the method of the config, then its baselines, all under the same protocol
    strategy: Strategy
    optimizers: dict[str, optax.GradientTransformation]  # by name: that of the base step, and of later ones
    updates: dict[str, Any]  # by the optimiser's name; compiled once for every form that the strategy's state takes
    snapshots: Snapshots
    ledger: Ledger
    live: Live
    began: float  # on the monotonic clock, moved back by the time that earlier processes took

    @property
    def method(self) -> Method:
        """The config's own method."""
        return self.methods[self.config.method]

    @property
    def trained(self) -> bool:
        """Whether there is anything to train."""
        return is_trained(self.config, self.method)

    def due(self) -> bool:
        """Whether it is time for a snapshot, or to end."""
        late = time.monotonic() - self.snapshots.last_save > 60 * self.config.snapshots.every_minutes
        return late or self.snapshots.failed or preemption.requested()

    def save(self, progress: Progress) -> Progress:
        """Takes a snapshot, which is written while the run goes on, and ends the run if that is asked for.

        Returns:
            The progress as it would come back from the snapshot.
        """
        variables, strategy_state = jax.tree.map(np.asarray, (progress.variables, progress.strategy_state))
        progress = progress._replace(
            variables=variables, strategy_state=strategy_state, seconds=time.monotonic() - self.began
        )
        if processes.is_process_zero():
            progress = progress._replace(ledger=LedgerMark(len(self.ledger), self.ledger.sha256))
        self.snapshots.save(progress)
        if processes.is_process_zero():
            preemption.check()
        return progress


def is_trained(config: ConfigDict, method: Method) -> bool:
    """Whether there is anything to train."""
    return method.loss is not None and config.train.epochs > 0


def plan(config: ConfigDict, workdir: Path) -> tuple[protocol.Step, ...]:
    """The steps of the run in this workdir, over the objects that it began with, or over those of the dataset.

    Raises:
        UserError: the protocol does not fit the objects, or an object of the run is gone from the dataset.
    """
    noted = inventory.read(workdir)
    if told := compare_names(config, noted).missing():
        raise UserError(" ".join(told))
    return protocol.steps(config.protocol, tuple(noted) or readers.objects(config))


def start(config: ConfigDict, workdir: Path, steps: tuple[protocol.Step, ...], held: ExitStack) -> tuple[Run, Progress]:
    """Opens a run as it stood when its last snapshot was taken, or at its very beginning.

    Args:
        config: of the run.
        workdir: where it is kept.
        steps: of `plan`.
        held: gives up the workdir in the end.

    Raises:
        UserError: the config, the dataset or the workdir is at fault.
    """
    store, chosen, strategy = _assemble(config, workdir, steps[-1].seen)
    if processes.is_process_zero():
        held.enter_context(workdirs.claimed(workdir, config))
    snapshots = held.enter_context(closing(Snapshots(workdir)))
    progress = snapshots.latest() or _beginning(config, chosen, store)
    progress = progress._replace(
        variables={
            name: with_frozen(name, method, progress.variables[name], progress.frozen.get(name))
            for name, method in chosen.items()
        }
    )
    check_images(inventory.read(workdir), store, strategy, steps, progress, workdir)
    ledger = processes.on_process_zero(Ledger, workdir / "ledger.jsonl")
    ledger.truncate(*progress.ledger)
    method, own_configs = chosen[config.method], [step_config(config, index) for index in (0, 1)]
    optimizers = {optimizer_name(method, own): step_optimizer(method, own) for own in own_configs}
    make = functools.partial(make_update, method, strategy=strategy, find_operations=config.debug.nans)
    run = Run(
        config=config,
        workdir=workdir,
        steps=steps,
        store=store,
        methods=chosen,
        strategy=strategy,
        optimizers=optimizers,
        updates={name: make(optimizer) for name, optimizer in optimizers.items()},
        snapshots=snapshots,
        ledger=ledger,
        live=held.enter_context(closing(processes.on_process_zero(Live, workdir, config.report.tensorboard))),
        began=time.monotonic() - progress.seconds,
    )
    return run, progress


def _assemble(config: ConfigDict, workdir: Path, objects: tuple[str, ...]) -> tuple[Store, dict[str, Method], Strategy]:
    """Makes what a config names, all of which may be at fault, before anything is written."""
    chosen = methods.with_baselines(config, len(objects))
    strategy = continual.build(config, chosen[config.method], len(objects))
    for index in (0, 1):  # a later step's optimiser may be another
        make_optimizer(step_config(config, index))
    if is_trained(config, chosen[config.method]):
        learning_rates(config.train, updates_per_epoch=1)
    live.check(config.report.tensorboard)
    return open_store(config, readers.open_reader(config, objects), workdir), chosen, strategy


def _beginning(config: ConfigDict, chosen: dict[str, Method], store: Store) -> Progress:
    """The progress of a run that has learned nothing."""
    objects = store.reader.objects
    example = jax.tree.map(lambda array: array[:1], store.get(objects[0], "train").batch)
    keys = jax.random.split(jax.random.key(config.seed), len(chosen))
    return BEGINNING._replace(
        objects=objects,
        variables={
            name: jax.jit(method.init)(key, example) for (name, method), key in zip(chosen.items(), keys, strict=True)
        },
        frozen={name: sha256_of(frozen) for name, method in chosen.items() if (frozen := method.frozen())},
        recognition=recognition.no_statistics(example),
        inputs=store.describe(),
    )
