"""Batches of prepared images in a reproducible order, streamed by grain or resident in device memory."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from iumad_jax.errors import UserError, counted
from iumad_jax.runtime import devices, processes
from iumad_jax.shapes import Batch

_RESIDENT_FRACTION = 1 / 4  # largest fraction of a device's memory that resident images occupy


class DeviceBatches(NamedTuple):
    """Input of one or more updates for every device of this process."""

    images: Batch  # leaves (devices, images, ...)
    indices: Int[Array | np.ndarray, "devices updates per_device"]  # indices into `images`, per update
    sample_weight: Float[Array | np.ndarray, "devices per_device"] | None  # see `devices.sample_weight`
    progress: Float[Array | np.ndarray, "devices updates"] | None = None  # completed fraction of the step, per update


class _ConcatenatedSets:
    """Images of several objects, concatenated, as a grain data source."""

    def __init__(self, sets: Sequence[Batch]) -> None:
        self._sets = sets
        self._ends = np.cumsum([len(batch.object_id) for batch in sets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        set_index = int(np.searchsorted(self._ends, index, side="right"))
        row = int(index) - (int(self._ends[set_index - 1]) if set_index else 0)
        return jax.tree.map(lambda array: np.asarray(array[row]), self._sets[set_index])

    def device_batches(self, rows: Int[np.ndarray, " batch"]) -> DeviceBatches:
        """Load the images of one update, split over the devices."""
        by_device = devices.split_indices(rows)
        device_count, per_device = by_device.shape
        images = [self[row] for row in by_device.ravel()]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays).reshape(*by_device.shape, *arrays[0].shape), *images)
        indices = np.broadcast_to(np.arange(per_device, dtype=np.int32), (device_count, 1, per_device))
        return DeviceBatches(stacked, indices, devices.sample_weight(len(rows)))


def updates_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of full batches per epoch.

    Raises:
        UserError: If there are fewer images than in a batch.
    """
    if images < batch_size:
        raise UserError(
            f"config.train.batch_size is {batch_size} but a step has only {counted(images, 'training images')}; use"
            f" {images} or less."
        )
    return images // batch_size


def training_input(
    sets: Sequence[Batch], batch_size: int, seed: int, first: int, resident: str = "auto", updates_per_loop: int = 0
) -> Generator[DeviceBatches, None, None]:
    """Yield shuffled batches without end, each epoch in another order and without the last partial batch.

    The order depends only on the seed and the epoch, so that training can resume at any update. It is the same for
    resident images (all placed in device memory at the start) and streamed ones (read batch by batch from disk).

    Args:
        sets: Images of each object.
        batch_size: Number of images per update.
        seed: Seed of the order.
        first: Index of the first update to yield, counted from 0.
        resident: Whether images are resident: "always", "never", or "auto", which requires that they occupy at most a
            quarter of every device's memory.
        updates_per_loop: Number of updates per item for resident images, fewer at the end of an epoch; 0 selects a
            number that suits the device.

    Raises:
        UserError: If there are fewer images than in a batch.
    """
    if resident == "always" or (resident == "auto" and fits_on_device(sets)):
        return _resident(sets, batch_size, seed, first, updates_per_loop)
    return streamed(training_batches(sets, batch_size, seed, first))


def batch_indices(update: int, images: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the indices of an update's images among all images of its step.

    Args:
        update: Index of the update within the step.
        images: Number of images of the step.
        batch_size: Number of images per update.
        seed: Seed of the order.
    """
    return _shuffled_batches(images, batch_size, seed)[update]


def fits_on_device(sets: Sequence[Batch]) -> bool:
    """Return whether the images fit in the memory allowed for resident images on every device of all processes."""
    size = sum(array.nbytes for array in jax.tree.leaves(list(sets)))
    return processes.all_processes(size <= _RESIDENT_FRACTION * devices.memory_per_device())


def training_batches(sets: Sequence[Batch], batch_size: int, seed: int, first: int) -> grain.IterDataset:
    """Return this process's part of the batches of `training_input`, of which a bounded number is read in advance."""
    images = _ConcatenatedSets(sets)
    batches = _shuffled_batches(len(images), batch_size, seed)
    updates_per_epoch(len(images), batch_size)  # raises if there are too few images
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return batches[first:].map(images.device_batches).to_iter_dataset(options)


def streamed(batches: grain.IterDataset) -> Generator[DeviceBatches, None, None]:
    """Yield endless batches until the generator is closed."""
    with closing(iter(batches)) as stream:
        yield from stream


def single_update(batch: Batch) -> DeviceBatches:
    """Split a batch over the devices as the input of one update."""
    return _ConcatenatedSets([batch]).device_batches(np.arange(len(batch.object_id)))


def _resident(
    sets: Sequence[Batch], batch_size: int, seed: int, first: int, updates_per_loop: int
) -> Generator[DeviceBatches, None, None]:
    """Yield batches of images that are copied to every device at the start."""
    image_count = sum(len(batch.object_id) for batch in sets)
    per_epoch = updates_per_epoch(image_count, batch_size)
    updates_per_loop = updates_per_loop or devices.updates_per_loop(per_epoch)
    batches = _shuffled_batches(image_count, batch_size, seed)
    images = devices.replicate(jax.tree.map(lambda *arrays: np.concatenate(arrays), *sets))
    while True:
        count = min(updates_per_loop, per_epoch - first % per_epoch)
        rows = np.stack([batches[first + update] for update in range(count)], dtype=np.int32)
        first += count
        yield DeviceBatches(images, devices.split_indices(rows), devices.sample_weight(batch_size))


def _shuffled_batches(images: int, batch_size: int, seed: int) -> grain.MapDataset:
    """Return the image indices of every update as an endless dataset."""
    return grain.MapDataset.range(images).shuffle(seed=seed).batch(batch_size, drop_remainder=True).repeat()
