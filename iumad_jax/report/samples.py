"""Stores the report's data on every test image in `samples/`, a few kB per image.

`step<number>_<object>.npz` holds exact scores and curves, and maps at a quarter of their size in 8 bits for display;
`pictures_<object>_<hash>.npz` holds small pictures of the test images, which an update may replace by others.
"""

import hashlib
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

RATES = np.concatenate(
    [np.geomspace(1e-4, 0.01, 21)[:-1], np.linspace(0.01, 0.3, 30)]
)  # false positive rates of PRO curves
_SHRINK = 4  # reduction of maps; tokens, from which they are interpolated, are usually larger than 4 pixels


class Samples(NamedTuple):
    """Scores, curves and maps of the test images of one object after one step."""

    ids: tuple[str, ...]
    defects: tuple[str, ...]
    anomalous: NDArray  # (n,) bool
    scores: dict[str, NDArray]  # by method: (n,)
    overlap: dict[str, NDArray]  # by method: (r,) PRO at RATES, NaN where undefined
    thresholds: dict[str, NDArray]  # by method: (r,) map thresholds at RATES
    alarm: NDArray  # (n,) bool: the decision of the run's method
    pixel_threshold: NDArray  # (n,): threshold of the map for pixels
    maps: NDArray  # (n, s, s) uint8: maps of the run's method from `low` (0) to `high` (255)
    low: float
    high: float
    pictures: str = ""  # name of the file of pictures


class Picture(NamedTuple):
    """A small picture of a test image."""

    rgb: bytes  # a WebP image
    relief: bytes  # a WebP image of the heights; empty without depth
    outline: str  # SVG path around the defect, in pixels
    size: tuple[int, int]  # (rows, columns) in pixels


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
    """Summarise the predictions for an object's test images.

    Args:
        ids: Names of the images, (n,).
        defects: Kinds of defects or "good", (n,).
        anomalous: Above 0 for anomalous images, (n,).
        masks: Above 0 for anomalous pixels, (n, m, m). None without annotations; thresholds then come from good images.
        scores: Image scores (n,) by method; the run's method comes first.
        maps: Anomaly maps (n, m, m) by method.
        alarm: Decisions of the run's method, (n,).
        pixel_threshold: Pixel thresholds of the recognised objects, (n,).
    """
    curves = {}
    for name, values in maps.items():
        suspect = np.broadcast_to(np.reshape(anomalous, (-1, 1, 1)), np.shape(values))  # all pixels of anomalous images
        overlap, thresholds = pro_curve(suspect if masks is None else masks, values, RATES)
        curves[name] = (np.full_like(overlap, np.nan) if masks is None else overlap), thresholds
    first = np.asarray(next(iter(maps.values())), np.float32)
    count, side = len(first), first.shape[1] // _SHRINK
    small = first.reshape(count, side, _SHRINK, side, _SHRINK).mean(axis=(2, 4))
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
    """Write the samples of an object after a step atomically.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    names = list(samples.scores)
    by_method = {f: np.stack([getattr(samples, f)[n] for n in names]) for f in ("scores", "overlap", "thresholds")}
    _write(_path(workdir, step, object_), methods=names, **samples._asdict() | by_method)


def exist(workdir: Path, step: int, object_: str) -> bool:
    """Return whether samples of the object were saved after the step."""
    return _path(workdir, step, object_).exists()


def load(workdir: Path, step: int, object_: str) -> Samples:
    """Read the samples of an object after a step.

    Raises:
        UserError: If the file is missing or damaged.
    """
    with _reading(_path(workdir, step, object_)) as arrays:
        names = arrays.pop("methods").tolist()
        for field in ("scores", "overlap", "thresholds"):
            arrays[field] = dict(zip(names, arrays[field], strict=True))
        for field in ("ids", "defects"):
            arrays[field] = tuple(arrays[field].tolist())
        numbers = {"low": float(arrays["low"]), "high": float(arrays["high"])}
        return Samples(**arrays | numbers | {"pictures": str(arrays["pictures"])})


def save_pictures(
    workdir: Path, object_: str, rgb: NDArray, heights: NDArray, masks: NDArray, height_scale: float
) -> str:
    """Write small pictures of an object's test images atomically, and return the name of their file.

    A file of the same images is left as it is, since most steps change no test image.

    Args:
        workdir: Folder that holds `samples/`.
        object_: Name of the object.
        rgb: Photographs, (n, h, w, 3) uint8.
        heights: Metres above the background plane, (n, h, w); NaN where depth is missing.
        masks: Above 0 for anomalous pixels, (n, h, w).
        height_scale: Height drawn in middle grey, metres.

    Raises:
        UserError: If the disk is full or the folder is not writable.
    """
    arrays = (np.ascontiguousarray(array) for array in (rgb, heights, masks, height_scale))
    digest = hashlib.sha256(b"".join(f"{x.dtype}{x.shape}".encode() + x.tobytes() for x in arrays)).hexdigest()
    name = f"pictures_{object_}_{digest[:8]}.npz"
    path = workdir / "samples" / name
    if path.exists():
        return name
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
    _write(path, content=content, lengths=list(map(len, parts)), size=rgb.shape[1:3])
    return name


def load_pictures(workdir: Path, name: str) -> list[Picture]:
    """Read the pictures in a file with the name that `save_pictures` returned.

    Raises:
        UserError: If the file is missing or damaged.
    """
    with _reading(workdir / "samples" / name) as arrays:
        content, ends = arrays["content"].tobytes(), np.cumsum(arrays["lengths"]).tolist()
        if len(content) != ends[-1]:
            raise ValueError("pictures are missing")
        parts = [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        rows, columns = arrays["size"].tolist()
        images = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        return [Picture(rgb, relief, path.decode(), (rows, columns)) for rgb, relief, path in images]


def _path(workdir: Path, step: int, object_: str) -> Path:
    return workdir / "samples" / f"step{step}_{object_}.npz"


def _write(path: Path, **arrays: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.write_error(path, error) from error
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    storage.write_whole(path, file.getvalue())


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the arrays of a file; any error while they are used means damage and becomes a UserError."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        yield arrays
    except Exception as error:  # damage makes NumPy and zipfile raise many kinds
        raise UserError(f"{path} cannot be read ({error}); restore the file from a backup.") from error


def outline(mask: ArrayLike) -> str:
    """Return the SVG path around a mask (h, w), in pixels; "" for an empty mask."""
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
