"""A run from its first step to its results: learn the objects of each step, evaluate, and write the ledger."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.data import plan, readers
from iumad_jax.data.batches import training_input
from iumad_jax.data.prepared import copies, inventory
from iumad_jax.data.prepared.good_images import good_images, quality_shifts, several_kinds, suspicious_images
from iumad_jax.data.prepared.squash import describe_squash
from iumad_jax.data.sample import Split
from iumad_jax.errors import UserError, counted, tell_once
from iumad_jax.inference import decisions, recognition
from iumad_jax.inference.detector import Detector
from iumad_jax.inference.thresholds import thresholds
from iumad_jax.methods.method import without_objects
from iumad_jax.protocol import Step
from iumad_jax.report import figures, html, result_files, tables
from iumad_jax.report.effects import in_one_line
from iumad_jax.report.history import history, results
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import live, processes, snapshots
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.runtime.progress import Position, Progress
from iumad_jax.training import nonfinite
from iumad_jax.training.dataset_changes import DatasetChanged, describe_changes
from iumad_jax.training.epochs import Epoch, Training, train_epochs
from iumad_jax.training.optimization import learning_rates, optimizer_name, step_config
from iumad_jax.training.run import Run, check, for_step, start
from iumad_jax.training.step_end import assess, judge_before
from iumad_jax.training.update import initial_state

_COMPARED = 50  # training images of a new object that are compared with the learned objects, at most
_RESULTS = ("results.md", "results.tex", "results.csv", "report.html")


def run(config: ConfigDict, workdir: Path, steps: tuple[Step, ...] = ()) -> dict[str, Any] | None:
    """Run the steps in a workdir that are not finished yet; by default those of its plan, see `plan.current`.

    Returns:
        Content of results.json (see `report.result_files`); None in processes other than process 0.

    Raises:
        UserError: If the config, the dataset or the workdir has an error.
        DatasetChanged: If the run is finished and the dataset has changed since.
        Interrupted: If the process was asked to end, see `preemption.handle_signals`.
    """
    processes.check_same(lambda: {"config": config.to_dict(), "workdir": workdirs.content(workdir)})
    configs.check(config)
    workdirs.check(workdir, config)
    moved = workdirs.moved_files(workdir, config)
    if moved and snapshots.last_step(workdir) >= 0:
        Detector.load(workdir, **moved)  # which refuses files with other content
    chosen, steps = bool(steps), steps or plan.current(config, workdir)
    processes.check_same(lambda: {"objects": [step.objects for step in steps]})
    finished = result_files.read(workdir)
    written = all((workdir / name).exists() for name in _RESULTS)
    nothing_to_do = finished is not None and written and len(finished["steps"]) == len(steps)
    if not nothing_to_do:
        with ExitStack() as resources:
            seconds = finished_seconds(workdir, steps)  # removed results are rewritten without training
            if seconds is None:
                seconds = run_steps(config, workdir, steps, resources)
            elif processes.is_process_zero():
                resources.enter_context(workdirs.claimed(workdir, config))
            finished = write_results(config, workdir, seconds)
    if finished and (changes := describe_changes(config, workdir, new_objects=not chosen)):
        raise DatasetChanged(f"{workdir}: the run is finished, but its dataset has changed since. {changes}", finished)
    if nothing_to_do:
        if moved and processes.is_process_zero():
            with workdirs.claimed(workdir, config):
                pass
        print(f"{workdir}: this run is finished.")
    return finished


def go_on(config: ConfigDict, workdir: Path, steps: tuple[Step, ...], finished: int) -> str:
    """Run the steps after the finished ones; describe what they did, and then all results.

    Raises:
        UserError: As `run`.
    """

    def describe(results: dict[str, Any]) -> str:
        return f"{effects(results, finished)}\n\n{tables.console(results, workdir)}".lstrip("\n")

    try:
        results = run(config, workdir, steps)
    except DatasetChanged as changed:
        print(describe(changed.results))
        raise
    assert results is not None  # one process
    return describe(results)


def effects(results: dict[str, Any], finished: int) -> str:
    """Describe in one line each what the steps after the finished ones did."""
    matrix, acts, limits = results["matrix"]["i_auroc"], results["acts"], results["decisions"]
    return "\n".join(in_one_line(matrix, acts, limits, step) for step in range(finished, len(acts)))


def finished_seconds(workdir: Path, steps: tuple[Step, ...]) -> float | None:
    """Return the run time of a run whose last step is finished, else None."""
    try:
        progress = snapshots.read(workdir) if inventory.read(workdir) else None
    except UserError:  # reported when the run resumes
        return None
    return progress.seconds if progress and progress.position.step == steps[-1].index else None


def run_steps(config: ConfigDict, workdir: Path, steps: tuple[Step, ...], resources: ExitStack) -> float:
    """Run the remaining steps and return the run time of the whole run, seconds."""
    check(config, workdir, steps)
    with processes.process_zero_first():
        for dataset in plan.rendered(config, steps):
            readers.render(dataset)
        run, progress = start(config, workdir, steps, resources)
    for step in run.steps[progress.position.step + progress.position.finished :]:
        run_of_step = for_step(run, step)
        prepare(run_of_step, step, progress)
        progress = learn(run_of_step, step, progress)
        progress = assess(run_of_step, step, progress) or progress  # None in processes other than process 0
    run.snapshots.wait()  # results are written after all snapshots
    return progress.seconds


@processes.process_zero_only
def prepare(run: Run, step: Step, progress: Progress) -> None:
    """Prepare the good images that the step uses, report suspicious ones, and add the step to the plan.

    Raises:
        UserError: If most further images of an object are taken for another one.
    """
    splits: tuple[Split, ...] = ("train", "calibration")
    altered = {"learn": copies.ALTERED, "update": ("degraded",)}.get(step.act, ())
    for name, image_set in itertools.product(step.objects, (*splits, *altered)):
        if copies.ids(run.images.reader, name, image_set):
            run.images.prepare(name, image_set)
    for message in itertools.chain.from_iterable(suspicious_images(run.images, name) for name in step.objects):
        live.log(message)
    for name in step.learned:
        if warning := several_kinds(run.images.get(name, "train"), name):
            live.log(warning)
    if warning := describe_squash(run.store, step.learned):
        tell_once(("squash", run.workdir), warning)
    if progress.calibration and progress.position.step < step.index:
        report_resemblance(run, step, progress)
    inventory.record_images(run.workdir, run.store, step.learned, splits)
    plan.begin(run.config, run.workdir, run.steps, step)


def report_resemblance(run: Run, step: Step, progress: Progress) -> None:
    """Report or refuse images most of which are taken for another learned object."""
    limits = thresholds(progress.calibration, run.config.decisions.quantile)
    recogniser, tiles = recognition.fit(progress.recognition, progress.retired), run.store.processing.tiling.count
    for name in step.trained:
        first_images = jax.tree.map(
            lambda array: array[: _COMPARED * tiles], run.images.get(name, "train").batch.features
        )
        distance = recognition.of_images(recognition.distances(recogniser, first_images), tiles)
        number, share = decisions.resembled(limits, distance)
        taken = progress.objects[number]
        if share > 0.5 and step.act == "learn":
            live.log(
                f"{name} looks like {taken}: {share:.0%} of its training images are taken for it. If it is the same"
                " object, undo this step (learn --after) and take its folder away."
            )
        elif share > 0.5 and taken != name:
            raise UserError(
                f"{share:.0%} of the further images of {name} are taken for {taken}; check that they show {name}."
            )


def learn(run: Run, step: Step, progress: Progress) -> Progress:
    """Train the step from the current position to its end."""
    objects = run.strategy.objects(step)
    processes.check_same(lambda: {"images": run.images.sources(objects), "weights": run.store.settings})
    sets = [run.images.get(name, "train") for name in objects]
    images = sum(len(prepared.ids) for prepared in sets)
    batch_size = min(run.config.train.batch_size, sum(len(prepared.tile_ids) for prepared in sets))
    training = Training(step, objects, sets, images, batch_size, run.config.seed * 1000 + step.index)
    if progress.position.step < step.index:
        progress = observe(run, training, progress)
    run.live.log_step(step.index, step.act, step.objects, images if step.trained else step.new_images, step.changes)
    trained = run.trained and bool(objects)
    if trained and batch_size < run.config.train.batch_size:
        live.log(f"step {step.index}: batches of {batch_size}, for only {counted(images, 'training images')}")
    for epoch in epochs(run, training, progress) if trained else ():
        progress = record(run, training, epoch, progress)
    strategy_state, variables = progress.strategy_state, without_objects(progress.variables[run.config.method])
    for name in step.trained if run.method.loss else ():
        batch = run.images.get(name, "train").batch
        strategy_state = run.strategy.finish(strategy_state, variables, batch, int(batch.object_id[0]))
    return fit(run, training, progress._replace(strategy_state=strategy_state))


def fit(run: Run, training: Training, progress: Progress) -> Progress:
    """Let every method fit what the errors of the objects are measured against, with the weights after training."""
    variables, further = dict(progress.variables), training.step.act == "update"
    for (method_name, method), images in itertools.product(run.methods.items(), training.sets):
        batch = images.batch
        variables[method_name] = method.fit(variables[method_name], batch, int(batch.object_id[0]), further)
    return progress._replace(variables=variables)


def observe(run: Run, training: Training, progress: Progress) -> Progress:
    """Begin a step: update the statistics of all methods and of the recogniser, and the state of the strategy."""
    step, variables, statistics = training.step, dict(progress.variables), progress.recognition
    judge_before(run, step, progress)
    run.ledger.append(
        "step",
        step=step.index,
        act=step.act,
        objects=step.objects,
        images=training.images if step.trained else step.new_images,
        changes=step.changes,
    )
    for method_name, method in run.methods.items():
        key = jax.random.key(run.config.seed + 1)
        variables[method_name] = method.grow(variables[method_name], len(step.seen), key)
    for name in step.trained:
        batch = run.images.get(name, "train").batch
        learned = good_images(run.images, name).learned if step.act == "learn" else batch
        statistics = recognition.add_object(statistics, learned, quality_shifts(run.images, name))
        for method_name, method in run.methods.items():
            variables[method_name] = method.observe(variables[method_name], batch, step.index)
    strategy_state = progress.strategy_state
    if run.trained and training.sets:
        example = jax.tree.map(lambda array: array[:1], training.sets[0].batch)
        strategy_state = run.strategy.begin(strategy_state, variables[run.config.method], example, step.index)
    position = Position(step.index, 0)
    return progress._replace(
        objects=step.seen,
        position=position,
        variables=variables,
        recognition=statistics,
        strategy_state=strategy_state,
        optimizer=[],
    )


def epochs(run: Run, training: Training, progress: Progress) -> Iterator[Epoch]:
    """Train the step; yield every epoch, and an incomplete one when a snapshot is due."""
    config, index, first = run.config, training.step.index, progress.position.updates
    train_config = step_config(config, index)
    name = optimizer_name(run.method, train_config)
    rates, optimizer = learning_rates(train_config, training.per_epoch), run.optimizers[name]
    variables = without_objects(progress.variables[config.method])
    state = initial_state(variables, optimizer, first, progress.optimizer, progress.strategy_state)
    batches = [prepared.batch for prepared in training.sets]
    stream = training_input(
        batches, training.batch_size, training.seed, first, config.input.resident, int(config.debug.nans)
    )
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    update, count = run.updates[name], config.train.epochs
    if first and processes.is_process_zero():
        live.log(f"step {index}: going on after {first} of {training.per_epoch * count} updates")
    passes = train_epochs(update, state, stream, rates, key, training.per_epoch, count, progress.losses, run.due)
    return nonfinite.explain(passes, index, training.per_epoch, training.names)


def record(run: Run, training: Training, epoch: Epoch, progress: Progress) -> Progress:
    """Record an epoch, and take a snapshot if one is due or the epoch is the last."""
    index, total, method = training.step.index, run.config.train.epochs, run.config.method
    if epoch.complete:
        run.ledger.append("epoch", step=index, epoch=epoch.number, **epoch.losses)
        images = training.per_epoch * training.batch_size
        run.live.log_epoch(index, epoch.number, total, epoch.losses, epoch.learning_rate, images, epoch.seconds)
    progress = progress._replace(
        position=Position(index, epoch.updates),
        variables=progress.variables | {method: progress.variables[method] | epoch.state.variables},
        strategy_state=epoch.state.strategy_state,
        losses={} if epoch.complete else epoch.history,
    )
    if run.due() or epoch.updates == total * training.per_epoch:  # an interrupted evaluation need not train again
        progress = run.save(progress._replace(optimizer=jax.tree.leaves(epoch.state.optimizer)))
    return progress


@processes.process_zero_only
def write_results(config: ConfigDict, workdir: Path, seconds: float) -> dict[str, Any]:
    """Write the results and pictures of a finished run from the content of its workdir."""
    measured = history(ledgers.read(workdir / "ledger.jsonl"))
    finished = results(config.to_dict(), measured, seconds)
    for metric in tables.measured(finished):
        matrix = measured.matrices[config.method][metric]
        path = workdir / "pictures" / f"matrix_{metric}.png"
        figures.save_matrix(path, matrix, measured.objects, [f"step {i}" for i in range(len(measured.steps))], metric)
    html.write(workdir, finished)
    result_files.write(workdir, finished)
    return finished
