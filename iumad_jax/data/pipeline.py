"""From prepared images to batches in a reproducible order, with grain."""

from collections.abc import Sequence

import grain
import jax
import numpy as np

from iumad_jax.errors import UserError
from iumad_jax.shapes import Batch


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
        return jax.tree.map(
            lambda array: np.asarray(array[within], np.float32 if array.ndim > 1 else None), self._sets[which]
        )


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


def training_batches(sets: Sequence[Batch], batch_size: int, seed: int, first_epoch: int) -> grain.IterDataset:
    """Endless shuffled batches, each epoch in another order; the last partial batch of an epoch is dropped.

    The order is a function of the seed and the epoch, so that training resumes exactly at any epoch.
    """
    images = _Images(sets)
    batches = grain.MapDataset.source(images).shuffle(seed=seed).batch(batch_size, drop_remainder=True).repeat()
    start = first_epoch * updates_per_epoch(len(images), batch_size)
    return batches[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
