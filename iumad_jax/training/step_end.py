"""The end of a step: calibration, evaluation and its snapshot."""

import functools

from jaxtyping import Array, Float

from iumad_jax.data.prepared import copies, inventory, kept
from iumad_jax.data.prepared.good_images import CalibrationImages, calibration_images, good_images
from iumad_jax.data.sample import Split
from iumad_jax.inference import assessment, decisions, evaluation, recognition
from iumad_jax.inference.evaluation import Judgement
from iumad_jax.inference.thresholds import describe
from iumad_jax.protocol import Step
from iumad_jax.report import effects, figures
from iumad_jax.report.history import history
from iumad_jax.runtime import ledger as ledgers
from iumad_jax.runtime import live, preemption, processes, snapshots
from iumad_jax.runtime.progress import Position, Progress
from iumad_jax.runtime.shared_arrays import SharedArrays
from iumad_jax.training.run import Run


@processes.process_zero_only
def assess(run: Run, step: Step, progress: Progress) -> Progress:
    """Set thresholds, evaluate what the step may have changed on test images, and take the step's snapshot."""
    shared = run.snapshots.shared

    def kept_images(name: str) -> CalibrationImages:
        return kept.load(shared, progress.kept[name], step.seen.index(name))

    def calibrating(name: str) -> CalibrationImages:
        return good_images(run.images, name).calibrating if name in step.learned else kept_images(name)

    def joint_means(name: str) -> Float[Array, "n c"]:
        if name in step.learned:
            return recognition.joint_means(calibrating(name).images.features)
        return kept_means(shared, tuple(sorted(progress.kept[name]["arrays"].items())))

    for name in step.objects if step.act not in ("retire", "restore") else ():
        new, earlier = new_calibration_images(run, step, name), kept_images(name) if name in progress.kept else None
        count, tiles = run.config.decisions.kept_images, run.store.processing.tiling.count
        record = kept.keep(shared, new, count, earlier, tiles)
        progress = progress._replace(kept=progress.kept | {name: record})
    progress, model = assessment.calibrate(run.config, run.methods, progress, step, calibrating, joint_means)
    described, scale = describe(progress.calibration, run.config.decisions.quantile), run.store.processing.height_scale
    numbers = {name: number for number, name in enumerate(step.seen)}
    tests = test_sets(run, changed_objects(step, progress))
    for judgement in assessment.assess(model, tests, numbers, described, step.index, run.ledger, run.workdir, scale):
        preemption.check()
        show(run, step, judgement)
    if described_state := run.strategy.describe(progress.strategy_state):
        run.ledger.append("strategy", step=step.index, **described_state)
    stored = {"bytes": sizes(run, progress), "strategy_bytes": strategy_bytes(run, step, progress)}
    for append in (run.ledger.append, run.live.log_event):
        append("decisions", step=step.index, **described)
        append("snapshot", step=step.index, **stored)
    measured = history(ledgers.read(run.workdir / "ledger.jsonl"))
    matrix = measured.matrices[run.config.method]["i_auroc"]
    live.log(effects.in_one_line(matrix, measured.acts, measured.decisions, step.index))
    inventory.record_images(run.workdir, run.store, tests, ("test",))
    position = Position(step.index, 0, finished=True)
    return run.save(progress._replace(position=position, optimizer=[]))


@functools.lru_cache(maxsize=1000)
def kept_means(shared: SharedArrays, digests: tuple[tuple[str, str], ...]) -> Float[Array, "n c"]:
    """Return `recognition.joint_means` of the calibration images kept of an object, of which each step needs them."""
    images = kept.load(shared, {"arrays": dict(digests), "few": False}, 0).images
    return recognition.joint_means(images.features)


def new_calibration_images(run: Run, step: Step, name: str) -> CalibrationImages:
    """Return the calibration images of an object that a step brings."""
    if step.act == "learn":
        return good_images(run.images, name).calibrating
    split: Split = "calibration" if run.images.reader.ids(name, "calibration") else "train"
    images, trained = run.images.get(name, split).batch, split == "train" and step.act == "update"
    return calibration_images(images, trained, few=trained and len(run.images.reader.ids(name, split)) < copies.FEW)


def changed_objects(step: Step, progress: Progress) -> tuple[str, ...]:
    """Return the objects whose anomaly maps a step may have changed, retired ones left out."""
    if not step.trained:
        return step.objects if step.act in ("calibrate", "restore") else ()
    return tuple(name for name in step.seen if not progress.calibration[name].retired)


def test_sets(run: Run, objects: tuple[str, ...]) -> evaluation.TestSets:
    """Return those of the objects' test images that are there."""
    return evaluation.test_sets(run.store.reader, objects, lambda name: run.store.get(name, "test"))


@processes.process_zero_only
def judge_before(run: Run, step: Step, progress: Progress) -> None:
    """Record how well the objects of an update or calibration are judged before it."""
    if step.act not in ("update", "calibrate"):
        return
    model = evaluation.make_model(run.config, {run.config.method: run.method}, progress)
    for judgement in evaluation.judge(model, test_sets(run, step.objects)):
        assert judgement.decision is not None
        rates = decisions.rates(judgement.decision, judgement.truth, step.seen.index(judgement.object))
        values = {"i_auroc": judgement.metrics["i_auroc"], **rates}
        run.ledger.append("before", step=step.index, object=judgement.object, **values)


def show(run: Run, step: Step, judgement: Judgement) -> None:
    """Show the metrics of an object and a method in the live view, and draw heatmaps of the run's method."""
    name, method = judgement.object, judgement.method
    run.live.log_evaluation(step.index, name, method, judgement.metrics, judgement.details)
    rows = figures.choose(judgement.images.defects, run.config.report.pictures_per_object)
    if judgement.decision is None or not rows:
        return
    path = run.workdir / "pictures" / f"step{step.index}_{name}.jpg"
    figures.save_heatmaps(
        path,
        title=f"{name} after step {step.index}: {method}, {run.config.modality}",
        labels=[figures.label(judgement.images.defects[row], judgement.images.ids[row]) for row in rows],
        rgb=judgement.truth.thumbnail[rows],
        heights=judgement.truth.height[rows],
        height_scale=run.store.processing.height_scale,
        masks=judgement.truth.mask[rows],
        maps=judgement.prediction.map[rows],
        scores=judgement.prediction.score[rows],
    )
    run.live.log_picture(step.index, name, path)


def sizes(run: Run, progress: Progress) -> dict[str, int]:
    """Return the bytes that each method stores."""
    return {name: snapshots.size_of(snapshots.stored(progress.variables[name])) for name in run.methods}


def strategy_bytes(run: Run, step: Step, progress: Progress) -> int:
    """Return the bytes that the strategy stores for later steps: its state, or all images if not incremental."""
    if run.strategy.incremental:
        return snapshots.size_of(progress.strategy_state)
    return sum(snapshots.size_of(run.store.get(name, "train").batch) for name in step.seen)
