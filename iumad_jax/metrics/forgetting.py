"""Metrics of learning and forgetting over incremental steps.

Every function takes the matrix of one metric, shape (steps, objects): `matrix[l, c]` is the metric on object c after
step l, NaN before the step that learned c. Whether a metric is defined for an object depends only on its test images.
A column is therefore defined from the step that learned the object, or is NaN throughout and left out of every mean.

All functions raise a ValueError if the matrix does not have shape (steps, objects), has no step, or holds infinity.
"""

import math
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray


def final(matrix: ArrayLike) -> float:
    """Compute the mean over objects after the last step; NaN if undefined for all objects."""
    return _mean(_validated(matrix)[-1])


def average_accuracy(matrix: ArrayLike) -> float:
    """Compute the mean over steps of the mean over the objects learned by then: ACC of IUF (Tang et al., ECCV 2024)."""
    return _mean(_step_means(_validated(matrix)))


def drops(matrix: ArrayLike) -> NDArray:
    """Compute the best earlier value minus the last value of each object, shape (objects,).

    The result is NaN for objects that the last step learned.
    """
    values = _validated(matrix)
    best = reduce(np.fmax, values[:-1], np.full_like(values[-1], np.nan))  # fmax ignores NaN unless both values are NaN
    return best - values[-1]


def forgetting(matrix: ArrayLike) -> float:
    """Compute the mean of `drops`, over objects learned before the last step.

    This is the forgetting measure of Chaudhry et al., ECCV 2018. It is negative if later steps improve earlier objects,
    and NaN if no object was learned before the last step, as with a single step.
    """
    return _mean(drops(matrix))


def aggregate_forgetting(matrix: ArrayLike) -> float:
    """Compute how far the mean over the objects learned so far lies below the base step's, averaged over later steps.

    The drop includes the difficulty of new objects, not only forgetting. It is NaN with a single step.
    """
    base, *later = _step_means(_validated(matrix))
    return _mean(base - np.asarray(later))


def plasticity(matrix: ArrayLike) -> float:
    """Compute the mean over objects of the value at the step that learned the object."""
    values = _validated(matrix)
    learned = np.argmin(np.isnan(values), axis=0)  # the first row that is not NaN
    return _mean(np.take_along_axis(values, learned[None], axis=0))


def _validated(matrix: ArrayLike) -> NDArray:
    values = np.asarray(matrix, float)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"the matrix must have shape (steps, objects) with at least one step, got {values.shape}")
    if np.isinf(values).any():
        raise ValueError("the matrix must hold finite numbers and NaN, got infinity")
    return values


def _step_means(values: NDArray) -> list[float]:
    return [_mean(row) for row in values]


def _mean(values: ArrayLike) -> float:
    """Average the values that are not NaN; NaN if there are none."""
    defined = np.asarray(values, float)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else math.nan
