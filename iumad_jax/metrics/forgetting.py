"""What was learned and what was forgotten over incremental steps.

Every function reads the matrix of one metric, (steps, objects): `matrix[l, c]` is the metric on object c after step l,
NaN before the step that learned c. Whether a metric is defined for an object depends on its test images alone, so a
column starts at the step that learned the object, or is NaN throughout and left out of every mean.
"""

import math
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray


def final(matrix: ArrayLike) -> float:
    """Mean over objects after the last step; NaN when undefined for all.

    Raises:
        ValueError: the matrix is not (steps, objects), has no step, or holds infinity. So do all functions here.
    """
    return _mean(_checked(matrix)[-1])


def average_accuracy(matrix: ArrayLike) -> float:
    """Mean over steps of the mean over the objects seen by then: ACC of IUF (Tang et al., ECCV 2024)."""
    return _mean(_step_means(_checked(matrix)))


def falls(matrix: ArrayLike) -> NDArray:
    """Of each object (objects,), its best earlier value minus its last; NaN where the last step learned it."""
    values = _checked(matrix)
    best = reduce(np.fmax, values[:-1], np.full_like(values[-1], np.nan))  # fmax ignores NaN unless both are
    return best - values[-1]


def forgetting(matrix: ArrayLike) -> float:
    """Mean over objects learned before the last step of their best earlier value minus their last.

    The forgetting measure of Chaudhry et al., ECCV 2018; negative where later steps helped. NaN when no object was
    learned before the last step, so always with a single step.
    """
    return _mean(falls(matrix))


def aggregate_forgetting(matrix: ArrayLike) -> float:
    """Mean over incremental steps of how far the mean over objects seen lies below that of the base step.

    It also counts how hard the new objects are, not only what was forgotten. NaN with a single step.
    """
    base, *later = _step_means(_checked(matrix))
    return _mean(base - np.asarray(later))


def plasticity(matrix: ArrayLike) -> float:
    """Mean over objects of their value at the step that learned them."""
    values = _checked(matrix)
    learned = np.argmin(np.isnan(values), axis=0)  # the first row that is not NaN
    return _mean(np.take_along_axis(values, learned[None], axis=0))


def _checked(matrix: ArrayLike) -> NDArray:
    values = np.asarray(matrix, float)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"the matrix must be (steps, objects) with at least one step, found {values.shape}")
    if np.isinf(values).any():
        raise ValueError("the matrix must hold finite numbers and NaN, found infinity")
    return values


def _step_means(values: NDArray) -> list[float]:
    return [_mean(row) for row in values]


def _mean(values: ArrayLike) -> float:
    """Mean of what is defined."""
    defined = np.asarray(values, float)
    defined = defined[~np.isnan(defined)]
    return float(defined.mean()) if defined.size else math.nan
