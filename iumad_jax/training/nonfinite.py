"""Stops training where a number is not finite, and says which, when, on which images, and by which operation."""

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

from iumad_jax.errors import UserError
from iumad_jax.shapes import Scalars

PARAMETER = "parameter"  # among an update's scalars: the number of the first one whose gradient is not finite
_LIBRARIES = tuple(str(Path(str(library.__file__)).parent) for library in (jax, flax, optax))


class NotFinite(UserError):
    """What became NaN or infinite, and in which update of its step."""

    def __init__(self, what: str, update: int) -> None:
        super().__init__(f"{what} in update {update} of its step; training stopped.")
        self.what, self.update = what, update


def measure(gradients: Any, changes: Any) -> Scalars:
    """The scalars by which `check` judges an update: norms of the gradients and of what is added to the weights.

    They cost next to nothing: the squares of the gradients are summed for clipping anyway.
    """
    squares = jnp.stack([jnp.sum(jnp.square(gradient)) for gradient in jax.tree.leaves(gradients)])
    return {
        "gradient_norm": jnp.sqrt(squares.sum()),
        "update_norm": optax.tree.norm(changes),
        PARAMETER: jnp.argmin(jnp.isfinite(squares)),
    }


def check(history: dict[str, np.ndarray], params: Any, first: int) -> None:
    """Judges some updates.

    Args:
        history: scalars (updates,) by name: losses, "loss" being the total, and those of `measure`.
        params: what is trained, for the names.
        first: the number of the first of these updates in its step.

    Raises:
        NotFinite: one of them is not finite; of the earliest update, a term of the loss rather than their total, that
            rather than a gradient.
    """
    last = ["loss", "gradient_norm", "update_norm"]
    names = [name for name in history if name not in (*last, PARAMETER)] + last
    finite = np.isfinite([history[name] for name in names])
    if finite.all():
        return
    update = int(np.argmin(finite.all(axis=0)))
    name = names[int(np.argmin(finite[:, update]))]
    path, _ = jax.tree.leaves_with_path(params)[history[PARAMETER][update]]
    told = {"gradient_norm": f"the gradient of {_name(path)}", "update_norm": "what is added to the weights"}
    what = told.get(name, f'loss "{name}"')
    raise NotFinite(f"{what} became {history[name][update]}", first + update)


def finding_operations(updates: Callable, on_one_device: Callable) -> Callable:
    """Wraps an update (state, device_batches, ...) -> (state, scalars) to find the operation that yields NaN or inf.

    Args:
        updates: compiled; gives up the state.
        on_one_device: the same, to be traced.

    Raises:
        NotFinite: naming the line of the first operation whose result is not finite though all that it is given is; or
            which of the arguments is not.
    """

    def run(state: Any, *arguments: Any) -> Any:
        before = jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0], state)
        result, scalars = updates(state, *arguments)
        if not _finite(jax.tree.leaves(scalars)):
            update, device_batches, rates = int(before.update), arguments[0], arguments[-1]
            images = jax.vmap(lambda all_, rows: jax.tree.map(lambda array: array[rows[0]], all_))(*device_batches[:2])
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

    return run


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _finite(arrays: Sequence[Any]) -> bool:
    numbers = (a for a in arrays if jnp.issubdtype(jnp.result_type(a), jnp.inexact))
    return all(bool(jnp.isfinite(a).all()) for a in numbers)


def _walk(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, with its constants or without any, operation by operation.

    Raises:
        FloatingPointError: naming the first one that makes of finite numbers what is not.
    """
    jaxpr, constants = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        found = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
        results = found if equation.primitive.multiple_results else [found]
        if not _finite(results) and _finite(given):
            _enter(equation.params, given)
            frames = equation.source_info.traceback.frames
            line = next(frame for frame in frames if not frame.file_name.startswith(_LIBRARIES))
            text = linecache.getline(line.file_name, line.line_num).strip()
            kind = "nan" if any(bool(jnp.isnan(one).any()) for one in results) else "inf"
            raise FloatingPointError(
                f"{line.file_name}:{line.line_num} ({text}), in its {equation.primitive}, became {kind}"
            )
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _enter(params: dict[str, Any], given: Sequence[Any]) -> None:
    """Walks through what an operation is made of, where that is to be seen."""
    match params:
        case {"jaxpr": body, "num_consts": n, "num_carry": m, "length": length, "reverse": reverse}:  # a scan
            constants, carry, rows = given[:n], given[n : n + m], given[n + m :]
            for i in range(length)[:: -1 if reverse else 1]:
                carry = _walk(body, [*constants, *carry, *(row[i] for row in rows)])[:m]
        case {"jaxpr": body} | {"call_jaxpr": body}:
            _walk(body, given)


def explain(passes: Iterator[Any], step: int, per_epoch: int, images: Callable[[int], list[str]]) -> Iterator[Any]:
    """The same epochs of a step, with a whole sentence in place of NotFinite.

    Args:
        passes: of `epochs.train_epochs`; whatever is not finite ends them before it is yielded.
        step: its number.
        per_epoch: updates in an epoch.
        images: names those of an update of the step.

    Raises:
        UserError: something was not finite.
    """
    try:
        yield from passes
    except NotFinite as error:
        epoch, update = divmod(error.update, per_epoch)
        raise UserError(
            f"{error.what} in step {step}, epoch {epoch}, update {update}, whose images are"
            f" {', '.join(images(error.update))}; training stopped and the last snapshot is from before that: lower"
            " config.train.learning_rate, look for a broken image among these, or have --config.debug.nans=True find"
            " the operation."
        ) from error
