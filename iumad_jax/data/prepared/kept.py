"""Calibration images that a run keeps of each object, so that it needs no files of the objects learned before.

Their arrays are shared by snapshots (see `runtime.shared_arrays`) and memory-mapped.
"""

from typing import Any

import jax
import numpy as np

from iumad_jax.data.prepared.good_images import CalibrationImages
from iumad_jax.runtime.shared_arrays import SharedArrays
from iumad_jax.shapes import Batch

Record = dict[str, Any]  # JSON: `arrays`, the SHA-256 of each array by path; `few`, see `CalibrationImages`


def keep(shared: SharedArrays, new: CalibrationImages, count: int, earlier: CalibrationImages | None = None) -> Record:
    """Keep at most `count` images: the new ones, and evenly spaced ones of those kept earlier.

    Raises:
        UserError: If they cannot be written.
    """
    parts = [_evenly_spaced(new, count)]
    if earlier and (rest := count - len(parts[0].trained)):
        parts.append(_evenly_spaced(earlier, rest))
    images, trained = jax.tree.map(lambda *arrays: np.concatenate(arrays), *((x.images, x.trained) for x in parts))
    arrays = {"features": images.features, "images": images.images, "trained": trained}
    return {"arrays": shared.write_object(arrays), "few": new.few and (earlier is None or earlier.few)}


def _evenly_spaced(good: CalibrationImages, count: int) -> CalibrationImages:
    rows = np.linspace(0, len(good.trained) - 1, min(count, len(good.trained))).round().astype(int)
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
