"""What a trained model makes of worse photographs and depth: python -m iumad_jax.robustness --workdir=FOLDER.

The test images of the run's dataset, or of the one that --config.dataset.KEY=VALUE names, are judged as they are and
with faults of several strengths. Told are means over learned objects of the I-AUROC and of how often decisions err,
also on images that are taken for unknown; and which share is, of images of learned objects and of those never learned.
"""

import dataclasses
import sys

import numpy as np
from absl import flags
from tabulate import tabulate
from tqdm import tqdm

from iumad_jax import commands, data
from iumad_jax.data.degradation import FAULTS, MILD_DEPTH_NOISE, with_depth_noise
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.detector import Detector
from iumad_jax.errors import UserError
from iumad_jax.metrics import image_auroc

_STRENGTHS = {
    "JPEG, quality": (90, 75, 50, 20),
    "noise, grey levels": (1, 2, 5, 10),
    "blur, pixels": (0.5, 1, 2),
    "brightness, times": (0.5, 0.7, 0.9, 1.1, 1.3),
}
_DEPTH_NOISE = "depth noise, mm"
_RATES = ("I-AUROC", "false alarms", "misses", "recognised", "unknown")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return commands.execute(str(__doc__), arguments, commands.define_trained, _measure, dataset=True)


def _measure(values: flags.FlagValues) -> str:
    detector = Detector.load(commands.path(values, "workdir"), values.step)
    reader, modalities = data.open_reader(values.config), detector.processing.modalities
    tested = [name for name in reader.objects if reader.ids(name, "test")]
    if not set(tested) & set(detector.objects):
        raise UserError(f"there are no test images of {', '.join(detector.objects)}, which were learned; add some.")
    faults: list[tuple[str, float]] = [("none", 0)]
    if "rgb" in modalities:
        faults += [(fault, strength) for fault, strengths in _STRENGTHS.items() for strength in strengths]
    if "depth" in modalities and detector.processing.depth_encoding != "normals_official":  # the renderer's have none
        mild = 1e3 * MILD_DEPTH_NOISE * reader.object_height
        faults += [(_DEPTH_NOISE, share * mild) for share in (0.25, 0.5, 1, 2.5)]
    rows = []
    for fault, strength in tqdm(faults, unit="fault", disable=None, leave=False):
        by_object = {name: rates(detector, reader, name, fault, strength) for name in tested}
        learned = [found for name, found in by_object.items() if name in detector.objects]
        never = [found["unknown"] for name, found in by_object.items() if name not in detector.objects]
        cells = [_percent([found[rate] for found in learned]) for rate in _RATES]
        rows.append([fault, f"{strength:.2g}" if strength else "", *cells, _percent(never)])
    headers = ["fault", "strength", *_RATES, "unknown, of never learned"]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])


def rates(detector: Detector, reader: Reader, name: str, fault: str, strength: float) -> dict[str, float]:
    """How decisions err on an object's test images that have a fault; NaN where undefined."""
    samples = [spoiled(reader.read(name, "test", id_), fault, strength) for id_ in reader.ids(name, "test")]
    found = [detector(sample.rgb, sample.depth, sample.camera) for sample in samples]
    anomalous, alarm = (np.array([one.anomalous for one in of]) for of in (samples, found))
    return {
        "I-AUROC": image_auroc(anomalous, np.array([one.score for one in found])),
        "false alarms": _mean(alarm[~anomalous]),
        "misses": _mean(~alarm[anomalous]),
        "recognised": _mean(np.array([one.object == name for one in found])),
        "unknown": _mean(np.array([one.unknown for one in found])),
    }


def spoiled(sample: Sample, fault: str, strength: float) -> Sample:
    """The sample with the fault; the same whenever it is asked for."""
    rng = np.random.default_rng(list(f"{sample.object}/{sample.id}".encode()))
    if fault == _DEPTH_NOISE:
        return with_depth_noise(sample, strength / 1e3, rng)
    return dataclasses.replace(sample, rgb=FAULTS[fault].apply(sample.rgb, strength, rng)) if strength else sample


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else np.nan


def _percent(values: list[float]) -> str:
    return "-" if np.isnan(values).all() else f"{np.nanmean(values):.1%}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
