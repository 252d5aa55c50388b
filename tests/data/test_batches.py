"""The order of training images: complete, reproducible, and the same wherever training begins."""

from itertools import islice

import grain
import jax
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.data.batches import fit_on_device, training_batches, training_input, updates_per_epoch
from iumad_jax.errors import UserError
from iumad_jax.shapes import Batch
from tests import sentences


def images(*counts):
    """One set per object; every array of image i of object k says 100 k + i."""
    sets = []
    for k, count in enumerate(counts):
        names = 100 * k + np.arange(count)
        features = np.broadcast_to(names[:, None, None], (count, 2, 3)).astype(np.float32)
        pictures = np.broadcast_to(names[:, None, None, None], (count, 2, 2, 3)).astype(np.float16)
        sets.append(Batch({"rgb": features}, {"depth": pictures}, np.full(count, k, np.int32)))
    return sets


def counted(device_batches, name_of_place):
    """What counts of what is at the places of all devices, in order."""
    return (
        name_of_place[... if device_batches.sample_weight is None else device_batches.sample_weight > 0]
        .ravel()
        .astype(int)
    )


def names(stream, count):
    """The images in the first batches, by name: (count, batch)."""
    return np.array(
        [
            counted(device_batches, device_batches.images.features["rgb"][:, :, 0, 0])
            for device_batches in islice(stream, count)
        ]
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_an_epoch_sees_every_image_once_but_for_a_partial_batch(counts, size, seed):
    everything = {100 * k + i for k, count in enumerate(counts) for i in range(count)}
    per_epoch = len(everything) // size
    if not per_epoch:
        return
    assert updates_per_epoch(len(everything), size) == per_epoch
    seen = names(training_batches(images(*counts), size, seed, 0), 3 * per_epoch)
    assert seen.shape == (3 * per_epoch, size)
    for epoch in seen.reshape(3, -1):
        assert len(set(epoch)) == per_epoch * size  # none twice
        assert set(epoch) <= everything


def test_a_batch_keeps_what_belongs_together():
    ((spread, rows, weights, _),) = islice(training_batches(images(5, 7), 12, 0, 0), 1)
    assert (spread.object_id.shape, weights) == ((4, 3), None)
    np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(3), (4, 1, 3)))
    batch = jax.tree.map(lambda a: a.reshape(12, *a.shape[2:]), spread)
    image = batch.features["rgb"][:, 0, 0]
    assert len(set(image)) == 12
    np.testing.assert_array_equal(batch.features["rgb"], np.broadcast_to(image[:, None, None], (12, 2, 3)))
    np.testing.assert_array_equal(batch.images["depth"], np.broadcast_to(image[:, None, None, None], (12, 2, 2, 3)))
    np.testing.assert_array_equal(batch.object_id, image // 100)
    assert (batch.features["rgb"].dtype, batch.images["depth"].dtype) == (np.float32, np.float16)  # as they are stored
    assert batch.object_id.dtype == np.int32


def test_the_order_is_a_function_of_seed_and_update():
    sets = images(20, 20)
    order = names(training_batches(sets, 4, 5, 0), 40)
    np.testing.assert_array_equal(order, names(training_batches(sets, 4, 5, 0), 40))
    epochs = order.reshape(4, -1)
    other = names(training_batches(sets, 4, 500, 0), 10).ravel()
    everything = [*epochs, other, np.sort(other)]
    for i, one in enumerate(everything):
        assert not any(np.array_equal(one, another) for another in everything[:i])
    mixed = (epochs[0] < 100)[:10].sum()  # both objects from the start
    assert 0 < mixed < 10


@pytest.mark.parametrize("first", [1, 2, 7])
def test_beginning_at_an_update_is_skipping_those_before(first):
    sets = images(6, 5)
    whole = names(training_batches(sets, 3, 1, 0), first + 6)
    np.testing.assert_array_equal(names(training_batches(sets, 3, 1, first), 6), whole[first:])


def test_memory_mapped_images_are_read_as_they_are(tmp_path):
    (one,) = images(6)
    np.save(tmp_path / "features.npy", one.features["rgb"])
    mapped = one._replace(features={"rgb": np.load(tmp_path / "features.npy", mmap_mode="r")})
    np.testing.assert_array_equal(
        names(training_batches([mapped], 2, 0, 0), 6), names(training_batches([one], 2, 0, 0), 6)
    )


@pytest.mark.parametrize(("count", "size"), [(3, 4), (1, 24)])
def test_fewer_images_than_a_batch_are_refused(count, size):
    sentence = sentences.BATCH_LARGER_THAN_STEP.format(size=size, count=count)
    with pytest.raises(UserError, match=sentence):
        updates_per_epoch(count, size)
    with pytest.raises(UserError, match=sentence):
        training_batches(images(count), size, 0, 0)


def taken(stream, updates):
    """The batches that the devices of some stream see, put together again: (updates, batch) names, and the stream."""
    seen, used = [], []
    while len(seen) < updates:
        (batch, rows, *_) = device_batches = next(stream)
        used.append(device_batches)
        for update in range(rows.shape[1]):
            shares = zip(np.asarray(batch.features["rgb"]), rows[:, update], strict=True)
            seen.append(counted(device_batches, np.stack([share[own][:, 0, 0] for share, own in shares])))
    stream.close()
    return np.array(seen), used


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("updates_per_loop", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 6, 12])
def test_resident_images_come_in_the_order_of_streamed_ones(first, updates_per_loop, size):
    """To four devices, each with all of the images, from memory that nothing has to be read into again."""
    sets = images(20, 15)
    everything = np.concatenate([one.object_id * 100 + np.arange(len(one.object_id)) for one in sets])
    order = grain.MapDataset.source(everything).shuffle(seed=5).batch(size, drop_remainder=True).repeat()
    expected, per_epoch = np.stack([order[first + update] for update in range(12)]), 35 // size
    streamed, _ = taken(training_input(sets, size, 5, first, "never"), 12)
    found, stream = taken(training_input(sets, size, 5, first, "always", updates_per_loop), 12)
    np.testing.assert_array_equal(streamed, expected)
    np.testing.assert_array_equal(found[:12], expected)
    ends = np.cumsum([rows.shape[1] for _, rows, *_ in stream]) + first
    epochs = range((first // per_epoch + 1) * per_epoch, first + 13, per_epoch)
    assert set(epochs) <= set(ends)  # no device_batches is of two
    assert len(stream) <= -(-per_epoch // updates_per_loop) * (len(epochs) + 1)
    assert all(device_batches.images is stream[0].images for device_batches in stream)
    assert {array.dtype for array in jax.tree.leaves(stream[0][0])} == {np.dtype(t) for t in ("f4", "f2", "i4")}


def test_images_are_resident_where_a_quarter_of_the_memory_holds_them():
    share = psutil.virtual_memory().available / jax.local_device_count() / 4
    (one,) = images(1)
    per_image = sum(array.nbytes for array in jax.tree.leaves(one))
    for factor, expected in [(1.2, False), (0.8, True)]:  # RAM comes and goes meanwhile
        count = int(share / per_image * factor / 2)
        half = jax.tree.map(lambda array, n=count: np.broadcast_to(array, (n, *array.shape[1:])), one)
        assert fit_on_device([half, half]) == expected
    batch, *_ = next(stream := training_input(images(40), 8, 0, 0))
    assert isinstance(batch.object_id, jax.Array)
    stream.close()
