"""The whole story of a run: good objects go in, step by step; a ledger of what was learned and forgotten comes out."""

import functools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import config as configs
from iumad_jax import data, decisions, inputs, interruption, numerics, parallel, protocol, recognition, snapshots, train
from iumad_jax import workdir as workdirs
from iumad_jax.data.pipeline import images_of, training_input, updates_per_epoch
from iumad_jax.data.store import PreparedSet
from iumad_jax.evaluate import evaluate, keep
from iumad_jax.metrics import final
from iumad_jax.predict import predict
from iumad_jax.report import figures, html, live, tables
from iumad_jax.report.ledger import as_json
from iumad_jax.run import Run, is_trained, start
from iumad_jax.shapes import Prediction
from iumad_jax.snapshots import Position

_RESULTS = ("results.md", "results.tex", "results.csv", "report.html")


def run(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Runs a config's protocol in a workdir, going on where an earlier run of it stopped.

    Returns:
        What results.json holds (evaluation.md, "Public names"); None in processes other than the first.

    Raises:
        UserError: the config, the dataset or the workdir is at fault.
        Interrupted: the process was asked to end; see `interruption.handled`.
    """
    parallel.check_same(lambda: {"config": config.to_dict(), "workdir": workdirs.content(workdir)})
    configs.check(config)
    workdirs.check(workdir, config)
    finished = tables.read_results(workdir)
    if finished is not None and all((workdir / name).exists() for name in _RESULTS):  # else they are written anew
        print(f"{workdir}: this run is finished.")
        return finished

    steps = protocol.steps(config.protocol, data.objects(config))
    with ExitStack() as held:
        with parallel.first_before_others():
            data.render(config)
            this = start(config, workdir, data.open_reader(config), steps, held)
        for step in steps[this.position.step + this.position.finished :]:
            prepare(this, step)
            learn(this, step)
            assess(this, step)
        return conclude(this, steps)


@parallel.by_first
def prepare(this: Run, step: protocol.Step) -> None:
    """Prepares what the step learns from, where it is not yet."""
    for name in step.learned:
        this.store.prepare(name, "train")
        if this.store.reader.ids(name, "calibration"):
            this.store.prepare(name, "calibration")


def learn(this: Run, step: protocol.Step) -> None:
    """Trains on the good images of the objects that this step learns, from where the run stands."""
    config, strategy, method = this.config, this.strategy, this.systems[this.config.method]
    parallel.check_same(lambda: {"images": this.store.sources(strategy.objects(step)), "weights": this.store.settings})
    learned = [this.store.get(name, "train") for name in step.learned]
    sets = [this.store.get(name, "train") for name in strategy.objects(step)]
    images = sum(len(one.ids) for one in sets)
    if this.position.step < step.index:
        this.ledger.append("step", step=step.index, learned=step.learned, images=images)
        for name in step.learned:
            fitted, _ = inputs.good_images(this.store, name)
            shifts = inputs.quality_shifts(this.store, name)
            this.variables["recognition"] = recognition.observe(this.variables["recognition"], fitted, shifts)
        for one in learned:
            for name, system in this.systems.items():
                this.variables[name] = system.observe(this.variables[name], one.batch, step.index)
        this.position, this.optimizer_leaves = Position(step.index, 0), []
        if is_trained(config, method):
            example = jax.tree.map(lambda array: array[:1], sets[0].batch)
            this.memory = strategy.begin(this.memory, this.variables[config.method], example, step.index)
    this.live.begin(step.index, step.learned, images)
    if not is_trained(config, method):
        return

    per_epoch = updates_per_epoch(images, config.train.batch_size)
    own = train.of_step(config, step.index)
    rates, optimizer = train.learning_rates(own, per_epoch), this.optimizers[own.optimizer]
    done = this.position.updates
    variables, leaves = this.variables[config.method], this.optimizer_leaves
    state = train.start(variables, optimizer, done, leaves, this.memory)
    seed = config.seed * 1000 + step.index
    size, at_once = config.train.batch_size, int(config.debug.nans)
    pieces = training_input([one.batch for one in sets], size, seed, done, config.input.resident, at_once)
    names = [f"{name}/train/{id_}" for name, one in zip(strategy.objects(step), sets, strict=True) for id_ in one.ids]
    key = jax.random.fold_in(jax.random.key(config.seed), step.index)
    update, last = this.updates[own.optimizer], config.train.epochs
    passes = train.epochs(update, state, pieces, rates, key, per_epoch, last, this.losses, this.due)
    shown = lambda number: [names[row] for row in images_of(number, images, size, seed)]  # noqa: E731
    for epoch in numerics.explain(passes, step.index, per_epoch, shown):
        if epoch.whole:
            this.ledger.append("epoch", step=step.index, epoch=epoch.number, **epoch.losses)
            seen = per_epoch * size
            this.live.epoch(
                step.index, epoch.number, config.train.epochs, epoch.losses, epoch.learning_rate, seen, epoch.seconds
            )
        this.variables[config.method], this.memory = epoch.state.variables, epoch.state.memory
        this.position, this.losses = Position(step.index, epoch.updates), {} if epoch.whole else epoch.history
        if this.due() or epoch.updates == last * per_epoch:  # so that evaluation can be interrupted
            this.optimizer_leaves = jax.tree.leaves(epoch.state.optimizer)
            this.save()
    for one in learned:
        object_ = int(one.batch.object_id[0])
        this.memory = strategy.finish(this.memory, this.variables[config.method], one.batch, object_)


@parallel.by_first
def assess(this: Run, step: protocol.Step) -> None:
    """Evaluates every system on all objects seen so far, draws heatmaps, and takes the step's snapshot."""
    recogniser = recognition.fit(this.variables["recognition"])
    decided = decide(this, step, recogniser)
    for column, name in enumerate(tqdm(step.seen, "evaluating", unit="object", disable=None, leave=False)):
        if not this.store.reader.ids(name, "test"):  # the row stays NaN
            continue
        test = this.store.get(name, "test")
        assert test.truth is not None
        predictions = {}
        for system, method in this.systems.items():
            interruption.check()
            prediction = predictions[system] = predict(jax.jit(method.predict), this.variables[system], test.batch)
            values = evaluate(prediction, test.truth)
            for metric, value in values.items():
                this.matrices[system][metric][step.index, column] = value
            this.ledger.append("evaluation", step=step.index, object=name, method=system, **values)
            this.live.evaluation(step.index, name, system, values)
            if system == this.config.method:
                draw(this, step, name, test, prediction)
                distance = np.asarray(recognition.distances(recogniser, test.batch.features))
                decided["objects"][name]["test"] = decisions.rates(decided, name, prediction, test.truth, distance)
        keep(this.workdir, step.index, name, test, predictions)
    mean = final(this.matrices[this.config.method]["i_auroc"][: step.index + 1])
    if np.isfinite(mean):
        live.say(f"step {step.index}: mean I-AUROC {mean:.3f} over the objects seen")
    this.decisions.append(as_json(decided))
    sizes = {system: snapshots.size_of(this.variables[system]) for system in this.systems}
    for tell in (this.ledger.append, this.live.event):
        tell("decisions", step=step.index, **decided)
        tell("snapshot", step=step.index, bytes=sizes)
    this.position, this.optimizer_leaves = Position(step.index, 0, finished=True), []
    this.save()


def decide(this: Run, step: protocol.Step, recogniser: recognition.Recogniser) -> decisions.Decisions:
    """Sets the thresholds of all objects seen so far."""
    compiled, good = jax.jit(this.systems[this.config.method].predict), {}
    for name in step.seen:
        interruption.check()
        _, batch = inputs.good_images(this.store, name)
        good[name] = decisions.Good(
            predict(compiled, this.variables[this.config.method], batch),
            np.asarray(recognition.distances(recogniser, batch.features)),
            trained_on=not this.store.reader.ids(name, "calibration"),
        )
    return decisions.calibrate(good, this.config.decisions.quantile)


def draw(this: Run, step: protocol.Step, name: str, test: PreparedSet, prediction: Prediction) -> None:
    """Heatmaps of some of an object's test images after a step."""
    rows = figures.choose(test.defects, this.config.report.pictures_per_object)
    if not rows:
        return
    assert test.truth is not None
    path = this.workdir / "pictures" / f"step{step.index}_{name}.jpg"
    figures.save_heatmaps(
        path,
        title=f"{name} after step {step.index}: {this.config.method}, {this.config.modality}",
        labels=[f"{test.defects[row]} {test.ids[row]}" for row in rows],
        rgb=test.truth.thumbnail[rows],
        depth=test.truth.depth[rows],
        masks=test.truth.mask[rows],
        maps=prediction.map[rows],
        scores=prediction.score[rows],
    )
    this.live.picture(step.index, name, path)


@parallel.by_first
def conclude(this: Run, steps: tuple[protocol.Step, ...]) -> dict[str, Any]:
    """Writes the results and pictures of a finished run."""
    this.snapshots.wait()  # a run with results is not opened again
    config, objects = this.config, this.store.reader.objects
    results = tables.gather(
        config.to_dict(),
        objects,
        [step.learned for step in steps],
        this.matrices,
        {system: snapshots.size_of(this.variables[system]) for system in this.systems},
        memory_bytes(this),
        this.decisions,
        time.monotonic() - this.began,
    )
    for metric in tables.measured(results):
        matrix = this.matrices[config.method][metric]
        path = this.workdir / "pictures" / f"matrix_{metric}.png"
        figures.save_matrix(path, matrix, objects, [f"step {step.index}" for step in steps], metric)
    html.write(this.workdir, results, functools.partial(inputs.panels, this.store))
    tables.write_results(this.workdir, results)
    return results


def memory_bytes(this: Run) -> int:
    """What the strategy keeps between steps, beside the weights: its memory, or all images if it is not incremental."""
    if this.strategy.incremental:
        return snapshots.size_of(this.memory)
    return sum(snapshots.size_of(this.store.get(name, "train").batch) for name in this.store.reader.objects)
