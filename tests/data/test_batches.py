"""Order of training images: complete, reproducible, and independent of the update at which training starts."""

from itertools import islice

import grain
import jax
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.data.batches import fits_on_device, training_batches, training_input, updates_per_epoch
from iumad_jax.errors import UserError
from iumad_jax.shapes import Batch
from tests import sentences


def images(*counts):
    """Make one set per object; every array of image i of object k has the value 100 k + i."""
    sets = []
    for k, count in enumerate(counts):
        names = 100 * k + np.arange(count)
        features = np.broadcast_to(names[:, None, None], (count, 2, 3)).astype(np.float32)
        pictures = np.broadcast_to(names[:, None, None, None], (count, 2, 2, 3)).astype(np.float16)
        sets.append(Batch({"rgb": features}, {"depth": pictures}, np.full(count, k, np.int32)))
    return sets


def without_padding(device_batches, names_by_device):
    """Return the names of the images of all devices in order, without those that only fill a batch."""
    weight = device_batches.sample_weight
    return names_by_device[... if weight is None else weight > 0].ravel().astype(int)


def names(stream, count):
    """Return the names of the images in the first batches, shape (count, batch)."""
    return np.array(
        [
            without_padding(device_batches, device_batches.images.features["rgb"][:, :, 0, 0])
            for device_batches in islice(stream, count)
        ]
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_an_epoch_has_every_image_once_except_a_partial_batch(counts, size, seed):
    everything = {100 * k + i for k, count in enumerate(counts) for i in range(count)}
    per_epoch = len(everything) // size
    if not per_epoch:
        return
    assert updates_per_epoch(len(everything), size) == per_epoch
    seen = names(training_batches(images(*counts), size, seed, 0), 3 * per_epoch)
    assert seen.shape == (3 * per_epoch, size)
    for epoch in seen.reshape(3, -1):
        assert len(set(epoch)) == per_epoch * size  # no image twice
        assert set(epoch) <= everything


def test_all_arrays_of_a_batch_are_in_one_order():
    ((by_device, indices, weights, _),) = islice(training_batches(images(5, 7), 12, 0, 0), 1)
    assert (by_device.object_id.shape, weights) == ((4, 3), None)
    np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(3), (4, 1, 3)))
    batch = jax.tree.map(lambda a: a.reshape(12, *a.shape[2:]), by_device)
    image = batch.features["rgb"][:, 0, 0]
    assert len(set(image)) == 12
    np.testing.assert_array_equal(batch.features["rgb"], np.broadcast_to(image[:, None, None], (12, 2, 3)))
    np.testing.assert_array_equal(batch.images["depth"], np.broadcast_to(image[:, None, None, None], (12, 2, 2, 3)))
    np.testing.assert_array_equal(batch.object_id, image // 100)
    assert (batch.features["rgb"].dtype, batch.images["depth"].dtype) == (np.float32, np.float16)  # the stored types
    assert batch.object_id.dtype == np.int32


def test_the_order_is_a_function_of_seed_and_update():
    sets = images(20, 20)
    order = names(training_batches(sets, 4, 5, 0), 40)
    np.testing.assert_array_equal(order, names(training_batches(sets, 4, 5, 0), 40))
    epochs = order.reshape(4, -1)
    other = names(training_batches(sets, 4, 500, 0), 10).ravel()
    everything = [*epochs, other, np.sort(other)]
    for i, epoch in enumerate(everything):
        assert not any(np.array_equal(epoch, earlier) for earlier in everything[:i])
    mixed = (epochs[0] < 100)[:10].sum()  # the first batches hold both objects
    assert 0 < mixed < 10


@pytest.mark.parametrize("first", [1, 2, 7])
def test_starting_at_an_update_skips_earlier_ones(first):
    sets = images(6, 5)
    whole = names(training_batches(sets, 3, 1, 0), first + 6)
    np.testing.assert_array_equal(names(training_batches(sets, 3, 1, first), 6), whole[first:])


def test_memory_mapped_images_give_equal_batches(tmp_path):
    (in_memory,) = images(6)
    np.save(tmp_path / "features.npy", in_memory.features["rgb"])
    mapped = in_memory._replace(features={"rgb": np.load(tmp_path / "features.npy", mmap_mode="r")})
    np.testing.assert_array_equal(
        names(training_batches([mapped], 2, 0, 0), 6), names(training_batches([in_memory], 2, 0, 0), 6)
    )


@pytest.mark.parametrize(("count", "size"), [(3, 4), (1, 24)])
def test_fewer_images_than_a_batch_are_refused(count, size):
    sentence = sentences.BATCH_LARGER_THAN_STEP.format(size=size, count=count)
    with pytest.raises(UserError, match=sentence):
        updates_per_epoch(count, size)
    with pytest.raises(UserError, match=sentence):
        training_batches(images(count), size, 0, 0)


def joined(stream, updates):
    """Join the batches of all devices; return the image names, shape (updates, batch), and the items of the stream."""
    seen, items = [], []
    while len(seen) < updates:
        (batch, indices, *_) = device_batches = next(stream)
        items.append(device_batches)
        for update in range(indices.shape[1]):
            by_device = zip(np.asarray(batch.features["rgb"]), indices[:, update], strict=True)
            seen.append(without_padding(device_batches, np.stack([rgb[i][:, 0, 0] for rgb, i in by_device])))
    stream.close()
    return np.array(seen), items


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("updates_per_loop", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 6, 12])
def test_resident_images_come_in_the_order_of_streamed_ones(first, updates_per_loop, size):
    """Each of four devices holds all images, which are copied to it only once."""
    sets = images(20, 15)
    everything = np.concatenate([batch.object_id * 100 + np.arange(len(batch.object_id)) for batch in sets])
    order = grain.MapDataset.source(everything).shuffle(seed=5).batch(size, drop_remainder=True).repeat()
    expected, per_epoch = np.stack([order[first + update] for update in range(12)]), 35 // size
    streamed, _ = joined(training_input(sets, size, 5, first, "never"), 12)
    resident, items = joined(training_input(sets, size, 5, first, "always", updates_per_loop), 12)
    np.testing.assert_array_equal(streamed, expected)
    np.testing.assert_array_equal(resident[:12], expected)
    ends = np.cumsum([indices.shape[1] for _, indices, *_ in items]) + first
    epochs = range((first // per_epoch + 1) * per_epoch, first + 13, per_epoch)
    assert set(epochs) <= set(ends)  # no item spans two epochs
    assert len(items) <= -(-per_epoch // updates_per_loop) * (len(epochs) + 1)
    assert all(device_batches.images is items[0].images for device_batches in items)
    assert {array.dtype for array in jax.tree.leaves(items[0][0])} == {np.dtype(t) for t in ("f4", "f2", "i4")}


def test_images_are_resident_if_they_fit_in_a_quarter_of_the_memory():
    allowed = psutil.virtual_memory().available / jax.local_device_count() / 4
    (image,) = images(1)
    per_image = sum(array.nbytes for array in jax.tree.leaves(image))
    for factor, expected in [(1.2, False), (0.8, True)]:  # available RAM varies during the test
        count = int(allowed / per_image * factor / 2)
        half = jax.tree.map(lambda array, n=count: np.broadcast_to(array, (n, *array.shape[1:])), image)
        assert fits_on_device([half, half]) == expected
    batch, *_ = next(stream := training_input(images(40), 8, 0, 0))
    assert isinstance(batch.object_id, jax.Array)
    stream.close()
