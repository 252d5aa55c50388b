"""One step's training."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from iumad_jax import numerics, parallel
from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Memory, Strategy
from iumad_jax.data.pipeline import Piece
from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method
from iumad_jax.shapes import Batch, Scalars, Variables

NOT_DECAYED = {"A_log", "D", "bias", "dt_bias", "scale"}


class TrainState(NamedTuple):
    """What training changes."""

    variables: Variables
    optimizer: optax.OptState
    update: Any  # updates done in this step
    memory: Memory  # of the strategy


class Epoch(NamedTuple):
    """One pass over the step's images, or what is done of it."""

    number: int
    updates: int  # done in this step
    whole: bool
    history: dict[str, np.ndarray]  # scalars of the epoch's updates so far, "loss" being the total
    learning_rate: float  # of the last update
    seconds: float  # that the whole takes
    state: TrainState

    @property
    def losses(self) -> dict[str, float]:
        """Means over the updates, also of the norms of `numerics.measure`."""
        shown = {name: values for name, values in self.history.items() if name != numerics.PARAMETER}
        return {name: float(values.mean(dtype=np.float64)) for name, values in shown.items()}


def of_step(config: ConfigDict, step: int) -> ConfigDict:
    """`config.train` as it holds in a step: the optimiser of later ones is that of `config.continual`."""
    own = config.train.copy_and_resolve_references()
    if step > 0:
        own.optimizer = config.continual.optimizer
        if own.optimizer == "sgd":
            own.learning_rate = config.continual.sgd_learning_rate
    return own


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW (model.md 8) or plain SGD with clipping of the global norm, up to the learning rate; `config` is
    config.train.

    Raises:
        UserError: there is no such optimiser.
    """
    optimizers = {
        "adamw": (optax.scale_by_adam(b1=0.9, b2=0.999), optax.add_decayed_weights(config.weight_decay, _decayed)),
        "sgd": (),
    }
    if config.optimizer not in optimizers:
        raise UserError(
            f'config.train.optimizer or config.continual.optimizer is "{config.optimizer}"; use one of'
            f" {', '.join(optimizers)}."
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), *optimizers[config.optimizer])


def learning_rates(config: ConfigDict, updates_per_epoch: int) -> optax.Schedule:
    """The learning rate at each update of a step; `config` is config.train.

    Raises:
        UserError: there is no such schedule.
    """
    total = config.epochs * updates_per_epoch
    schedules = {
        "step": lambda rate: optax.piecewise_constant_schedule(rate, {config.drop_epoch * updates_per_epoch: 0.1}),
        "cosine": lambda rate: optax.warmup_cosine_decay_schedule(0, rate, total // 20, total),
    }
    if config.schedule not in schedules:
        raise UserError(f'config.train.schedule is "{config.schedule}"; use one of {", ".join(schedules)}.')
    return schedules[config.schedule](config.learning_rate)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def start(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    update: int,
    leaves: list[Any],
    memory: Memory | None = None,
) -> TrainState:
    """The state before a step's update, with the optimiser's state from a snapshot or (no leaves) a new one."""
    state = optimizer.init(variables["params"])
    if leaves:
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return TrainState(variables, state, np.int32(update), memory or {})


def make_update(
    method: Method,
    optimizer: optax.GradientTransformation,
    strategy: Strategy | None = None,
    find_operations: bool = False,
) -> Any:
    """The jitted updates (state, piece, key, learning rates) -> (state, scalars) over all devices.

    Those of a piece, which can be a whole epoch, run one after the other in a loop on the device. Images arrive as they
    are stored and are float32 from here on. No strategy is `finetune`. `find_operations`: see
    `numerics.finding_operations`, which takes pieces of one update.
    """
    ours = strategy or finetune(method)

    def update(state: TrainState, batch: Batch, key: jax.Array, rate: jax.Array) -> tuple[TrainState, Scalars]:
        keys = parallel.own_keys(jax.random.fold_in(key, state.update), len(batch.object_id))

        def loss(params: Any) -> tuple[jax.Array, tuple[Scalars, Memory]]:
            return ours.loss(state.memory, state.variables | {"params": params}, batch, keys)

        params = state.variables["params"]
        (total, (terms, memory)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        gradients, scalars = parallel.mean_over_devices((gradients, {"loss": total, **terms}))
        direction, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        changes = jax.tree.map(lambda change: -rate * change, direction)
        changes, _ = ours.constrain.update(changes, ours.constrain.init(params), params, memory=memory)
        scalars |= numerics.measure(gradients, changes)
        variables = state.variables | {"params": optax.apply_updates(params, changes)}
        return TrainState(variables, optimizer_state, state.update + 1, memory), scalars

    updates = _repeated(update)
    compiled = parallel.data_parallel(updates)
    return numerics.finding_operations(compiled, parallel.on_one_device(updates)) if find_operations else compiled


def _repeated(update: Callable) -> Callable:
    def updates(state: TrainState, piece: Piece, key: jax.Array, rates: jax.Array) -> tuple[TrainState, Scalars]:
        images, rows, weights = piece

        def one(state: TrainState, this: tuple[Any, jax.Array]) -> tuple[TrainState, Scalars]:
            of_this, rate = this
            batch = jax.tree.map(lambda a: a[of_this].astype(jnp.float32 if a.ndim > 1 else a.dtype), images)
            return update(state, batch._replace(weight=weights), key, rate)

        if len(rows) > 1:
            return jax.lax.scan(one, state, (rows, rates))
        state, scalars = one(state, (rows[0], rates[0]))  # even a loop of one would be compiled to slower code
        return state, jax.tree.map(lambda scalar: scalar[None], scalars)

    return updates


def epochs(
    updates: Any,
    state: TrainState,
    pieces: Generator[Piece, None, None],
    rates: optax.Schedule,
    key: jax.Array,
    per_epoch: int,
    last: int,
    history: dict[str, np.ndarray] | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> Iterator[Epoch]:
    """Trains up to epoch `last` from the update that the state is at, yielding after each, and where `pause` says so.

    Args:
        updates: see `make_update`.
        state: where to begin.
        pieces: the images from there on.
        rates: the learning rate of every update.
        key: of all randomness.
        per_epoch: updates of an epoch.
        last: how many epochs there are.
        history: of the epoch that the state is in the middle of.
        pause: asked after every piece.

    Raises:
        NotFinite: a loss, a gradient or a weight is not finite.
    """
    first, total = int(state.update), last * per_epoch
    state = parallel.replicate(state)
    parts = [jax.tree.map(lambda losses: losses[None], history)] if history else []  # as a device gives them
    bar = tqdm(desc="training", total=total, initial=first, unit="update", disable=None, leave=False)
    with closing(pieces), bar:
        for index in range(first // per_epoch, last):
            numbers = np.arange(index * per_epoch, (index + 1) * per_epoch)
            own_rates = np.broadcast_to(np.asarray(rates(numbers), np.float32), numbers.shape)
            done = before = max(0, first - index * per_epoch)
            began = time.monotonic()
            while done < per_epoch:
                piece = next(pieces)
                piece_rates = own_rates[done : done + piece.rows.shape[1]]
                state, scalars = updates(state, piece, key, piece_rates)
                jax.block_until_ready(parts[-1:])  # or pieces would gather in front of a slow device
                parts.append(scalars)
                done += piece_rates.size
                bar.update(piece_rates.size)
                if done == per_epoch or pause():
                    losses = {name: np.concatenate([np.asarray(part[name])[0] for part in parts]) for name in parts[0]}
                    numerics.check(losses, state.variables["params"], index * per_epoch)
                    bar.set_postfix(loss=f"{losses['loss'].mean():.4f}")
                    seconds = (time.monotonic() - began) * per_epoch / (done - before)
                    updates_done = index * per_epoch + done
                    rate, reached = float(piece_rates[-1]), parallel.unreplicate(state)
                    yield Epoch(index, updates_done, done == per_epoch, losses, rate, seconds, reached)
            parts = []
