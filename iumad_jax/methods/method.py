"""The one interface that matters: what a published system must be able to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from iumad_jax.shapes import Batch, Keys, Prediction, Scalars, Variables


class Loss(NamedTuple):
    """The training loss of a batch."""

    total: Float[Array, ""]  # differentiated with respect to `variables["params"]`
    terms: Scalars  # what it is made of, each a mean over images (`Batch.mean`)
    outputs: dict[str, Float[Array, "b d"]]  # what a strategy may shape: token means of decoder layers, by name


@dataclass(frozen=True)
class Method:
    """Pure functions over explicit state; nothing is held.

    Attributes:
        init: from a key and a batch of the right shapes to the first variables.
        predict: the anomaly maps and scores of a batch, whose objects are those that were recognised, right or wrong.
            Jitted by the caller.
        loss: the training loss of a batch, with one key per image. None for a method without training.
        observe: called once per object and step, before the step's training, with all of the object's training
            images as one (memory-mapped) batch and the number of the step; returns the variables with updated
            statistics. What belongs to that object alone and never changes again goes under the key BY_OBJECT, as one
            more entry of a tuple: snapshots store it once. Not jitted.
        activations: what a strategy may protect: the token means (b d) of the outputs of some dense layers, without
            chance, each as `mean` at its layer's place in a tree like `variables["params"]`. Jitted by the caller.
    """

    init: Callable[[jax.Array, Batch], Variables]
    predict: Callable[[Variables, Batch], Prediction]
    loss: Callable[[Variables, Batch, Keys], Loss] | None = None
    observe: Callable[[Variables, Batch, int], Variables] = lambda variables, batch, step: variables
    activations: Callable[[Variables, Batch], dict[str, Any]] = lambda variables, batch: {}
