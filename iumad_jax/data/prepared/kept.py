"""Calibration images that a run keeps of each object, so that it needs no files of the objects learned before.

Their arrays are shared by snapshots (see `runtime.shared_arrays`) and memory-mapped.
"""

from typing import Any

import jax
import numpy as np

from iumad_jax.data.prepared.good_images import CalibrationImages
from iumad_jax.data.tiles import rows_of
from iumad_jax.runtime.shared_arrays import SharedArrays
from iumad_jax.shapes import Batch

Record = dict[str, Any]  # JSON: `arrays`, the SHA-256 of each array by path; `few`, see `CalibrationImages`


def keep(
    shared: SharedArrays, new: CalibrationImages, count: int, earlier: CalibrationImages | None = None, tiles: int = 1
) -> Record:
    """Keep at most `count` images: new ones first, then those kept earlier, first the ones that were not trained on.

    If the method is trained on all new images, they take at most half of the places, or those that are free. Every
    image has the same number of tiles.

    Raises:
        UserError: If they cannot be written.
    """
    places = count
    if earlier and new.trained.all():
        places = max(count - len(earlier.trained) // tiles, count // 2)
    chosen = _evenly_spaced(np.arange(len(new.trained) // tiles), places)
    parts = [_rows(new, rows_of(chosen, tiles))]
    if earlier and (rest := count - len(chosen)):
        is_trained = earlier.trained[::tiles]
        untrained = _evenly_spaced(np.flatnonzero(~is_trained), rest)
        trained = _evenly_spaced(np.flatnonzero(is_trained), rest - len(untrained))
        parts.append(_rows(earlier, rows_of(np.concatenate([untrained, trained]), tiles)))
    images, flags = jax.tree.map(lambda *arrays: np.concatenate(arrays), *((x.images, x.trained) for x in parts))
    arrays = {"features": images.features, "images": images.images, "trained": flags}
    return {"arrays": shared.write_object(arrays), "few": new.few and (earlier is None or earlier.few)}


def _evenly_spaced(images: np.ndarray, count: int) -> np.ndarray:
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)]


def _rows(good: CalibrationImages, rows: np.ndarray) -> CalibrationImages:
    images, trained = jax.tree.map(lambda array: np.asarray(array[rows]), (good.images, good.trained))
    return CalibrationImages(images, trained, good.few)


def load(shared: SharedArrays, record: Record, number: int) -> CalibrationImages:
    """Load the images kept of the object with a number.

    Raises:
        UserError: If a file is missing or damaged.
    """
    arrays = shared.read_object(record["arrays"])
    object_id: Any = np.full(len(arrays["trained"]), number, np.int32)
    return CalibrationImages(Batch(arrays["features"], arrays["images"], object_id), arrays["trained"], record["few"])
