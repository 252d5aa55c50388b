"""Updates of the weights, computed on all devices together."""

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

History = dict[str, Float[jax.Array, " updates"]]  # scalars of each update, by name


class TrainState(NamedTuple):
    """Everything that training changes."""

    variables: Variables
    optimizer: Any  # optax.OptState
    update: Any  # number of updates done in this step
    strategy_state: StrategyState


def initial_state(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    update: int,
    leaves: list[Any],
    strategy_state: StrategyState | None = None,
) -> TrainState:
    """Create the state before an update of a step.

    `leaves` are those of the optimiser's state in a snapshot; without any, the optimiser starts anew.
    """
    optimizer_state = optimizer.init(variables["params"])
    if leaves:
        optimizer_state = jax.tree.unflatten(jax.tree.structure(optimizer_state), leaves)
    return TrainState(variables, optimizer_state, np.int32(update), strategy_state or {})


def make_update(
    method: Method,
    optimizer: optax.GradientTransformation,
    strategy: Strategy | None = None,
    debug_nans: bool = False,
) -> Any:
    """Compile the updates (state, device_batches, key, learning rates) -> (state, scalars) over all devices.

    The updates of one `DeviceBatches`, up to a whole epoch, run in a loop on the device. They convert the images from
    their stored type to float32. The default strategy is `finetune`. `debug_nans` finds the operation that produces NaN
    or infinity, see `nonfinite.with_nan_debugging`; it requires one update per `DeviceBatches`.
    """
    active_strategy = strategy or finetune(method)
    transform = optax.with_extra_args_support(optimizer)

    def update(state: TrainState, batch: Batch, key: jax.Array, rate: jax.Array) -> tuple[TrainState, Scalars]:
        keys = devices.image_keys(jax.random.fold_in(key, state.update), len(batch.object_id))

        def loss(params: Any) -> tuple[jax.Array, tuple[Loss, StrategyState]]:
            variables = state.variables | {"params": params}
            result, strategy_state = active_strategy.loss(state.strategy_state, variables, batch, keys)
            return result.total, (result, strategy_state)

        params = state.variables["params"]
        (total, (result, strategy_state)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        gradients, scalars = devices.mean_over_devices((gradients, {"loss": total, **result.terms}))
        directions, optimizer_state = transform.update(gradients, state.optimizer, params, progress=batch.progress)
        changes = jax.tree.map(lambda direction: -rate * direction, directions)
        constrain = active_strategy.constrain
        changes, _ = constrain.update(changes, constrain.init(params), params, strategy_state=strategy_state)
        changes = method.hold(changes, batch.progress)
        scalars |= nonfinite.measure(gradients, changes)
        variables = state.variables | {"params": optax.apply_updates(params, changes)}
        if result.statistics is not None:
            variables |= {"statistics": result.statistics}
        return TrainState(variables, optimizer_state, state.update + 1, strategy_state), scalars

    updates = _loop(update)
    compiled = devices.data_parallel(updates)
    return nonfinite.with_nan_debugging(compiled, devices.on_one_device(updates)) if debug_nans else compiled


def _loop(update: Callable) -> Callable:
    """Turn an update into a function that does all updates of one `DeviceBatches`."""

    def updates(
        state: TrainState, device_batches: DeviceBatches, key: jax.Array, rates: jax.Array
    ) -> tuple[TrainState, History]:
        images, indices, sample_weight, progress = device_batches

        def body(state: TrainState, inputs: tuple[Any, jax.Array, Any]) -> tuple[TrainState, Scalars]:
            rows, rate, update_progress = inputs
            batch = jax.tree.map(lambda a: a[rows].astype(jnp.float32 if a.ndim > 1 else a.dtype), images)
            return update(state, batch._replace(sample_weight=sample_weight, progress=update_progress), key, rate)

        inputs = indices, rates, progress
        if len(indices) > 1:
            return jax.lax.scan(body, state, inputs)
        # XLA compiles slower code for a loop, even for one with a single iteration.
        state, scalars = body(state, jax.tree.map(lambda values: values[0], inputs))
        return state, jax.tree.map(lambda scalar: scalar[None], scalars)

    return updates
