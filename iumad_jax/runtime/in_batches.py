"""Runs a function of a batch on any number of images, jitted once, in batches of 8 of which the last is filled up."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_BATCH = 8  # images


def predict_in_batches(function: Callable[[Any, Any], Any], state: Any, images: Any) -> Any:
    """Applies a function of a batch, such as `method.predict`, to all images.

    It is compiled once for all calls: every batch has the same size, the last one being filled up.

    Args:
        function: (state, batch) -> arrays with a leading axis b.
        state: the function's first argument, such as a method's variables.
        images: arrays with a leading axis n, at least 1; NumPy arrays, memory-mapped ones too.

    Returns:
        NumPy arrays with a leading axis n.
    """
    compiled = jax.jit(function)
    count = len(jax.tree.leaves(images)[0])
    parts = []
    for start in range(0, count, _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), count - 1)
        batch = jax.tree.map(
            lambda array, rows=rows: np.asarray(array[rows], np.float32 if array.ndim > 1 else None), images
        )
        parts.append(jax.tree.map(np.asarray, compiled(state, batch)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)
