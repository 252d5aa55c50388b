"""Applies a function of a batch to any number of images, in padded batches of equal size."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_BATCH_SIZE = 8


def predict_in_batches(function: Callable[[Any, Any], Any], state: Any, images: Any) -> Any:
    """Apply a function of a batch, such as `method.predict`, to all images.

    Every batch has 8 images, the last one padded by repeating an image, so that a jitted function is compiled once.

    Args:
        function: Function (state, batch) -> arrays with a leading axis b.
        state: First argument of the function, such as a method's variables.
        images: NumPy arrays, possibly memory-mapped, with a leading axis n >= 1.

    Returns:
        NumPy arrays with a leading axis n.
    """
    count = len(jax.tree.leaves(images)[0])
    outputs = []
    for start in range(0, count, _BATCH_SIZE):
        rows = np.minimum(np.arange(start, start + _BATCH_SIZE), count - 1)
        batch = jax.tree.map(
            lambda array, rows=rows: np.asarray(array[rows], np.float32 if array.ndim > 1 else None), images
        )
        outputs.append(jax.tree.map(np.asarray, function(state, batch)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *outputs)
