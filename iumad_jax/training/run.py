"""Sets up a run: `start` creates its `Run` and loads its progress from the last snapshot."""

import dataclasses
import functools
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from iumad_jax import continual, methods
from iumad_jax.continual.strategy import Strategy
from iumad_jax.data import plan, readers
from iumad_jax.data.prepared import inventory
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.store import Store, open_store
from iumad_jax.data.readers.joined import Selected
from iumad_jax.errors import UserError
from iumad_jax.inference import recognition
from iumad_jax.inference.anomaly_map import make_rule
from iumad_jax.methods.method import Method, tree_sha256, with_frozen
from iumad_jax.models import pretrained
from iumad_jax.protocol import Step
from iumad_jax.runtime import live, preemption, processes
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.ledger import Ledger
from iumad_jax.runtime.live import Live
from iumad_jax.runtime.progress import BEGINNING, LedgerMark, Progress
from iumad_jax.runtime.snapshots import Snapshots, last_step
from iumad_jax.synthetic import photographs
from iumad_jax.training.dataset_changes import check_images, check_new_images, compare_names, used_images
from iumad_jax.training.optimization import learning_rates, make_optimizer, optimizer_name, step_config, step_optimizer
from iumad_jax.training.update import make_update

_OF_ONE_RUN = ("protocol", "seed", "dataset", "decisions", "snapshots", "report")  # what no compiled program depends on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run works with."""

    config: ConfigDict
    workdir: Path
    steps: tuple[Step, ...]
    store: Store
    images: Store  # prepared images that the current step learns from
    methods: dict[str, Method]  # by name: the config's method, then its baselines
    strategy: Strategy
    optimizers: dict[str, optax.GradientTransformation]  # by name: those of the base step and of later steps
    updates: dict[str, Any]  # by name of the optimiser; compiled once per structure of the strategy's state
    snapshots: Snapshots
    ledger: Ledger
    live: Live
    began: float  # start on the monotonic clock, moved back by the run time of earlier processes

    @property
    def method(self) -> Method:
        """The config's method."""
        return self.methods[self.config.method]

    @property
    def trained(self) -> bool:
        """Whether this run trains the method: it has a loss, and the config has epochs."""
        return is_trained(self.config, self.method)

    def due(self) -> bool:
        """Return whether to take a snapshot: one is due, the last one failed, or the process was asked to end."""
        overdue = time.monotonic() - self.snapshots.last_save > 60 * self.config.snapshots.every_minutes
        return overdue or self.snapshots.failed or preemption.requested()

    def save(self, progress: Progress) -> Progress:
        """Take a snapshot, which is written in the background.

        Returns:
            The progress as it would be loaded from the snapshot.

        Raises:
            Interrupted: If the process was asked to end.
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
    """Return whether the method has a training loss and the config any epochs."""
    return method.loss is not None and config.train.epochs > 0


def check(config: ConfigDict, workdir: Path, steps: tuple[Step, ...]) -> None:
    """Check a run before a dataset is rendered.

    Raises:
        UserError: If a dataset no longer has an object of the run, or the config or a step's changes are invalid, or a
            new run's textures are missing.
    """
    _, strategy = _build_methods(config)
    if config.method == "destseg" and config.destseg.textures and not plan.read(workdir):
        photographs.files(Path(config.destseg.textures))
    unneeded = spared(config, workdir, steps, strategy)
    if not strategy.incremental and any(step.act == "update" for step in steps):
        raise UserError(
            f"config.continual.strategy is {config.continual.strategy}, which trains on all images in every step; start"
            " a run in another --workdir to learn further images of an object."
        )
    for found in compare_names(config, inventory.read(workdir), steps):
        needed = found._replace(gone=tuple(name for name in found.gone if name not in unneeded))
        if messages := needed.missing_messages():
            raise UserError(" ".join(messages))
    for changes in ({}, *(step.changes for step in steps if step.changes)):
        _build_methods(plan.changed_config(config, changes))


def spared(config: ConfigDict, workdir: Path, steps: tuple[Step, ...], strategy: Strategy) -> tuple[str, ...]:
    """Return the objects of finished steps if a run needs no files of them any more."""
    finished = last_step(workdir)
    needed = is_trained(config, methods.build(config.method, config)) and not strategy.incremental
    return () if needed or finished < 0 else steps[finished].seen


def start(config: ConfigDict, workdir: Path, steps: tuple[Step, ...], stack: ExitStack) -> tuple[Run, Progress]:
    """Set up a run and load the progress of its last snapshot; a new run begins with empty progress.

    Args:
        config: Config of the run.
        workdir: Workdir of the run.
        steps: Steps of the run, of which the first may be finished.
        stack: Releases the workdir and closes the run's files at the end.

    Raises:
        UserError: If the config, the dataset or the workdir is invalid.
    """
    run_methods, strategy = _build_methods(config)
    live.check(config.report.tensorboard)
    store = open_store(config, plan.open_reader(config, steps, spared(config, workdir, steps, strategy)), workdir)
    if processes.is_process_zero():
        stack.enter_context(workdirs.claimed(workdir, config))
    snapshots = stack.enter_context(closing(Snapshots(workdir)))
    if progress := snapshots.latest():
        pretrained.check_same(config.backbone, store.settings["weights"], progress.inputs)
        store = dataclasses.replace(store, processing=Processing.recorded(progress.inputs))
        progress = progress._replace(
            variables={
                name: with_frozen(name, method, progress.variables[name], progress.frozen.get(name))
                for name, method in run_methods.items()
            }
        )
    else:
        progress = _new_progress(config, run_methods, store)
    noted = {name: images for name, images in used_images(workdir, steps).items() if name in steps[-1].seen}
    check_images(noted, store, strategy, steps, progress, workdir)
    ledger = processes.on_process_zero(Ledger, workdir / "ledger.jsonl")
    ledger.truncate(*progress.ledger)
    run = Run(
        config=config,
        workdir=workdir,
        steps=steps,
        store=store,
        images=store,
        methods=run_methods,
        strategy=strategy,
        **_optimization(config, run_methods[config.method], strategy),
        snapshots=snapshots,
        ledger=ledger,
        live=stack.enter_context(closing(processes.on_process_zero(Live, workdir, config.report.tensorboard))),
        began=time.monotonic() - progress.seconds,
    )
    return run, progress


def for_step(run: Run, step: Step) -> Run:
    """Return the run with the config and the images of a step."""
    if step.images:
        reader = readers.open_reader(plan.dataset_of(run.config, step), step.objects)
        check_new_images(reader, step)
        selected = Selected(reader, run.store.reader.objects, step.images)
        images = dataclasses.replace(run.store, reader=selected, folder=run.store.folder / f"step{step.index}")
        run = dataclasses.replace(run, images=images)
    if not step.changes:
        return run
    config = plan.changed_config(run.config, step.changes)
    return dataclasses.replace(run, config=config, **_optimization(config, run.method, run.strategy))


def _optimization(config: ConfigDict, method: Method, strategy: Strategy) -> dict[str, Any]:
    """Build the optimisers and updates of `Run`."""
    return _optimization_of(_shared(config), method, strategy)


@functools.lru_cache(maxsize=4)
def _optimization_of(frozen: FrozenConfigDict, method: Method, strategy: Strategy) -> dict[str, Any]:
    """Do the work of `_optimization`, so that runs of the same settings share compiled updates."""
    config = ConfigDict(frozen)
    step_configs = [step_config(config, index) for index in (0, 1)]
    optimizers = {optimizer_name(method, train): step_optimizer(method, train) for train in step_configs}
    make = functools.partial(make_update, method, strategy=strategy, debug_nans=config.debug.nans)
    return {"optimizers": optimizers, "updates": {name: make(optimizer) for name, optimizer in optimizers.items()}}


def _build_methods(config: ConfigDict) -> tuple[dict[str, Method], Strategy]:
    """Build the methods and the strategy that a config selects.

    Raises:
        UserError: If the config names an unknown combination, score, method, baseline, strategy, optimiser or schedule.
    """
    make_rule(config)
    run_methods, strategy = _methods_and_strategy(_shared(config))
    for index in (0, 1):  # later steps may use another optimiser than the base step
        make_optimizer(step_config(config, index))
    if is_trained(config, run_methods[config.method]):
        learning_rates(config.train, updates_per_epoch=1)
    return run_methods, strategy


@functools.lru_cache(maxsize=4)
def _methods_and_strategy(frozen: FrozenConfigDict) -> tuple[dict[str, Method], Strategy]:
    """Build methods and strategy, which are the same for runs of the same settings, so that these share programs."""
    config = ConfigDict(frozen)
    run_methods = methods.with_baselines(config)
    return run_methods, continual.build(config, run_methods[config.method])


def _shared(config: ConfigDict) -> FrozenConfigDict:
    """Return the settings that compiled programs may depend on."""
    return FrozenConfigDict({key: value for key, value in config.items() if key not in _OF_ONE_RUN})


def _new_progress(config: ConfigDict, run_methods: dict[str, Method], store: Store) -> Progress:
    """Create the progress of a run that has learned nothing yet."""
    example = jax.tree.map(lambda array: array[:1], store.get(store.reader.objects[0], "train").batch)
    keys = jax.random.split(jax.random.key(config.seed), len(run_methods))
    variables = {
        name: with_frozen(name, method, method.start(jax.jit(method.init)(key, example)))
        for (name, method), key in zip(run_methods.items(), keys, strict=True)
    }
    return BEGINNING._replace(
        variables=variables,
        frozen={name: tree_sha256(own["frozen"]) for name, own in variables.items() if "frozen" in own},
        recognition=recognition.empty_statistics(example),
        inputs=store.describe(),
    )
