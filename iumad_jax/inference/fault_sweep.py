"""What a trained model makes of worse photographs and depth."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax.data import readers
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
_RATES = ("I-AUROC", "false alarms", "misses", "recognised", "unknown")


def measure(config: ConfigDict, workdir: Path, progress: Progress) -> str:
    """A table of how decisions about the test images of `config.dataset` err, by fault and strength.

    Raises:
        UserError: the dataset is at fault, or holds no test images of an object that was learned.
    """
    reader = readers.open_reader(config)
    store = open_store(config, reader, workdir)
    learned = tuple(progress.calibration)
    tested = tuple(name for name in reader.objects if reader.ids(name, "test"))
    if not set(tested) & set(learned):
        raise UserError(f"there are no test images of {', '.join(learned)}, which were learned; add some.")
    config.baselines = ""  # baselines decide nothing
    model = evaluation.load(config, progress)
    rows = []
    for fault, strength in tqdm(_faults(store), unit="fault", disable=None, leave=False):
        read = functools.partial(_spoiled_images, store, fault=fault, strength=strength)
        by_object = {
            one.object: _rates(one, learned)
            for one in evaluation.judge(model, evaluation.test_sets(reader, tested, read))
        }
        known = [rates for name, rates in by_object.items() if name in learned]
        never = [rates["unknown"] for name, rates in by_object.items() if name not in learned]
        cells = [_percent([rates[rate] for rates in known]) for rate in _RATES]
        rows.append([fault, f"{strength:.2g}" if strength else "", *cells, _percent(never)])
    headers = ["fault", "strength", *_RATES, "unknown, of never learned"]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def _faults(store: Store) -> list[tuple[str, float]]:
    """What can go wrong with the images that the model sees, at several strengths, beginning with nothing."""
    faults: list[tuple[str, float]] = [("none", 0)]
    if "rgb" in store.processing.modalities:
        faults += [(fault, strength) for fault, strengths in _STRENGTHS.items() for strength in strengths]
    if "depth" in store.processing.modalities and store.processing.depth_encoding != "normals_official":
        mild = 1e3 * MILD_DEPTH_NOISE * store.reader.object_height
        faults += [(_DEPTH_NOISE, share * mild) for share in (0.25, 0.5, 1, 2.5)]
    return faults


def _spoiled_images(store: Store, name: str, fault: str, strength: float) -> PreparedSet:
    """An object's test images, each with the fault."""
    ids = store.reader.ids(name, "test")
    return store.encode(spoiled(store.reader.read(name, "test", id_), fault, strength) for id_ in ids)


def _rates(judgement: Judgement, learned: tuple[str, ...]) -> dict[str, float]:
    """How decisions err on an object's test images; NaN where undefined."""
    assert judgement.decision is not None
    number = learned.index(judgement.object) if judgement.object in learned else recognition.RECOGNISE
    rates = decisions.rates(judgement.decision, judgement.truth, number)
    i_auroc = image_auroc(judgement.truth.anomalous, judgement.prediction.score)
    return dict(zip(_RATES, (i_auroc, *rates.values()), strict=True))


def spoiled(sample: Sample, fault: str, strength: float) -> Sample:
    """The sample with the fault; the same whenever it is asked for."""
    rng = np.random.default_rng(list(f"{sample.object}/{sample.id}".encode()))
    if fault == _DEPTH_NOISE:
        return with_depth_noise(sample, strength / 1e3, rng)
    return dataclasses.replace(sample, rgb=FAULTS[fault].apply(sample.rgb, strength, rng)) if strength else sample


def _percent(values: list[float]) -> str:
    return "-" if np.isnan(values).all() else f"{np.nanmean(values):.1%}"
