"""One update of the weights over all devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.data.batches import DeviceBatches
from iumad_jax.methods.method import Loss, Method
from iumad_jax.runtime import devices
from iumad_jax.shapes import Batch, Scalars, Variables
from iumad_jax.training import nonfinite

History = dict[str, Float[jax.Array, " updates"]]  # scalars of some updates


class TrainState(NamedTuple):
    """What training changes."""

    variables: Variables
    optimizer: optax.OptState
    update: Any  # updates done in this step
    strategy_state: StrategyState  # of the strategy


def initial_state(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    update: int,
    leaves: list[Any],
    strategy_state: StrategyState | None = None,
) -> TrainState:
    """The state before a step's update, with the optimiser's state from a snapshot or (no leaves) a new one."""
    state = optimizer.init(variables["params"])
    if leaves:
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return TrainState(variables, state, np.int32(update), strategy_state or {})


def make_update(
    method: Method,
    optimizer: optax.GradientTransformation,
    strategy: Strategy | None = None,
    find_operations: bool = False,
) -> Any:
    """The jitted updates (state, device_batches, key, learning rates) -> (state, scalars) over all devices.

    The updates of one `DeviceBatches`, up to a whole epoch, run in a loop on the device. Images arrive as they are
    stored and are float32 from here on. No strategy is `finetune`. `find_operations`: see
    `nonfinite.finding_operations`, which takes one update at a time.
    """
    ours, transform = strategy or finetune(method), optax.with_extra_args_support(optimizer)

    def update(state: TrainState, batch: Batch, key: jax.Array, rate: jax.Array) -> tuple[TrainState, Scalars]:
        keys = devices.image_keys(jax.random.fold_in(key, state.update), len(batch.object_id))

        def loss(params: Any) -> tuple[jax.Array, tuple[Loss, StrategyState]]:
            found, strategy_state = ours.loss(state.strategy_state, state.variables | {"params": params}, batch, keys)
            return found.total, (found, strategy_state)

        params = state.variables["params"]
        (total, (found, strategy_state)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        gradients, scalars = devices.mean_over_devices((gradients, {"loss": total, **found.terms}))
        direction, optimizer_state = transform.update(gradients, state.optimizer, params, progress=batch.progress)
        changes = jax.tree.map(lambda change: -rate * change, direction)
        changes, _ = ours.constrain.update(changes, ours.constrain.init(params), params, strategy_state=strategy_state)
        scalars |= nonfinite.measure(gradients, changes)
        variables = state.variables | {"params": optax.apply_updates(params, changes)}
        if found.statistics is not None:
            variables |= {"statistics": found.statistics}
        return TrainState(variables, optimizer_state, state.update + 1, strategy_state), scalars

    updates = _repeated(update)
    compiled = devices.data_parallel(updates)
    return nonfinite.finding_operations(compiled, devices.on_one_device(updates)) if find_operations else compiled


def _repeated(update: Callable) -> Callable:
    def updates(
        state: TrainState, device_batches: DeviceBatches, key: jax.Array, rates: jax.Array
    ) -> tuple[TrainState, History]:
        images, indices, sample_weight, progress = device_batches

        def one(state: TrainState, this: tuple[Any, jax.Array, Any]) -> tuple[TrainState, Scalars]:
            of_this, rate, done = this
            batch = jax.tree.map(lambda a: a[of_this].astype(jnp.float32 if a.ndim > 1 else a.dtype), images)
            return update(state, batch._replace(sample_weight=sample_weight, progress=done), key, rate)

        each = indices, rates, progress
        if len(indices) > 1:
            return jax.lax.scan(one, state, each)
        # Even a loop of one would be compiled to slower code.
        state, scalars = one(state, jax.tree.map(lambda values: values[0], each))
        return state, jax.tree.map(lambda scalar: scalar[None], scalars)

    return updates
