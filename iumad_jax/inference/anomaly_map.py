"""From a method's maps of errors to one anomaly map and a score per image, the same for every method."""

import functools
from collections.abc import Callable

from flax import linen as nn

from iumad_jax.methods.method import Method
from iumad_jax.shapes import Batch, ErrorMaps, Prediction, Variables

_WINDOW = 16  # pixels of a side


def combine(errors: ErrorMaps) -> Prediction:
    """The sum of the maps of all groups of modalities; score = its largest mean over windows of 16 x 16 pixels."""
    first, *others = errors.maps.values()
    combined = sum(others, start=first)
    score = nn.avg_pool(combined[..., None], (_WINDOW, _WINDOW)).max((1, 2, 3))
    return Prediction(combined, score, errors.object_logits)


@functools.cache  # a function that is the same each time is compiled once
def predictor(method: Method) -> Callable[[Variables, Batch], Prediction]:
    """What a method predicts for a batch, not jitted."""
    return lambda variables, batch: combine(method.predict(variables, batch))
