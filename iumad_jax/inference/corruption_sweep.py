"""Robustness of a trained model to corrupted photographs and depth."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax.data import plan
from iumad_jax.data.degradation import FAULTS, MILD_DEPTH_NOISE, with_depth_noise
from iumad_jax.data.prepared.store import PreparedSet, Store, open_store
from iumad_jax.data.sample import Sample
from iumad_jax.errors import UserError
from iumad_jax.inference import decisions, evaluation, recognition
from iumad_jax.inference.evaluation import Judgement
from iumad_jax.metrics import image_auroc
from iumad_jax.runtime.progress import Progress

_STRENGTHS = {
    "JPEG, quality": (90, 75, 50, 20),
    "noise, grey levels": (1, 2, 5, 10),
    "blur, pixels": (0.5, 1, 2),
    "brightness, times": (0.5, 0.7, 0.9, 1.1, 1.3),
}
_DEPTH_NOISE = "depth noise, mm"
_RATES = {
    "i_auroc": "I-AUROC",
    "false_alarms": "false alarms",
    "misses": "misses",
    "recognised": "recognised",
    "taken_as_unknown": "unknown",
}


def measure(config: ConfigDict, workdir: Path, progress: Progress) -> str:
    """Tabulate the error rates of decisions on the test images of `config.dataset`, by corruption and strength.

    Raises:
        UserError: If the dataset cannot be used or has no test images of a learned object.
    """
    reader = plan.open_for_use(config, workdir, progress.position.step)
    store = open_store(config, reader, workdir, progress.inputs)
    learned = tuple(progress.calibration)
    retired = [name for name, calibration in progress.calibration.items() if calibration.retired]
    tested = tuple(name for name in reader.objects if reader.ids(name, "test") and name not in retired)
    if not set(tested) & set(learned):
        raise UserError(
            f"{config.dataset.root} has no test images of the learned objects {', '.join(learned)}; add some."
        )
    config.baselines = ""  # baselines make no decisions
    model = evaluation.load(config, progress)
    rows = []
    for corruption, strength in tqdm(_corruptions(store), unit="corruption", disable=None, leave=False):
        read = functools.partial(_corrupted_images, store, corruption=corruption, strength=strength)
        rates_by_object = {
            judgement.object: _rates(judgement, learned)
            for judgement in evaluation.judge(model, evaluation.test_sets(reader, tested, read))
        }
        rates_of_learned = [rates for name, rates in rates_by_object.items() if name in learned]
        unknown_of_unlearned = [
            rates["taken_as_unknown"] for name, rates in rates_by_object.items() if name not in learned
        ]
        cells = [_percent([rates[rate] for rates in rates_of_learned]) for rate in _RATES]
        rows.append([corruption, f"{strength:.2g}" if strength else "", *cells, _percent(unknown_of_unlearned)])
    headers = ["corruption", "strength", *_RATES.values(), "unknown (never learned)"]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def _corruptions(store: Store) -> list[tuple[str, float]]:
    """List the corruptions of the model's modalities with their strengths, after an entry for no corruption."""
    corruptions: list[tuple[str, float]] = [("none", 0)]
    if "rgb" in store.processing.modalities:
        corruptions += [(name, strength) for name, strengths in _STRENGTHS.items() for strength in strengths]
    if "depth" in store.processing.modalities and store.processing.depth_encoding != "normals_official":
        mild = 1e3 * MILD_DEPTH_NOISE * store.reader.object_height
        corruptions += [(_DEPTH_NOISE, factor * mild) for factor in (0.25, 0.5, 1, 2.5)]
    return corruptions


def _corrupted_images(store: Store, name: str, corruption: str, strength: float) -> PreparedSet:
    """Corrupt and encode the test images of an object."""
    ids = store.reader.ids(name, "test")
    return store.encode(corrupt(store.reader.read(name, "test", id_), corruption, strength) for id_ in ids)


def _rates(judgement: Judgement, learned: tuple[str, ...]) -> dict[str, float]:
    """Compute the error rates of decisions on an object's test images; NaN where undefined."""
    assert judgement.decision is not None
    number = learned.index(judgement.object) if judgement.object in learned else recognition.RECOGNISE
    rates = decisions.rates(judgement.decision, judgement.truth, number)
    i_auroc = image_auroc(judgement.truth.anomalous, judgement.prediction.score)
    return {"i_auroc": i_auroc, **rates}


def corrupt(sample: Sample, corruption: str, strength: float) -> Sample:
    """Return the corrupted sample. Its noise is reproducible: object name and image id are the seed."""
    rng = np.random.default_rng(list(f"{sample.object}/{sample.id}".encode()))
    if corruption == _DEPTH_NOISE:
        return with_depth_noise(sample, strength / 1e3, rng)
    return dataclasses.replace(sample, rgb=FAULTS[corruption].apply(sample.rgb, strength, rng)) if strength else sample


def _percent(values: list[float]) -> str:
    """Format the mean of the values that are not NaN."""
    return "-" if np.isnan(values).all() else f"{np.nanmean(values):.1%}"
