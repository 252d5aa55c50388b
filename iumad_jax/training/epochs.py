"""A step's training, epoch by epoch."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from iumad_jax.data.batches import DeviceBatches
from iumad_jax.runtime import devices
from iumad_jax.training import nonfinite
from iumad_jax.training.update import TrainState


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
        """Means over the updates, also of the norms of `nonfinite.measure`."""
        shown = {name: values for name, values in self.history.items() if name != nonfinite.PARAMETER}
        return {name: float(values.mean(dtype=np.float64)) for name, values in shown.items()}


def train_epochs(
    updates: Any,
    state: TrainState,
    stream: Generator[DeviceBatches, None, None],
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
        stream: the input from that update on, of `training_input`.
        rates: the learning rate of every update.
        key: of all randomness.
        per_epoch: updates of an epoch.
        last: how many epochs there are.
        history: of the epoch that the state is in the middle of.
        pause: called after every item of the stream.

    Raises:
        NotFinite: a loss, a gradient or a weight is not finite.
    """
    first, total = int(state.update), last * per_epoch
    state = devices.replicate(state)
    parts = [jax.tree.map(lambda losses: losses[None], history)] if history else []  # as a device gives them
    bar = tqdm(desc="training", total=total, initial=first, unit="update", disable=None, leave=False)
    with closing(stream), bar:
        for index in range(first // per_epoch, last):
            numbers = np.arange(index * per_epoch, (index + 1) * per_epoch)
            own_rates = np.broadcast_to(np.asarray(rates(numbers), np.float32), numbers.shape)
            done = before = max(0, first - index * per_epoch)
            began = time.monotonic()
            while done < per_epoch:
                device_batches = next(stream)
                taken = slice(done, done + device_batches.indices.shape[1])
                rates_taken, share_done = own_rates[taken], np.float32(numbers[taken] / total)
                device_batches = device_batches._replace(
                    progress=np.broadcast_to(share_done, (len(device_batches.indices), share_done.size))
                )
                state, scalars = updates(state, device_batches, key, rates_taken)
                jax.block_until_ready(parts[-1:])  # otherwise work would queue up in front of a slow device
                parts.append(scalars)
                done += rates_taken.size
                bar.update(rates_taken.size)
                if done == per_epoch or pause():
                    losses = {name: np.concatenate([np.asarray(part[name])[0] for part in parts]) for name in parts[0]}
                    nonfinite.check(losses, state.variables["params"], index * per_epoch)
                    bar.set_postfix(loss=f"{losses['loss'].mean():.4f}")
                    seconds = (time.monotonic() - began) * per_epoch / (done - before)
                    updates_done = index * per_epoch + done
                    rate, reached = float(rates_taken[-1]), devices.unreplicate(state)
                    yield Epoch(index, updates_done, done == per_epoch, losses, rate, seconds, reached)
            parts = []
