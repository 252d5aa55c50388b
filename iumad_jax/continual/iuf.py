"""IUF's strategy (Tang et al., ECCV 2024), also used by IB-IUMAD.

It anchors the weights, projects updates away from directions that old objects use, and compresses the features of the
base step to leave room for new objects.
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

QUEUE_ROWS = 768


def anchor(beta: float) -> optax.GradientTransformationExtraArgs:
    """Move the weights towards those before the step in each update: W <- (1 - beta) W + beta W0.

    W0 is `strategy_state["old"]`. The gradient is taken at W. If updates are at most u, the weights stay within
    u / beta of W0.
    """

    def update(updates: Any, state: Any, params: Any, *, strategy_state: StrategyState, **_: Any) -> tuple[Any, Any]:
        if "old" not in strategy_state:
            return updates, state
        return jax.tree.map(lambda u, w, w0: u + beta * (w0 - w), updates, params, strategy_state["old"]), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def project() -> optax.GradientTransformationExtraArgs:
    """Multiply the update of kernel and bias by the layer's matrix, for each layer in `strategy_state["projections"]`.

    The update is projected instead of the gradient, since AdamW's element-wise scaling and weight decay would restore
    removed directions. For SGD, both are equivalent.
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


def projection_matrix(moments: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Compute V diag(w) V^T with w_k = ln(k + 1) / ln(d), k = 0 .. d - 1.

    The more strongly a direction is used, the less of it remains.

    Args:
        moments: Sum of r r^T over rows r. Its eigenvectors V, strongest first, are the right singular vectors of the
            matrix of these rows, completed to a basis if it has fewer rows than columns.
    """
    basis = np.linalg.eigh(np.asarray(moments, np.float64))[1][:, ::-1]
    weights = np.log(np.arange(1, len(basis) + 1)) / np.log(len(basis))
    return ((basis * weights) @ basis.T).astype(np.float32)


def compression_loss(rows: Float[Array, "n d"]) -> Float[Array, ""]:
    """Sum those singular values, normalised to a total of 1, that are below 0.1 / d.

    Minimising this concentrates the rows in few directions and leaves the others free. Rows of zeros have no effect.
    """
    values = jnp.linalg.svd(rows, compute_uv=False)
    shares = values / jnp.maximum(values.sum(), 1e-12)
    return jnp.sum(jnp.where(shares < 0.1 / rows.shape[1], shares, 0))


def iuf(config: ConfigDict, method: Method) -> Strategy:
    """Build the strategy for `config.continual`, whose keys can switch off each part.

    Between steps the state holds one d x d matrix for each layer in the method's `activations`, whatever the number of
    images and objects. Within later steps it also holds each layer's projection and the weights before the step.
    """

    def begin(strategy_state: StrategyState, variables: Variables, batch: Batch, step: int) -> StrategyState:
        if step > 0:
            old = {"old": variables["params"]} if config.anchor else {}
            projections = jax.tree.map(projection_matrix, strategy_state.get("moments", {}))
            return strategy_state | old | ({"projections": projections} if projections else {})
        assert method.loss is not None
        batch = jax.tree.map(lambda array: np.concatenate([array, array])[None], batch)  # batch norm needs two images
        keys = jax.random.split(jax.random.key(0), batch.object_id.size)
        on_one_device = devices.on_one_device(method.loss)
        outputs = jax.eval_shape(on_one_device, variables, batch, keys).outputs if config.compression else {}
        return {"queues": {name: np.zeros((QUEUE_ROWS, rows.shape[-1]), np.float32) for name, rows in outputs.items()}}

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        assert method.loss is not None
        method_loss = method.loss(variables, batch, keys)
        queues = strategy_state.get("queues", {})
        if not queues:
            return method_loss, strategy_state
        # Rows are gathered so that the result does not depend on the number of devices. Only they have a gradient.
        new_rows = {name: devices.gather(method_loss.outputs[name], batch.sample_weight) for name in queues}
        matrices = {name: jnp.concatenate([queues[name], rows]) for name, (rows, _) in new_rows.items()}
        losses = [compression_loss(rows) for rows in matrices.values()]
        compression = config.compression * sum(losses) / len(losses)
        queues = {
            name: jax.lax.dynamic_slice_in_dim(matrices[name], count, QUEUE_ROWS)
            for name, (_, count) in new_rows.items()
        }
        strategy_state = strategy_state | {"queues": jax.lax.stop_gradient(queues)}
        terms = method_loss.terms | {"compression": compression}
        return method_loss._replace(total=method_loss.total + compression, terms=terms), strategy_state

    def finish(strategy_state: StrategyState, variables: Variables, batch: Batch, _: int) -> StrategyState:
        if not config.projection:
            return {}
        rows = predict_in_batches(jax.jit(method.activations), variables, batch)
        moments = jax.tree.map(lambda r: np.asarray(r.T @ r, np.float32), rows)
        old_moments = strategy_state.get("moments")
        return {"moments": jax.tree.map(np.add, old_moments, moments) if old_moments else moments}

    return Strategy(loss, optax.chain(project(), anchor(config.anchor)), begin, finish)
