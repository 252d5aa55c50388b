"""What a run keeps of every test image for its report, in `samples/`, a few kB per image.

`step<l>_<object>.npz` holds scores and curves, which are exact, and maps at a quarter of their size in 8 bits, for
looking; `pictures_<object>.npz` holds small pictures of the images that were evaluated last.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from iumad_jax.errors import UserError
from iumad_jax.metrics import pro_curve
from iumad_jax.report.figures import HOLE, RELIEF, relief
from iumad_jax.runtime import storage

RATES = np.concatenate([np.geomspace(1e-4, 0.01, 21)[:-1], np.linspace(0.01, 0.3, 30)])  # where PRO curves are kept
_SHRINK = 4  # maps are interpolated from tokens larger than this


class Samples(NamedTuple):
    """The test images of one object after one step."""

    ids: tuple[str, ...]
    defects: tuple[str, ...]
    anomalous: NDArray  # (n,) bool
    scores: dict[str, NDArray]  # by method: (n,)
    overlap: dict[str, NDArray]  # by method: (r,) at RATES, NaN where undefined
    thresholds: dict[str, NDArray]  # by method: (r,), of the maps
    alarm: NDArray  # (n,) bool: whether the run's own method calls the image anomalous
    pixel_threshold: NDArray  # (n,): above which it marks pixels
    maps: NDArray  # (n, s, s) uint8 of the run's own method: 0 stands for low, 255 for high
    low: float
    high: float


class Picture(NamedTuple):
    """A test image to look at."""

    rgb: bytes  # a WebP image
    relief: bytes  # the same, of its heights; empty without depth
    outline: str  # of the defect: the path of an SVG, a unit being a pixel
    size: tuple[int, int]  # pixels, rows and columns


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
        scores: by method: (n,); the run's own method comes first.
        maps: by method: (n, m, m).
        alarm: (n,), whether the run's own method calls the image anomalous.
        pixel_threshold: (n,), of its maps, by the object that it recognised.
    """
    curves = {}
    for name, values in maps.items():
        suspect = np.broadcast_to(np.reshape(anomalous, (-1, 1, 1)), np.shape(values))  # every pixel of these images
        overlap, thresholds = pro_curve(suspect if masks is None else masks, values, RATES)
        curves[name] = (np.full_like(overlap, np.nan) if masks is None else overlap), thresholds
    own = np.asarray(next(iter(maps.values())), np.float32)
    count, side = len(own), own.shape[1] // _SHRINK
    small = own.reshape(count, side, _SHRINK, side, _SHRINK).mean(axis=(2, 4))
    low, high = float(small.min()), float(small.max())
    return Samples(
        tuple(ids),
        tuple(defects),
        np.asarray(anomalous) > 0,
        {name: np.asarray(values) for name, values in scores.items()},
        {name: curve[0] for name, curve in curves.items()},
        {name: curve[1] for name, curve in curves.items()},
        np.asarray(alarm, bool),
        np.asarray(pixel_threshold, np.float32),
        np.rint((small - low) * (255 / ((high - low) or 1))).astype(np.uint8),
        low,
        high,
    )


def save(workdir: Path, step: int, object_: str, samples: Samples) -> None:
    """Writes the file, whole or not at all.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    names = list(samples.scores)
    by_method = {f: np.stack([getattr(samples, f)[n] for n in names]) for f in ("scores", "overlap", "thresholds")}
    _write(_path(workdir, step, object_), methods=names, **samples._asdict() | by_method)


def exist(workdir: Path, step: int, object_: str) -> bool:
    """Whether the file was written."""
    return _path(workdir, step, object_).exists()


def load(workdir: Path, step: int, object_: str) -> Samples:
    """Reads what `save` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _reading(_path(workdir, step, object_)) as found:
        names = found.pop("methods").tolist()
        for field in ("scores", "overlap", "thresholds"):
            found[field] = dict(zip(names, found[field], strict=True))
        for field in ("ids", "defects"):
            found[field] = tuple(found[field].tolist())
        return Samples(**found | {"low": float(found["low"]), "high": float(found["high"])})


def save_pictures(
    workdir: Path, object_: str, rgb: NDArray, heights: NDArray, masks: NDArray, height_scale: float
) -> None:
    """Writes small pictures of an object's test images, whole or not at all.

    Args:
        workdir: where samples are kept.
        object_: its name.
        rgb: (n, h, w, 3) uint8.
        heights: (n, h, w) metres above the background plane, NaN where depth is missing.
        masks: (n, h, w), above 0 where a pixel is defective.
        height_scale: metres that are shown in middle grey.

    Raises:
        UserError: the disk is full or the folder not writable.
    """
    pictures = [
        (
            _webp(image),
            _webp(_shaded(height, height_scale)) if np.isfinite(height).any() else b"",
            outline(mask).encode(),
        )
        for image, height, mask in zip(rgb, heights, masks, strict=True)
    ]
    parts = [part for picture in pictures for part in picture]
    content = np.frombuffer(b"".join(parts), np.uint8)
    _write(_pictures_path(workdir, object_), content=content, lengths=list(map(len, parts)), size=rgb.shape[1:3])


def load_pictures(workdir: Path, object_: str) -> list[Picture]:
    """Reads what `save_pictures` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _reading(_pictures_path(workdir, object_)) as found:
        content, ends = found["content"].tobytes(), np.cumsum(found["lengths"]).tolist()
        if len(content) != ends[-1]:
            raise ValueError("pictures are missing")
        parts = [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        rows, columns = found["size"].tolist()
        images = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        return [Picture(rgb, relief, path.decode(), (rows, columns)) for rgb, relief, path in images]


def _path(workdir: Path, step: int, object_: str) -> Path:
    return workdir / "samples" / f"step{step}_{object_}.npz"


def _pictures_path(workdir: Path, object_: str) -> Path:
    return workdir / "samples" / f"pictures_{object_}.npz"


def _write(path: Path, **arrays: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.not_written(path, error) from error
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    storage.write_whole(path, file.getvalue())


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """The arrays of a file; whatever they turn out not to be within, is told."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = dict(file)
        yield found
    except Exception as error:  # NumPy and zipfile raise whatever damage leads to
        raise UserError(f"{path} cannot be read ({error}); restore it") from error


def outline(mask: ArrayLike) -> str:
    """The path of an SVG around what is above 0 in a mask (h, w), a unit being a pixel; "" around nothing."""
    padded = np.pad(np.asarray(mask) > 0, 1).astype(float)
    paths = []
    for line in contour_generator(z=padded).lines(0.5):
        points = np.asarray(line)[:-1] - 0.5
        ahead, behind = np.roll(points, -1, 0) - points, points - np.roll(points, 1, 0)
        corners = points[np.any(ahead != behind, axis=1)]
        paths.append("M" + "L".join(f"{x:g} {y:g}" for x, y in corners) + "Z")
    return "".join(paths)


def _shaded(height: NDArray, scale: float) -> NDArray:
    dark, bright = RELIEF
    shades = relief(height, scale)
    grey = np.nan_to_num(255 * (shades - dark) / (bright - dark)).clip(0, 255).astype(np.uint8)
    hole = [int(HOLE[at : at + 2], 16) for at in (1, 3, 5)]
    return np.where(np.isfinite(shades)[..., None], grey[..., None], hole).astype(np.uint8)


def _webp(pixels: NDArray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=80)
    return file.getvalue()
