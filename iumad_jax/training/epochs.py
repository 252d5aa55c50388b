"""Trains one step, epoch by epoch."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from iumad_jax.data.batches import DeviceBatches, batch_indices, updates_per_epoch
from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.protocol import Step
from iumad_jax.runtime import devices, memory
from iumad_jax.training import nonfinite
from iumad_jax.training.update import TrainState


class Training(NamedTuple):
    """Training input of a step."""

    step: Step
    objects: tuple[str, ...]
    sets: list[PreparedSet]  # prepared training images, by object
    images: int  # number of images
    batch_size: int
    seed: int  # determines the order of images

    @property
    def per_epoch(self) -> int:
        """Number of updates per epoch."""
        return updates_per_epoch(len(self._ids), self.batch_size)

    def names(self, update: int) -> list[str]:
        """Return the names of an update's images."""
        return [self._ids[row] for row in batch_indices(update, len(self._ids), self.batch_size, self.seed)]

    @property
    def _ids(self) -> list[str]:
        """Names of the images, or of their tiles, which are trained on one by one."""
        pairs = zip(self.objects, self.sets, strict=True)
        return [f"{name}/train/{id_}" for name, images in pairs for id_ in images.tile_ids]


class Epoch(NamedTuple):
    """One pass over the images of a step, possibly still incomplete."""

    number: int
    updates: int  # updates made in this step so far
    complete: bool
    history: dict[str, np.ndarray]  # scalars of each update of the epoch so far; "loss" is the total
    learning_rate: float  # value in the last update
    seconds: float  # duration of the complete epoch, extrapolated if it is incomplete or its first update compiled
    state: TrainState

    @property
    def losses(self) -> dict[str, float]:
        """Means of the losses, and of the norms of `nonfinite.measure`, over the updates."""
        shown = {name: values for name, values in self.history.items() if name != nonfinite.ELEMENT}
        return {name: float(values.mean(dtype=np.float64)) for name, values in shown.items()}


def train_epochs(
    updates: Any,
    state: TrainState,
    stream: Generator[DeviceBatches, None, None],
    rates: optax.Schedule,
    key: jax.Array,
    per_epoch: int,
    epochs: int,
    history: dict[str, np.ndarray] | None = None,
    pause: Callable[[], bool] = lambda: False,
) -> Iterator[Epoch]:
    """Train from the state's update to the end of the step.

    Args:
        updates: Compiled updates of `make_update`.
        state: State to begin with.
        stream: Input from that update on, see `training_input`.
        rates: Learning rate of each update of the step.
        key: Random key of the step.
        per_epoch: Number of updates per epoch.
        epochs: Number of epochs of the step.
        history: Scalars of the earlier updates of the state's epoch, if that is incomplete.
        pause: Called after each item of the stream; returns whether to yield the incomplete epoch.

    Yields:
        Each complete epoch, and incomplete ones on request of `pause`.

    Raises:
        NotFinite: If a loss, a gradient or a weight is not finite.
    """
    first, total = int(state.update), epochs * per_epoch
    state = devices.replicate(state)
    parts = [jax.tree.map(lambda losses: losses[None], history)] if history else []  # with a leading axis for devices
    compiled = False
    bar = tqdm(desc="compiling", total=total, initial=first, unit="update", disable=None, leave=False)
    with closing(stream), bar:
        for epoch in range(first // per_epoch, epochs):
            numbers = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)
            epoch_rates = np.broadcast_to(np.asarray(rates(numbers), np.float32), numbers.shape)
            completed = completed_before = max(0, first - epoch * per_epoch)
            if epoch <= first // per_epoch + 1:
                memory.return_freed()  # first what preparation freed, then what compilation freed
            start = time.monotonic()
            while completed < per_epoch:
                device_batches = next(stream)
                span = slice(completed, completed + device_batches.indices.shape[1])
                batch_rates, progress = epoch_rates[span], np.float32(numbers[span] / total)
                device_batches = device_batches._replace(
                    progress=np.broadcast_to(progress, (len(device_batches.indices), progress.size))
                )
                state, scalars = updates(state, device_batches, key, batch_rates)
                jax.block_until_ready(parts[-1:])  # keeps updates from queueing up on a slow device
                parts.append(scalars)
                completed += batch_rates.size
                bar.update(batch_rates.size)
                if not compiled:
                    jax.block_until_ready(scalars)
                    bar.set_description("training")
                    compiled = True
                    if completed < per_epoch:  # so that the duration of the epoch does not include the compilation
                        start, completed_before = time.monotonic(), completed
                if completed == per_epoch or pause():
                    losses = {name: np.concatenate([np.asarray(part[name])[0] for part in parts]) for name in parts[0]}
                    nonfinite.check(losses, devices.shapes_on_a_device(state.variables["params"]), epoch * per_epoch)
                    bar.set_postfix(loss=f"{losses['loss'].mean():.4f}")
                    yield Epoch(
                        number=epoch,
                        updates=epoch * per_epoch + completed,
                        complete=completed == per_epoch,
                        history=losses,
                        learning_rate=float(batch_rates[-1]),
                        seconds=(time.monotonic() - start) * per_epoch / max(completed - completed_before, 1),
                        state=devices.unreplicate(state),
                    )
            parts = []
