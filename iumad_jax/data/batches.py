"""From prepared images to batches in a reproducible order, with grain: streamed, or from device memory."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from iumad_jax.errors import UserError
from iumad_jax.runtime import devices, processes
from iumad_jax.shapes import Batch

_SHARE = 1 / 4  # of a device's memory that resident images may take


class DeviceBatches(NamedTuple):
    """The input of one or more updates, for every device of this process."""

    images: Batch  # leaves (devices, images, ...)
    indices: Int[Array | np.ndarray, "devices updates per_device"]  # into images: the batch of each update
    sample_weight: Float[Array | np.ndarray, "devices per_device"] | None  # see `devices.sample_weight`
    progress: Float[Array | np.ndarray, "devices updates"] | None = None  # share of the step's updates done before each


class _Images:
    """The images of several objects, one after the other, as a grain data source."""

    def __init__(self, sets: Sequence[Batch]) -> None:
        self._sets = sets
        self._ends = np.cumsum([len(one.object_id) for one in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        which = int(np.searchsorted(self._ends, index, side="right"))
        within = int(index) - (int(self._ends[which - 1]) if which else 0)
        return jax.tree.map(lambda array: np.asarray(array[within]), self._sets[which])

    def device_batches(self, rows: Int[np.ndarray, " batch"]) -> DeviceBatches:
        """One update's, with these images."""
        share = devices.split_indices(rows)
        count, places = share.shape
        images = [self[row] for row in share.ravel()]
        stacked = jax.tree.map(lambda *one: np.stack(one).reshape(*share.shape, *one[0].shape), *images)
        taken = np.broadcast_to(np.arange(places, dtype=np.int32), (count, 1, places))
        return DeviceBatches(stacked, taken, devices.sample_weight(len(rows)))


def updates_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in one pass.

    Raises:
        UserError: there is none.
    """
    if images < batch_size:
        raise UserError(
            f"config.train.batch_size is {batch_size} but a step has only {images} training images; use {images} or"
            " less."
        )
    return images // batch_size


def training_input(
    sets: Sequence[Batch], batch_size: int, seed: int, first: int, resident: str = "auto", updates_per_loop: int = 0
) -> Generator[DeviceBatches, None, None]:
    """Endless shuffled batches, each epoch in another order; the last partial batch of an epoch is dropped.

    The order is a function of the seed and the epoch, so that training resumes exactly at any update, and is
    the same whether images are resident (all placed in device memory now) or streamed from disk (one batch at a time).

    Args:
        sets: the images, object by object.
        batch_size: images of an update.
        seed: of the order.
        first: the update to begin with, the first of all being 0.
        resident: "always", "never", or "auto": if they take at most a quarter of every device's memory.
        updates_per_loop: updates per item for resident images, fewer at the end of an epoch; 0 chooses for the device.

    Raises:
        UserError: there are fewer images than in a batch.
    """
    if resident == "always" or (resident == "auto" and fit_on_device(sets)):
        return _resident(sets, batch_size, seed, first, updates_per_loop)
    return streamed(training_batches(sets, batch_size, seed, first))


def images_of(update: int, images: int, batch_size: int, seed: int) -> np.ndarray:
    """Which of a step's images an update takes, counted from the step's first."""
    return _in_order(images, batch_size, seed)[update]


def fit_on_device(sets: Sequence[Batch]) -> bool:
    """Whether every device may hold all of these images."""
    size = sum(array.nbytes for array in jax.tree.leaves(list(sets)))
    return processes.all_processes(size <= _SHARE * devices.memory_per_device())


def training_batches(sets: Sequence[Batch], batch_size: int, seed: int, first: int) -> grain.IterDataset:
    """Reads this process's share of the batches of `training_input`, with a bounded number in advance."""
    images = _Images(sets)
    batches = _in_order(len(images), batch_size, seed)
    updates_per_epoch(len(images), batch_size)  # raises
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return batches[first:].map(images.device_batches).to_iter_dataset(options)


def streamed(batches: grain.IterDataset) -> Generator[DeviceBatches, None, None]:
    """Yields the batches until the generator is closed."""
    with closing(iter(batches)) as stream:
        yield from stream


def single_update(batch: Batch) -> DeviceBatches:
    """A batch for one update."""
    return _Images([batch]).device_batches(np.arange(len(batch.object_id)))


def _resident(
    sets: Sequence[Batch], batch_size: int, seed: int, first: int, updates_per_loop: int
) -> Generator[DeviceBatches, None, None]:
    count = sum(len(one.object_id) for one in sets)
    per_epoch = updates_per_epoch(count, batch_size)
    updates_per_loop = updates_per_loop or devices.updates_per_loop(per_epoch)
    batches = _in_order(count, batch_size, seed)
    images = devices.replicate(jax.tree.map(lambda *arrays: np.concatenate(arrays), *sets))
    while True:
        count = min(updates_per_loop, per_epoch - first % per_epoch)
        rows = np.stack([batches[first + update] for update in range(count)], dtype=np.int32)
        first += count
        yield DeviceBatches(images, devices.split_indices(rows), devices.sample_weight(batch_size))


def _in_order(images: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Which images every update takes."""
    return grain.MapDataset.range(images).shuffle(seed=seed).batch(batch_size, drop_remainder=True).repeat()
