"""What a run keeps of every test image for its report: `samples/step<l>_<object>.npz`, a few kB per image.

Scores and curves are exact; maps are kept at a quarter of their size in 8 bits, which is for looking.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iumad_jax.errors import UserError
from iumad_jax.metrics import pro_curve
from iumad_jax.runtime.storage import write_whole

if TYPE_CHECKING:
    from iumad_jax.inference.evaluation import Judgement

RATES = np.concatenate([np.geomspace(1e-4, 0.01, 21)[:-1], np.linspace(0.01, 0.3, 30)])  # where PRO curves are kept
_SHRINK = 4  # maps are interpolated from tokens larger than this


class Samples(NamedTuple):
    """The test images of one object after one step."""

    ids: tuple[str, ...]
    defects: tuple[str, ...]
    anomalous: NDArray  # (n,) bool
    scores: dict[str, NDArray]  # by system: (n,)
    overlap: dict[str, NDArray]  # by system: (r,) at RATES, NaN where undefined
    thresholds: dict[str, NDArray]  # by system: (r,), of the maps
    alarm: NDArray  # (n,) bool: whether the run's own method calls the image anomalous
    pixel_threshold: NDArray  # (n,): above which it marks pixels
    maps: NDArray  # (n, s, s) uint8 of the run's own method: 0 stands for low, 255 for high
    low: float
    high: float


def summarise(
    ids: Sequence[str],
    defects: Sequence[str],
    anomalous: ArrayLike,
    masks: ArrayLike | None,
    scores: Mapping[str, ArrayLike],
    maps: Mapping[str, ArrayLike],
    alarm: ArrayLike,
    pixel_threshold: ArrayLike,
) -> Samples:
    """What is kept of an object's predictions.

    Args:
        ids: (n,) names of the images.
        defects: (n,) their kinds.
        anomalous: (n,), above 0 where the image has a defect.
        masks: (n, m, m), above 0 where a pixel is defective; None where nobody marked them: then thresholds are taken
            from good images alone.
        scores: by system: (n,); the run's own method comes first.
        maps: by system: (n, m, m).
        alarm: (n,), whether the run's own method calls the image anomalous.
        pixel_threshold: (n,), of its maps, by the object that it recognised.
    """
    curves = {}
    for name, of_system in maps.items():
        suspect = np.broadcast_to(np.reshape(anomalous, (-1, 1, 1)), np.shape(of_system))  # every pixel of these images
        overlap, thresholds = pro_curve(suspect if masks is None else masks, of_system, RATES)
        curves[name] = (np.full_like(overlap, np.nan) if masks is None else overlap), thresholds
    own = np.asarray(next(iter(maps.values())), np.float32)
    count, side = len(own), own.shape[1] // _SHRINK
    small = own.reshape(count, side, _SHRINK, side, _SHRINK).mean(axis=(2, 4))
    low, high = float(small.min()), float(small.max())
    return Samples(
        tuple(ids),
        tuple(defects),
        np.asarray(anomalous) > 0,
        {name: np.asarray(of_system) for name, of_system in scores.items()},
        {name: curve[0] for name, curve in curves.items()},
        {name: curve[1] for name, curve in curves.items()},
        np.asarray(alarm, bool),
        np.asarray(pixel_threshold, np.float32),
        np.rint((small - low) * (255 / ((high - low) or 1))).astype(np.uint8),
        low,
        high,
    )


def keep(workdir: Path, step: int, judgements: Sequence["Judgement"]) -> None:
    """Keeps what a report shows of an object's test images after a step.

    Args:
        workdir: where samples are kept.
        step: its number.
        judgements: of one object, by all methods, the run's own one first.

    Raises:
        UserError: it cannot be written.
    """
    first = judgements[0]
    assert first.decision is not None
    kept = summarise(
        first.images.ids,
        first.images.defects,
        first.truth.anomalous,
        first.truth.mask if first.truth.masked.all() else None,
        {one.method: one.prediction.score for one in judgements},
        {one.method: one.prediction.map for one in judgements},
        first.decision.anomalous,
        first.decision.pixel_threshold,
    )
    save(workdir, step, first.object, kept)


def save(workdir: Path, step: int, object_: str, samples: Samples) -> None:
    """Writes the file, whole or not at all.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    path = _path(workdir, step, object_)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, or choose another folder") from error
    names = list(samples.scores)
    by_system = {f: np.stack([getattr(samples, f)[n] for n in names]) for f in ("scores", "overlap", "thresholds")}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, systems=names, **samples._asdict() | by_system)
    write_whole(path, file.getvalue())


def exist(workdir: Path, step: int, object_: str) -> bool:
    """Whether the file was written."""
    return _path(workdir, step, object_).exists()


def load(workdir: Path, step: int, object_: str) -> Samples:
    """Reads what `save` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = _path(workdir, step, object_)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = dict(file)
        names = found.pop("systems").tolist()
        for field in ("scores", "overlap", "thresholds"):
            found[field] = dict(zip(names, found[field], strict=True))
        for field in ("ids", "defects"):
            found[field] = tuple(found[field].tolist())
        return Samples(**found | {"low": float(found["low"]), "high": float(found["high"])})
    except Exception as error:  # NumPy and zipfile raise whatever damage leads to
        raise UserError(f"{path} cannot be read ({error}); restore it") from error


def _path(workdir: Path, step: int, object_: str) -> Path:
    return workdir / "samples" / f"step{step}_{object_}.npz"
