"""The interface of a method, which every published system implements."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Keys, Scalars, Variables, capacity


class Loss(NamedTuple):
    """The training loss of a batch.

    Attributes:
        total: Scalar to minimise. It is differentiated with respect to `variables["params"]`.
        terms: Parts of the total by name, each a mean over images (`Batch.mean`). They are logged.
        outputs: Token means of layer outputs by name, to which a strategy may apply another loss.
        statistics: New value of `variables["statistics"]`, identical on every device. None leaves it unchanged.
    """

    total: Float[Array, ""]
    terms: Scalars
    outputs: dict[str, Float[Array, "b d"]] = {}  # noqa: RUF012
    statistics: Any = None


@dataclass(frozen=True)
class Method:
    """A method, as pure functions of explicit variables. Only `init` and `predict` are required.

    Attributes:
        init: (key, batch) -> variables. Creates all variables except the frozen ones; the batch is an example of the
            shapes. Jitted by the caller.
        start: (variables) -> variables. Called once, right after `init`: puts weights from files in the place of those
            that were drawn, and may add the frozen arrays, if they come from the same files. Not jitted.
        predict: (variables, batch) -> error maps. `batch.object_id` holds the recognised objects, which may be wrong.
            Jitted by the caller.
        loss: (variables, batch, keys) -> loss. Computes the training loss, with one random key per image. Jitted by
            the caller. None for a method without training.
        grow: (variables, objects, key) -> variables. Called at the beginning of every step, before `observe`. Adds
            what the method needs for the objects that the step will learn; `objects` is the number of objects learned
            so far, including these. What it adds for an object must depend only on the key, which is the same in all
            steps, and the object's number. Not jitted.
        observe: (variables, batch, step) -> variables. Updates the statistics. Called before the training of a step,
            once per object that the step learns, with all training images of that object as one (memory-mapped)
            batch. What belongs to one object goes under `variables[BY_OBJECT]`, a tuple with one item per object;
            snapshots store equal items once, and training does not receive them. Also called with further images of
            an object learned before: then `batch.object_id[0]` is less than the number of items, and the object's
            item is replaced by one that covers both its earlier images and these. Not jitted.
        fit: (variables, batch, object id, further) -> variables. Called after the training of a step, once per object
            whose images it trained on, with all of these as one batch. Fits what errors are measured against.
            `further` tells whether these are further images of an object, rather than all of its images; then the
            result covers its earlier images too. Not jitted.
        optimizer: (config.train) -> optimiser. Creates an optimiser that replaces the config's optimisers in every
            step; gradients are not clipped. It receives the share of the step's updates that are done as the extra
            argument `progress`, and its updates are multiplied by the learning rate. None selects the config's
            optimisers.
        hold: (changes, progress) -> changes. Sets the changes of those weights to zero that a step does not train at
            this progress, after the strategy has changed them.
        frozen: () -> arrays. Loads arrays that are neither trained nor stored; snapshots keep only their SHA-256. All
            functions but `init` receive them as `variables["frozen"]`.
        arrange: (variables) -> variables. Rearranges the variables for `predict`, which receives the result; snapshots
            store the original. Not jitted.
        held_out: (variables, object id) -> error maps of training images of the object, each as if the method had not
            learned from it. They take the place of calibration images on which the method was trained. None if the
            method cannot tell. Not jitted.
        independent: Whether what is predicted for an object depends on no other object that was learned.
        activations: (variables, batch) -> tree. Computes the outputs of dense layers that a strategy may protect,
            without dropout or jitter. The tree has the structure of `variables["params"]`; at the place of each such
            layer, `mean` holds the token means, shape (b, d). Jitted by the caller.
        inputs: (variables, batch) -> tree. Computes the inputs of layers that a strategy may need in addition, without
            dropout or jitter. In a tree of the same structure, `rows` holds the rows that the layer's kernel
            multiplies, shape (b, n, d). Jitted by the caller.
    """

    init: Callable[[jax.Array, Batch], Variables]
    predict: Callable[[Variables, Batch], ErrorMaps]
    loss: Callable[[Variables, Batch, Keys], Loss] | None = None
    start: Callable[[Variables], Variables] = lambda variables: variables
    grow: Callable[[Variables, int, jax.Array], Variables] = lambda variables, objects, key: variables
    observe: Callable[[Variables, Batch, int], Variables] = lambda variables, batch, step: variables
    fit: Callable[[Variables, Batch, int, bool], Variables] = lambda variables, batch, object_id, further: variables
    optimizer: Callable[[ConfigDict], optax.GradientTransformation] | None = None
    hold: Callable[[Any, Float[Array, ""] | None], Any] = lambda changes, progress: changes
    frozen: Callable[[], Any] = dict
    arrange: Callable[[Variables], Variables] = lambda variables: variables
    held_out: Callable[[Variables, int], ErrorMaps | None] = lambda variables, object_id: None
    independent: bool = False
    activations: Callable[[Variables, Batch], dict[str, Any]] = lambda variables, batch: {}
    inputs: Callable[[Variables, Batch], dict[str, Any]] = lambda variables, batch: {}


def stack_objects(by_object: Sequence[Any]) -> Any:
    """Stack the arrays of all objects, with room for further objects, which is filled with those of the last one."""
    room = [by_object[-1]] * (capacity(len(by_object)) - len(by_object))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *by_object, *room)


def of_objects(stacked: Any, object_id: Int[Array, "*b"]) -> Any:
    """Select the arrays of one or more objects from those that `stack_objects` returns."""
    return jax.tree.map(lambda array: jnp.take(array, object_id, axis=0, mode="clip"), stacked)


def with_object(variables: Variables, object_id: int, item: Any) -> Variables:
    """Return the variables with the item of one object added or replaced."""
    by_object = variables[BY_OBJECT]
    return variables | {BY_OBJECT: (*by_object[:object_id], item, *by_object[object_id + 1 :])}


def without_objects(variables: Variables) -> Variables:
    """Return the variables without what belongs to one object."""
    return {key: value for key, value in variables.items() if key != BY_OBJECT}


def with_frozen(name: str, method: Method, variables: Variables, sha256: str | None = None) -> Variables:
    """Add the method's frozen arrays, if it has any, to its variables, unless `Method.start` did.

    Raises:
        UserError: If the SHA-256 of the arrays differs from `sha256`, that of the arrays that a run was trained with.
    """
    frozen = variables["frozen"] if "frozen" in variables else method.frozen()
    if sha256 is not None and tree_sha256(frozen) != sha256:
        raise UserError(
            f"the frozen arrays of {name} are not those that this run was trained with; name the original files with"
            " --config.diffusion.weights, --config.diffusion.autoencoder and --config.backbone.weights."
        )
    return variables | {"frozen": frozen} if frozen else variables


def tree_sha256(arrays: Any) -> str:
    """Compute the SHA-256 of a tree of arrays, including their paths, types and shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(arrays):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
