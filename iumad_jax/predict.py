"""Anomaly maps and scores of any number of images."""

from collections.abc import Callable

import jax
import numpy as np

from iumad_jax.shapes import Batch, Prediction, Variables

_BATCH = 8


def predict(compiled: Callable[[Variables, Batch], Prediction], variables: Variables, images: Batch) -> Prediction:
    """The predictions for all images, as numpy arrays, in batches of one size so that nothing compiles twice.

    Args:
        compiled: `jax.jit(method.predict)`.
        variables: of the method.
        images: numpy arrays, memory-mapped ones too; at least one image.
    """
    count = len(images.object_id)
    parts = []
    for start in range(0, count, _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), count - 1)
        batch = jax.tree.map(
            lambda array, rows=rows: np.asarray(array[rows], np.float32 if array.ndim > 1 else None), images
        )
        parts.append(jax.tree.map(np.asarray, compiled(variables, batch)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
