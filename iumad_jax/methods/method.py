"""The one interface that matters: what a published system must be able to do."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.shapes import Batch, ErrorMaps, Keys, Scalars, Variables


class Loss(NamedTuple):
    """The training loss of a batch."""

    total: Float[Array, ""]  # differentiated with respect to `variables["params"]`
    terms: Scalars  # what it is made of, each a mean over images (`Batch.mean`)
    outputs: dict[str, Float[Array, "b d"]] = {}  # noqa: RUF012  what a strategy may shape: token means, by name
    statistics: Any = None  # new values of `variables["statistics"]`, the same on every device; None: unchanged


@dataclass(frozen=True)
class Method:
    """Pure functions over explicit state; nothing is held. All but the first two are optional.

    Attributes:
        init: from a key and a batch of the right shapes to the first variables, `frozen` ones aside. Jitted by the
            caller.
        predict: the maps of errors of a batch, whose objects are those that were recognised, right or wrong. Jitted by
            the caller.
        loss: the training loss of a batch, with one key per image. None for a method without training.
        grow: (variables, objects, key) -> variables, at the beginning of every step, before `observe`: what the method
            adds for the objects that it is about to learn, `objects` being how many are then known. Not jitted.
        observe: called once per object and step, before the step's training, with all of the object's training
            images as one (memory-mapped) batch and the number of the step; returns the variables with updated
            statistics. What belongs to that object alone and never changes again goes under the key BY_OBJECT, as one
            more entry of a tuple: snapshots store it once. Not jitted.
        optimizer: makes, from `config.train`, the method's own optimiser, used in every step in place of those that
            the config names, without clipping. It is given `progress=`, the share of the step's updates that are done,
            and its directions are multiplied by the learning rate. None: the config's.
        frozen: loads arrays that are neither trained nor stored in snapshots, which keep their SHA-256 only. They are
            `variables["frozen"]` in all functions but `init`.
        activations: what a strategy may protect: the token means (b d) of the outputs of some dense layers, without
            chance, each as `mean` at its layer's place in a tree like `variables["params"]`. Jitted by the caller.
        inputs: what a strategy may need beside: the rows (b n d) that the kernels of some layers multiply, without
            chance, each as `rows` at its layer's place in such a tree. Jitted by the caller.
    """

    init: Callable[[jax.Array, Batch], Variables]
    predict: Callable[[Variables, Batch], ErrorMaps]
    loss: Callable[[Variables, Batch, Keys], Loss] | None = None
    grow: Callable[[Variables, int, jax.Array], Variables] = lambda variables, objects, key: variables
    observe: Callable[[Variables, Batch, int], Variables] = lambda variables, batch, step: variables
    optimizer: Callable[[ConfigDict], optax.GradientTransformation] | None = None
    frozen: Callable[[], Any] = dict
    activations: Callable[[Variables, Batch], dict[str, Any]] = lambda variables, batch: {}
    inputs: Callable[[Variables, Batch], dict[str, Any]] = lambda variables, batch: {}


def with_frozen(name: str, method: Method, variables: Variables, sha256: str | None = None) -> Variables:
    """The variables with the method's frozen arrays, if it has any.

    Raises:
        UserError: they are not those that a run was trained with, by their SHA-256.
    """
    frozen = method.frozen()
    if sha256 is not None and sha256_of(frozen) != sha256:
        raise UserError(f"{name}: its frozen arrays are not those that this run was trained with; restore their file.")
    return variables | {"frozen": frozen} if frozen else variables


def sha256_of(frozen: Any) -> str:
    """The SHA-256 of a tree of arrays, their names and types."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(frozen):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
