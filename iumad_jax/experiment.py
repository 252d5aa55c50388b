"""The whole story of a run: good objects go in, step by step; a ledger of what was learned and forgotten comes out."""

import dataclasses
import hashlib
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax import data, methods, parallel, protocol, train
from iumad_jax import workdir as workdirs
from iumad_jax.data.pipeline import training_input, updates_per_epoch
from iumad_jax.data.processing import Processing
from iumad_jax.data.sample import Reader
from iumad_jax.data.store import PreparedSet, Store
from iumad_jax.errors import UserError
from iumad_jax.evaluate import evaluate
from iumad_jax.methods.method import Method
from iumad_jax.models import pretrained
from iumad_jax.models.efficientnet import FeatureExtractor
from iumad_jax.predict import predict
from iumad_jax.report import figures, tables
from iumad_jax.report.ledger import Ledger
from iumad_jax.shapes import Prediction, Variables
from iumad_jax.snapshots import Position, Snapshot, Snapshots

FLOORS = ("feature_norm", "nearest_neighbours")  # training-free; what does not beat them has not shown anything


@dataclasses.dataclass
class Run:
    """What a run holds: the first group never changes, the second is what a snapshot keeps."""

    config: ConfigDict
    workdir: Path
    store: Store
    systems: dict[str, Method]  # the method of the config, then the floors, all under the same protocol
    optimizer: optax.GradientTransformation
    update: Any  # compiled once
    snapshots: Snapshots
    ledger: Ledger

    variables: dict[str, Variables]
    matrices: dict[str, dict[str, np.ndarray]]  # system -> metric -> (steps, objects)
    position: Position
    optimizer_leaves: list[Any]
    began: float  # on the monotonic clock, moved back by the time that earlier runs took

    def save(self) -> None:
        """Takes a snapshot."""
        record = {
            "ledger_lines": len(self.ledger),
            "matrices": jax.tree.map(np.ndarray.tolist, self.matrices),
            "seconds": time.monotonic() - self.began,
        }
        self.snapshots.save(Snapshot(self.position, self.variables, self.optimizer_leaves, record))


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs a config's protocol in a workdir, going on where an earlier run of it stopped.

    Returns:
        What results.json holds (evaluation.md, "Public names").

    Raises:
        UserError: the config, the dataset or the workdir is at fault.
    """
    configs.check(config)
    workdirs.check(workdir, config)
    finished = tables.read_results(workdir)
    if finished is not None:
        print(f"{workdir}: this run is finished.")
        return finished

    steps = protocol.steps(config.protocol, data.objects(config))
    reader = data.open_reader(config)
    this = start(config, workdir, reader, steps)
    for step in steps[this.position.step + this.position.finished :]:
        learn(this, step)
        assess(this, step)
    return conclude(this, steps)


def start(config: ConfigDict, workdir: Path, reader: Reader, steps: tuple[protocol.Step, ...]) -> Run:
    """The run as it stood when its last snapshot was taken, or at its very beginning.

    What would stop it later is refused before anything is written.
    """
    names = (config.method, *(floor for floor in FLOORS if floor != config.method))
    systems = {name: methods.build(name, config, len(reader.objects)) for name in names}
    check_training(config, systems[config.method], reader, steps)
    store = open_store(config, reader, workdir)
    workdirs.claim(workdir, config)
    snapshots, ledger = Snapshots(workdir), Ledger(workdir / "ledger.jsonl")
    optimizer = train.make_optimizer(config.train)
    snapshot = snapshots.latest()
    if snapshot is None:
        example = jax.tree.map(lambda array: array[:1], store.get(reader.objects[0], "train").batch)
        keys = jax.random.split(jax.random.key(config.seed), len(names))
        variables = {name: jax.jit(systems[name].init)(key, example) for name, key in zip(names, keys, strict=True)}
        matrices = {
            name: {metric: np.full((len(steps), len(reader.objects)), np.nan) for metric in tables.METRICS}
            for name in names
        }
        snapshot = Snapshot(
            Position(-1, 0, finished=True), variables, [], {"ledger_lines": 0, "matrices": matrices, "seconds": 0.0}
        )
    ledger.truncate(snapshot.record["ledger_lines"])
    matrices = {
        name: {metric: np.array(rows) for metric, rows in by_metric.items()}
        for name, by_metric in snapshot.record["matrices"].items()
    }
    return Run(
        config,
        workdir,
        store,
        systems,
        optimizer,
        train.make_update(systems[config.method], optimizer),
        snapshots,
        ledger,
        snapshot.variables,
        matrices,
        snapshot.position,
        snapshot.optimizer,
        time.monotonic() - snapshot.record["seconds"],
    )


def check_training(config: ConfigDict, method: Method, reader: Reader, steps: tuple[protocol.Step, ...]) -> None:
    """Raises UserError unless every step can be trained."""
    if config.continual.strategy != "finetune":
        raise UserError(f'config.continual.strategy is "{config.continual.strategy}"; use finetune.')
    if not is_trained(config, method):
        return
    parallel.check_batch_size(config.train.batch_size)
    train.learning_rates(config.train, updates_per_epoch=1)
    for step in steps:
        updates_per_epoch(sum(len(reader.ids(name, "train")) for name in step.learned), config.train.batch_size)


def is_trained(config: ConfigDict, method: Method) -> bool:
    """Whether there is anything to train."""
    return method.loss is not None and config.train.epochs > 0


def open_store(config: ConfigDict, reader: Reader, workdir: Path) -> Store:
    """Where images are prepared for this config's backbone."""
    processing = Processing(
        methods.modalities(config),
        config.input.size,
        config.input.depth_encoding,
        reader.height_range,
        reader.object_height,
        reader.normals_window,
    )
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)
    weights = pretrained.load(config.backbone.name, config.backbone.weights)
    digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(weights)))
    return Store(
        folder=Path(config.dataset.prepared or workdir / "prepared"),
        reader=reader,
        processing=processing,
        encoder=jax.jit(lambda images: extractor.apply(weights, images)),
        settings={**config.backbone, "weights": digest.hexdigest()},
    )


def learn(this: Run, step: protocol.Step) -> None:
    """Trains on the good images of the objects that this step learns, from where the run stands."""
    config = this.config
    sets = [this.store.get(name, "train") for name in step.learned]
    images = sum(len(one.ids) for one in sets)
    if this.position.step < step.index:
        this.ledger.append("step", step=step.index, learned=step.learned, images=images)
        for one in sets:
            for name, system in this.systems.items():
                this.variables[name] = system.observe(this.variables[name], one.batch, step.index)
        this.position, this.optimizer_leaves = Position(step.index, 0), []
    method = this.systems[config.method]
    if not is_trained(config, method):
        return

    per_epoch = updates_per_epoch(images, config.train.batch_size)
    rates = train.learning_rates(config.train, per_epoch)
    done = this.position.epochs
    state = train.start(this.variables[config.method], this.optimizer, done * per_epoch, this.optimizer_leaves)
    seed = config.seed * 1000 + step.index
    pieces = training_input([one.batch for one in sets], config.train.batch_size, seed, done, config.input.resident)
    key = jax.random.fold_in(jax.random.key(config.seed), step.index)
    saved = time.monotonic()
    for epoch in train.epochs(this.update, state, pieces, rates, key, per_epoch, config.train.epochs):
        this.ledger.append("epoch", step=step.index, epoch=epoch.number, **epoch.losses)
        this.variables[config.method] = epoch.state.variables
        this.position = Position(step.index, epoch.number + 1)
        if time.monotonic() - saved > 60 * config.snapshots.every_minutes:
            this.optimizer_leaves = jax.tree.leaves(epoch.state.optimizer)
            this.save()
            saved = time.monotonic()


def assess(this: Run, step: protocol.Step) -> None:
    """Evaluates every system on all objects seen so far, draws heatmaps, and takes the step's snapshot."""
    for column, name in enumerate(step.seen):
        if not this.store.reader.ids(name, "test"):  # the row stays NaN
            continue
        test = this.store.get(name, "test")
        assert test.truth is not None
        for system, method in this.systems.items():
            prediction = predict(jax.jit(method.predict), this.variables[system], test.batch)
            values = evaluate(prediction, test.truth)
            for metric, value in values.items():
                this.matrices[system][metric][step.index, column] = value
            this.ledger.append("evaluation", step=step.index, object=name, method=system, **values)
            if system == this.config.method:
                draw(this, step, name, test, prediction)
    this.ledger.append("snapshot", step=step.index, bytes={s: _bytes(this.variables[s]) for s in this.systems})
    this.position, this.optimizer_leaves = Position(step.index, 0, finished=True), []
    this.save()


def draw(this: Run, step: protocol.Step, name: str, test: PreparedSet, prediction: Prediction) -> None:
    """Heatmaps of some of an object's test images after a step."""
    rows = figures.choose(test.defects, this.config.report.pictures_per_object)
    if not rows:
        return
    assert test.truth is not None
    figures.save_heatmaps(
        this.workdir / "pictures" / f"step{step.index}_{name}.jpg",
        title=f"{name} after step {step.index}: {this.config.method}, {this.config.modality}",
        labels=[f"{test.defects[row]} {test.ids[row]}" for row in rows],
        rgb=test.truth.thumbnail[rows],
        depth=test.truth.depth[rows],
        masks=test.truth.mask[rows],
        maps=prediction.map[rows],
        scores=prediction.score[rows],
    )


def conclude(this: Run, steps: tuple[protocol.Step, ...]) -> dict[str, Any]:
    """Writes the results and pictures of a finished run."""
    config, objects = this.config, this.store.reader.objects
    by_system = {
        system: {"matrix": matrices, "summary": tables.summarise(matrices), "bytes": _bytes(this.variables[system])}
        for system, matrices in this.matrices.items()
    }
    results = {
        "config": config.to_dict(),
        "protocol": config.protocol,
        "objects": list(objects),
        "steps": [list(step.learned) for step in steps],
        **by_system.pop(config.method),
        "floors": by_system,
        "seconds": time.monotonic() - this.began,
        "versions": {package: version(package) for package in ("iumad-jax", "jax", "flax", "optax", "numpy")},
    }
    for metric, matrix in this.matrices[config.method].items():
        path = this.workdir / "pictures" / f"matrix_{metric}.png"
        figures.save_matrix(path, matrix, objects, [f"step {step.index}" for step in steps], metric)
    tables.write_results(this.workdir, results)
    this.snapshots.close()
    return results


def _bytes(variables: Variables) -> int:
    return sum(np.asarray(array).nbytes for array in jax.tree.leaves(variables))
