"""Measure time, memory and exactness of an evaluation of the size of MVTec 3D-AD.

    python -m tests.harness.metrics

The evaluation computes all metrics and tables of 1,197 anomaly maps of ten objects, without pictures. The random maps
of 224 x 224 pixels are interpolated from 14 x 14 tokens, like those of a model. The metrics of the first object are
compared with scikit-learn and with AUPRO computed by loops.
"""

import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from iumad_jax import cli
from iumad_jax.inference.evaluation import metrics_of
from iumad_jax.report import tables
from iumad_jax.report.history import History, results
from iumad_jax.shapes import MAP_SIZE, GroundTruth, Prediction

_IMAGES = (110, 108, 159, 131, 130, 100, 132, 114, 101, 112)  # test images per object, a fifth of them good


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    return cli.execute(str(__doc__), arguments, lambda _: None, lambda _: _measure())


def _measure() -> str:
    objects = [f"object {index}" for index in range(len(_IMAGES))]
    matrix = {metric: np.full((1, len(objects)), np.nan) for metric in tables.METRICS}
    seconds = sorting = 0.0
    for index, (prediction, truth) in enumerate(_sets()):
        start = time.perf_counter()
        for metric, value in metrics_of(prediction, truth).items():
            matrix[metric][0, index] = value
        seconds += time.perf_counter() - start
        start = time.perf_counter()
        np.sort(prediction.map, axis=None)
        sorting += time.perf_counter() - start
        if index == 0:
            difference = _difference(matrix, prediction, truth)
    start = time.perf_counter()
    config: dict[str, Any] = {"method": "random", "modality": "rgb", "dataset": {"name": "noise"}, "protocol": "10-0"}
    config["continual"] = {"strategy": "none"}
    unknown = {"objects": np.full((len(objects), 2), np.nan), "mean": (np.nan, np.nan)}
    intervals = {"random": dict.fromkeys(tables.METRICS, unknown)}
    acts = [{"act": "learn", "objects": objects, "before": {}}]
    history = History((tuple(objects),), acts, {}, {"random": matrix}, intervals, {"random": {}}, [], {"random": 0}, 0)
    tables.markdown(results(config, history, seconds))
    seconds += time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    return (
        f"evaluation of {sum(_IMAGES)} maps: {seconds:.2f} s, {seconds / sorting:.1f} times the time of sorting them\n"
        f"largest difference from scikit-learn and loops: {difference:.1e}\n"
        f"peak memory: {peak:.2f} GB"
    )


def _sets() -> Iterator[tuple[Prediction, GroundTruth]]:
    """Yield random predictions and ground truth of every object."""
    rng: Any = np.random.default_rng(0)
    shape, empty = (MAP_SIZE, MAP_SIZE), rng.random(0)
    for count in _IMAGES:
        tokens = rng.gamma(2, size=(count, 14, 14))
        maps: Any = np.stack([ndimage.zoom(grid, MAP_SIZE / 14, order=1) for grid in tokens]).astype(np.float32)
        anomalous: Any = np.arange(count) % 5 > 0
        masks: Any = np.zeros((count, *shape), bool)
        for mask, top, left in zip(masks, *rng.integers(0, MAP_SIZE - 24, (2, count)), strict=True):
            mask[top : top + 24, left : left + 16] = True
        masks &= anomalous[:, None, None]
        region: Any = np.broadcast_to(np.hypot(*np.mgrid[-1:1:224j, -1:1:224j]) < 0.6, masks.shape)
        truth = GroundTruth(masks, anomalous | True, region, region, anomalous, empty, empty)
        yield Prediction(maps, maps.max((1, 2)), None), truth


def _difference(matrix: dict[str, np.ndarray], prediction: Prediction, truth: GroundTruth) -> float:
    """Return the largest difference of an object's metrics from scikit-learn and from AUPRO as defined."""
    maps, masks = np.asarray(prediction.map), np.asarray(truth.mask)
    expected = {
        "i_auroc": roc_auc_score(truth.anomalous, prediction.score),
        "p_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
        "aupro": _aupro(masks, maps, ~masks),
        "aupro_object": _aupro(masks, maps, ~masks & np.asarray(truth.object)),
    }
    return max(abs(float(matrix[metric][0, 0]) - value) for metric, value in expected.items())


def _aupro(masks: np.ndarray, maps: np.ndarray, negative: np.ndarray, limit: float = 0.3) -> float:
    """Compute AUPRO by loops, as it is defined."""
    defects = []
    for mask, heat in zip(masks, maps, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        defects += [heat[labels == number] for number in range(1, count + 1)]
    scores = np.sort(maps[negative])
    points = [(1.0, 1.0)]
    for position in np.linspace(0, len(scores) - 1, 100).astype(int):
        overlap = np.mean([np.mean(defect > scores[position]) for defect in defects])
        points.append((1 - (position + 1) / len(scores), float(overlap)))
    rates, overlaps = np.array(sorted(points)).T
    inside = rates <= limit
    x, y = np.append(rates[inside], limit), np.append(overlaps[inside], np.interp(limit, rates, overlaps))
    return float(np.trapezoid(y, x) / limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
