"""The one interface that matters: what a published system must be able to do."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from iumad_jax.shapes import Batch, Keys, Prediction, Scalars, Variables


@dataclass(frozen=True)
class Method:
    """Pure functions over explicit state; nothing is held.

    Attributes:
        init: from a key and a batch of the right shapes to the first variables.
        predict: the anomaly maps and scores of a batch. Jitted by the caller.
        loss: the training loss of a batch and what it is made of, each a mean over images, with one key per image;
            differentiated with respect to `variables["params"]`. None for a method without training.
        observe: called once per object and step, before the step's training, with all of the object's training
            images as one (memory-mapped) batch and the number of the step; returns the variables with updated
            statistics. Not jitted.
    """

    init: Callable[[jax.Array, Batch], Variables]
    predict: Callable[[Variables, Batch], Prediction]
    loss: Callable[[Variables, Batch, Keys], tuple[jax.Array, Scalars]] | None = None
    observe: Callable[[Variables, Batch, int], Variables] = lambda variables, batch, step: variables
