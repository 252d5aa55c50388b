"""Stops training at the first non-finite number and reports the update, its images and, on request, the operation."""

import linecache
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree

from iumad_jax.errors import UserError
from iumad_jax.shapes import Scalars

ELEMENT = "element"  # scalar of an update: index of the first element of the parameters with a non-finite gradient
_LIBRARIES = tuple(str(Path(str(library.__file__)).parent) for library in (jax, flax, optax))


class NotFinite(UserError):
    """Error for a number that became NaN or infinite in an update of a step."""

    def __init__(self, problem: str, update: int) -> None:
        super().__init__(f"{problem} in update {update} of its step; training stopped.")
        self.problem, self.update = problem, update


def measure(gradients: Any, changes: Any) -> Scalars:
    """Compute what `check` needs: norms of gradients and weight changes, and where a gradient is not finite.

    They cost little, since clipping sums the squares of the gradients anyway.
    """
    squares, change = jnp.square(ravel_pytree(gradients)[0]), ravel_pytree(changes)[0]
    total = squares.sum()

    def first_or_largest() -> jax.Array:
        return jnp.argmax(jnp.where(jnp.isfinite(squares), squares, jnp.inf))

    first = jax.lax.cond(jnp.isfinite(total), lambda: 0, first_or_largest)
    return {"gradient_norm": jnp.sqrt(total), "update_norm": jnp.sqrt(jnp.square(change).sum()), ELEMENT: first}


def check(history: dict[str, np.ndarray], params: Any, first: int) -> None:
    """Check that the scalars of several updates are finite.

    Args:
        history: Scalars by name, shape (updates,): losses, where "loss" is the total, and those of `measure`.
        params: Trained parameters, or their shapes: names and sizes are used.
        first: Number of the first of these updates in its step.

    Raises:
        NotFinite: If a scalar is not finite. The error describes the earliest affected update, and in it a loss term
            rather than the total loss, the total rather than a gradient, and a gradient rather than a weight change.
    """
    least_specific = ["loss", "gradient_norm", "update_norm"]
    names = [name for name in history if name not in (*least_specific, ELEMENT)] + least_specific
    finite = np.isfinite([history[name] for name in names])
    if finite.all():
        return
    update = int(np.argmin(finite.all(axis=0)))
    name = names[int(np.argmin(finite[:, update]))]
    leaves = jax.tree.leaves_with_path(params)
    ends = np.cumsum([np.size(leaf) for _, leaf in leaves])
    path, _ = leaves[np.searchsorted(ends, history[ELEMENT][update], side="right")]
    descriptions = {"gradient_norm": f"the gradient of {_name(path)}", "update_norm": "the change of the weights"}
    description = descriptions.get(name, f'loss "{name}"')
    raise NotFinite(f"{description} became {history[name][update]}", first + update)


def with_nan_debugging(updates: Callable, on_one_device: Callable) -> Callable:
    """Wrap an update to find the operation that produces NaN or infinity.

    Args:
        updates: Compiled update (state, device_batches, ...) -> (state, scalars), which donates the state.
        on_one_device: The same update in a form that can be traced.

    Returns:
        A function like `updates` that raises NotFinite with the source line of the first operation whose result is not
        finite although its arguments are, or with the name of the input that is not finite.
    """

    def checked_updates(state: Any, *arguments: Any) -> Any:
        before = jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0], state)
        result, scalars = updates(state, *arguments)
        if not _finite(jax.tree.leaves(scalars)):
            update, device_batches, rates = int(before.update), arguments[0], arguments[-1]
            take = jax.vmap(lambda batch, rows: jax.tree.map(lambda array: array[rows[0]], batch))
            images = take(device_batches.images, device_batches.indices)
            inputs = {
                "weights": before.variables,
                "strategy state": before.strategy_state,
                "images": images,
                "learning rate": rates,
            }
            for path, array in jax.tree.leaves_with_path(inputs):
                if not _finite([array]):
                    raise NotFinite(f"{_name(path)} was nan or inf before any operation", update)
            with jax.numpy_rank_promotion("allow"):
                traced = jax.make_jaxpr(on_one_device)(before, *arguments)
            try:
                _walk(traced, jax.tree.leaves((before, *arguments)))
            except FloatingPointError as error:
                raise NotFinite(str(error), update) from error
        return result, scalars

    return checked_updates


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _finite(arrays: Sequence[Any]) -> bool:
    numbers = (a for a in arrays if jnp.issubdtype(jnp.result_type(a), jnp.inexact))
    return all(bool(jnp.isfinite(a).all()) for a in numbers)


def _walk(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a (closed) jaxpr operation by operation.

    Raises:
        FloatingPointError: At the first operation that returns a non-finite result for finite inputs.
    """
    jaxpr, constants = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
        results = outputs if equation.primitive.multiple_results else [outputs]
        if not _finite(results) and _finite(inputs):
            _walk_body(equation.params, inputs)
            frames = equation.source_info.traceback.frames
            line = next(frame for frame in frames if not frame.file_name.startswith(_LIBRARIES))
            text = linecache.getline(line.file_name, line.line_num).strip()
            kind = "nan" if any(bool(jnp.isnan(result).any()) for result in results) else "inf"
            raise FloatingPointError(
                f"the {equation.primitive} in {line.file_name}:{line.line_num} ({text}) returned {kind}"
            )
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _walk_body(params: dict[str, Any], inputs: Sequence[Any]) -> None:
    """Evaluate the body of an operation that consists of others, such as a scan or a jitted function."""
    match params:
        case {"jaxpr": body, "num_consts": n, "num_carry": m, "length": length, "reverse": reverse}:  # a scan
            constants, carry, rows = inputs[:n], inputs[n : n + m], inputs[n + m :]
            for i in range(length)[:: -1 if reverse else 1]:
                carry = _walk(body, [*constants, *carry, *(row[i] for row in rows)])[:m]
        case {"jaxpr": body} | {"call_jaxpr": body}:
            _walk(body, inputs)


def explain(epochs: Iterator[Any], step: int, per_epoch: int, images: Callable[[int], list[str]]) -> Iterator[Any]:
    """Yield the epochs of a step, and explain a NotFinite error by its step, epoch and images.

    Args:
        epochs: Epochs of `epochs.train_epochs`, which raises NotFinite before it yields a non-finite state.
        step: Number of the step.
        per_epoch: Number of updates per epoch.
        images: Returns the names of the images of an update of the step.

    Raises:
        UserError: If a number is not finite.
    """
    try:
        yield from epochs
    except NotFinite as error:
        epoch, update = divmod(error.update, per_epoch)
        raise UserError(
            f"{error.problem} in step {step}, epoch {epoch}, update {update}, whose images are"
            f" {', '.join(images(error.update))}; training stopped, and the last snapshot is from before this"
            " update; lower config.train.learning_rate, look for a damaged image among these, or set"
            " --config.debug.nans=True to find the operation."
        ) from error
