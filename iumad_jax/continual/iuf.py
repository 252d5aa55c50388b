"""IUF's strategy (Tang et al., ECCV 2024), used by IB-IUMAD too: weights anchored, updates projected away from what old
objects use, and a base step that leaves room for new ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.methods.method import Loss, Method
from iumad_jax.runtime import devices
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import Batch, Keys, Variables

ROWS = 768  # of a queue


def anchor(beta: float) -> optax.GradientTransformationExtraArgs:
    """Before each update, W <- (1 - beta) W + beta W0, W0 being `strategy_state["old"]`, the weights before the step.

    The gradient is that at W. If updates are at most u, weights stay within u / beta of W0.
    """

    def update(updates: Any, state: Any, params: Any, *, strategy_state: StrategyState, **_: Any) -> tuple[Any, Any]:
        if "old" not in strategy_state:
            return updates, state
        return jax.tree.map(lambda u, w, w0: u + beta * (w0 - w), updates, params, strategy_state["old"]), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def project() -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of each layer in `strategy_state["projections"]`, kernel and bias, by the layer's matrix.

    It is the update and not the gradient that is projected: AdamW divides each element of a gradient by its usual size,
    and weight decay is added, both of which bring removed directions back. For SGD it is the same.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, strategy_state: StrategyState, **_: Any
    ) -> tuple[Any, Any]:
        flat = flatten_dict(updates)
        for (*layer, _), matrix in flatten_dict(strategy_state.get("projections", {})).items():
            for name in {"kernel", "bias"} & {key[-1] for key in flat if key[:-1] == tuple(layer)}:
                flat[*layer, name] = flat[*layer, name] @ matrix
        return unflatten_dict(flat), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def projection(moments: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """V diag(w) V^T with w_k = ln(k + 1) / ln(d), k = 0 .. d - 1: the stronger a direction is in use, the less is left.

    Args:
        moments: the sum of r r^T over rows r. Its eigenvectors V, strongest first, are the right singular vectors of
            the matrix of these rows, completed to a basis where there are fewer rows than columns.
    """
    basis = np.linalg.eigh(np.asarray(moments, np.float64))[1][:, ::-1]
    weights = np.log(np.arange(1, len(basis) + 1)) / np.log(len(basis))
    return ((basis * weights) @ basis.T).astype(np.float32)


def compression(rows: Float[Array, "n d"]) -> Float[Array, ""]:
    """The sum of those singular values, normalised to sum to 1, that are below 0.1 / d.

    Small, it concentrates rows in few directions, so that others stay free. Rows of zeros change nothing.
    """
    values = jnp.linalg.svd(rows, compute_uv=False)
    shares = values / jnp.maximum(values.sum(), 1e-12)
    return jnp.sum(jnp.where(shares < 0.1 / rows.shape[1], shares, 0))


def iuf(config: ConfigDict, method: Method) -> Strategy:
    """The strategy for `config.continual`, whose keys switch each part off.

    Between steps it keeps a d x d matrix per layer that the method names as its `activations`, however many images or
    objects there were; within a later step, the weights before it too.
    """

    def begin(strategy_state: StrategyState, variables: Variables, batch: Batch, step: int) -> StrategyState:
        if step > 0:
            old = {"old": variables["params"]} if config.anchor else {}
            projections = jax.tree.map(projection, strategy_state.get("moments", {}))
            return strategy_state | old | ({"projections": projections} if projections else {})
        assert method.loss is not None
        keys = jax.random.split(jax.random.key(0), len(batch.object_id))
        outputs = jax.eval_shape(method.loss, variables, batch, keys).outputs if config.compression else {}
        return {"queues": {name: np.zeros((ROWS, rows.shape[1]), np.float32) for name, rows in outputs.items()}}

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        assert method.loss is not None
        own = method.loss(variables, batch, keys)
        queues = strategy_state.get("queues", {})
        if not queues:
            return own, strategy_state
        # All devices' rows, or a matrix would depend on the number of devices. Only they have a gradient.
        live = {name: devices.gather(own.outputs[name], batch.sample_weight) for name in queues}
        matrices = {name: jnp.concatenate([queues[name], rows]) for name, (rows, _) in live.items()}
        shares = [compression(rows) for rows in matrices.values()]
        compressed = config.compression * sum(shares) / len(shares)
        kept = {name: jax.lax.dynamic_slice_in_dim(matrices[name], count, ROWS) for name, (_, count) in live.items()}
        strategy_state = strategy_state | {"queues": jax.lax.stop_gradient(kept)}
        return own._replace(total=own.total + compressed, terms=own.terms | {"compression": compressed}), strategy_state

    def finish(strategy_state: StrategyState, variables: Variables, batch: Batch, _: int) -> StrategyState:
        if not config.projection:
            return {}
        rows = predict_in_batches(method.activations, variables, batch)
        moments = jax.tree.map(lambda r: np.asarray(r.T @ r, np.float32), rows)
        seen = strategy_state.get("moments")
        return {"moments": jax.tree.map(np.add, seen, moments) if seen else moments}

    return Strategy(loss, optax.chain(project(), anchor(config.anchor)), begin, finish)
