"""Gradient projection with an incremental SVD: the strategy of CDAD (Li et al., CVPR 2025).

Later steps change dense layers only where old objects' inputs do not reach: the update of a kernel is projected off the
directions that span these inputs (GPM, Saha et al., ICLR 2021). Hence what the layer computes for old objects hardly
changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from ml_collections import ConfigDict

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import Batch, Variables

_ENERGY = 0.999  # of an object's inputs, kept while further images are added
_IMAGES = 8  # added at a time


def add_rows(
    directions: Float[np.ndarray, "d r"], rows: Float[np.ndarray, "n d"], energy: float = _ENERGY
) -> Float[np.ndarray, "d s"]:
    """Add rows to what directions B summarise.

    Args:
        directions: B, whose B B^T is the sum of x x^T over earlier rows; orthogonal columns, strongest first.
        rows: Further rows x.
        energy: Share of the sum of |x|^2 that the result keeps at least.

    Returns:
        The new B. Its columns keep their lengths, so that the order in which rows arrive does not matter.
    """
    columns = np.concatenate([directions, rows.T.astype(np.float64)], axis=1)
    strengths, vectors = _strongest_first(columns)
    return vectors[:, : _count(strengths, energy * strengths.sum())]


def add_directions(
    basis: Float[np.ndarray, "d k"], directions: Float[np.ndarray, "d r"], gamma: float
) -> tuple[Float[np.ndarray, "d k"], float]:
    """Extend an orthonormal basis until it contains the share `gamma` of the energy |B|^2 of directions B.

    Args:
        basis: Orthonormal columns, followed by columns of zeros, which are the room that is left.
        directions: Result of `add_rows`.
        gamma: Share of the energy, from 0 to 1.

    Returns:
        The basis, and the share of the energy that is outside of it because no room is left.
    """
    used = int(np.any(basis, axis=0).sum())
    inside = basis[:, :used].astype(np.float64)
    outside = directions - inside @ (inside.T @ directions)
    total = np.square(directions).sum()
    strengths, vectors = _strongest_first(outside)
    missing = gamma * total - (total - np.square(outside).sum())
    wanted = _count(strengths, missing) if missing > 1e-9 * total else 0
    added = min(wanted, basis.shape[1] - used)
    joined = np.concatenate([inside, vectors[:, :added]], axis=1)
    extended = np.zeros_like(basis)
    extended[:, : joined.shape[1]] = np.linalg.qr(joined)[0]
    return extended, float(strengths[added:wanted].sum() / max(total, 1e-30))


def _strongest_first(columns: Float[np.ndarray, "d m"]) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, "d r"]]:
    """Return orthogonal columns with the same C C^T, strongest first, and their squared lengths, without empty ones."""
    d, m = columns.shape
    strengths, vectors = np.linalg.eigh(columns @ columns.T if d <= m else columns.T @ columns)
    strengths, vectors = np.maximum(strengths[::-1], 0), vectors[:, ::-1]
    vectors = vectors * np.sqrt(strengths) if d <= m else columns @ vectors
    real = strengths > 1e-10 * strengths.max(initial=0)  # others are rounding errors
    return strengths[real], vectors[:, real]


def _count(strengths: Float[np.ndarray, " r"], energy: float) -> int:
    """Return the smallest number of strengths that add up to the energy; all, if they do not."""
    return min(int(np.searchsorted(np.cumsum(strengths), energy)) + 1, len(strengths))


def project(freeze_rest: bool) -> optax.GradientTransformationExtraArgs:
    """Project the updates of the kernels in `strategy_state["layers"]`: dW <- dW - M M^T dW with M their basis.

    The update is projected instead of the gradient, since AdamW's element-wise scaling and weight decay would restore
    removed directions. All other updates are 0 if `freeze_rest`.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, strategy_state: StrategyState, **_: Any
    ) -> tuple[Any, Any]:
        if "layers" not in strategy_state:
            return updates, state
        bases = {path[:-1]: b for path, b in flatten_dict(strategy_state["layers"]).items() if path[-1] == "basis"}

        def projected(path: tuple[str, ...], change: jax.Array) -> jax.Array:
            if path[-1] != "kernel" or path[:-1] not in bases:
                return jnp.zeros_like(change) if freeze_rest else change
            basis = bases[path[:-1]]
            rows = change.reshape(len(basis), -1)
            return (rows - basis @ (basis.T @ rows)).reshape(change.shape)

        return unflatten_dict({path: projected(path, change) for path, change in flatten_dict(updates).items()}), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def isvd(config: ConfigDict, method: Method) -> Strategy:
    """Build the strategy for `config.continual.isvd`.

    Between steps the state holds, for each layer in the method's `inputs`, `basis` (d, at most `rank`) and `left_out`,
    the largest share of an object's energy that found no room in it, whatever the number of images and objects.

    Raises:
        UserError: If the method has no inputs that could be protected.
    """
    if method.loss and method.inputs is Method.inputs:
        raise UserError(
            "config.continual.strategy=isvd needs to know what the layers of a method receive, and this one does not"
            " tell; use finetune, iuf, replay or joint."
        )

    def finish(strategy_state: StrategyState, variables: Variables, batch: Batch, _: int) -> StrategyState:
        chosen = np.arange(0, len(batch.object_id), config.every)[: config.images]
        directions: dict[tuple[str, ...], Any] = {}
        for start in range(0, len(chosen), _IMAGES):
            part = jax.tree.map(lambda array, rows=chosen[start : start + _IMAGES]: array[rows], batch)
            for path, rows in flatten_dict(predict_in_batches(jax.jit(method.inputs), variables, part)).items():
                flat = rows.reshape(-1, rows.shape[-1])
                directions[path[:-1]] = add_rows(directions.get(path[:-1], np.zeros((flat.shape[1], 0))), flat)
        earlier, layers = flatten_dict(strategy_state.get("layers", {})), {}
        for layer, new in directions.items():
            empty = np.zeros((len(new), min(len(new), config.rank)), np.float32)
            basis, left_out = add_directions(earlier.get((*layer, "basis"), empty), new, config.gamma)
            layers[*layer, "basis"] = basis
            layers[*layer, "left_out"] = np.maximum(earlier.get((*layer, "left_out"), np.float32(0)), left_out)
        return {"layers": unflatten_dict(layers)}

    return Strategy(finetune(method).loss, project(config.freeze_rest), finish=finish, describe=filled)


def filled(strategy_state: StrategyState) -> dict[str, Any]:
    """Describe how full the bases are: by layer, the share of their columns in use, and the largest `left_out`."""
    layers = flatten_dict(strategy_state.get("layers", {}))
    shares = {"/".join(path[:-1]): float(np.any(b, 0).mean()) for path, b in layers.items() if path[-1] == "basis"}
    left_out = max((float(value) for path, value in layers.items() if path[-1] == "left_out"), default=0.0)
    return {"filled": shares, "left_out": left_out}
