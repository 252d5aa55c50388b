"""Combination of a method's error maps into one anomaly map and one score per image."""

import functools
from collections.abc import Callable

from flax import linen as nn

from iumad_jax.methods.method import Method
from iumad_jax.shapes import Batch, ErrorMaps, Prediction, Variables

_WINDOW = 16  # pixels per side


def combine(errors: ErrorMaps) -> Prediction:
    """Sum the maps of all modality groups. The score is the largest mean over sliding windows of 16 x 16 pixels."""
    first, *others = errors.maps.values()
    combined = sum(others, start=first)
    score = nn.avg_pool(combined[..., None], (_WINDOW, _WINDOW)).max((1, 2, 3))
    return Prediction(combined, score, errors.object_logits)


@functools.cache  # one function object per method, so that JAX compiles it once
def predictor(method: Method) -> Callable[[Variables, Batch], Prediction]:
    """Return the method's prediction as a function of variables and batch, not jitted."""
    return lambda variables, batch: combine(method.predict(variables, batch))
