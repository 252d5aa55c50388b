"""Calibration images that a run keeps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iumad_jax.data.prepared.good_images import CalibrationImages, calibration_images
from iumad_jax.data.prepared.kept import keep, load
from iumad_jax.errors import UserError
from iumad_jax.runtime.shared_arrays import SharedArrays
from iumad_jax.shapes import Batch


def good(first, count, few=False):
    """Make images that hold their own numbers; those with odd numbers were trained on."""
    numbers = np.arange(first, first + count)
    features = np.broadcast_to(numbers[:, None, None], (count, 4, 2)).astype(np.float16)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 2, 2, 3)).astype(np.uint8)
    return CalibrationImages(
        Batch({"rgb": features}, {"rgb": images}, np.zeros(count, np.int32)), numbers % 2 == 1, few
    )


def numbers_of(kept):
    numbers = kept.images.features["rgb"][:, 0, 0].astype(int).tolist()
    assert kept.images.images["rgb"][:, 0, 0, 0].tolist() == numbers
    assert kept.trained.tolist() == [number % 2 == 1 for number in numbers]
    return numbers


@given(new=st.integers(1, 12), earlier=st.integers(0, 12), bound=st.integers(1, 16))
def test_new_images_come_first_and_the_bound_holds(tmp_path_factory, new, earlier, bound):
    shared = SharedArrays(tmp_path_factory.mktemp("kept"))
    before = good(100, earlier) if earlier else None
    numbers = numbers_of(load(shared, keep(shared, good(0, new), bound, before), 3))
    assert len(numbers) == len(set(numbers)) == min(new + earlier, bound)
    assert sum(number < 100 for number in numbers) == min(new, bound)
    assert set(numbers) <= {*range(new), *range(100, 100 + earlier)}


def test_kept_images_are_evenly_spaced_and_few_only_if_all_are(tmp_path):
    shared = SharedArrays(tmp_path)
    record = keep(shared, good(0, 9, few=True), 3)
    kept = load(shared, record, 5)
    assert (numbers_of(kept), kept.few, kept.images.object_id.tolist()) == ([0, 4, 8], True, [5, 5, 5])
    many = load(shared, keep(shared, good(0, 2), 3, kept), 5)
    assert not many.few
    assert not load(shared, keep(shared, good(4, 1, few=True), 3, many), 5).few


def test_damaged_images_are_refused(tmp_path):
    record = keep(SharedArrays(tmp_path), good(0, 4), 4)
    file = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} is missing or was changed"):
        load(SharedArrays(tmp_path), record, 0)


def test_images_that_are_trained_on_leave_half_of_the_places_to_held_out_ones(tmp_path):
    shared = SharedArrays(tmp_path)
    trained = good(0, 8)._replace(trained=np.ones(8, bool))
    earlier = good(100, 6)  # the even ones were not trained on
    kept = load(shared, keep(shared, trained, 4, earlier), 0)
    numbers = kept.images.features["rgb"][:, 0, 0].astype(int).tolist()
    assert (numbers, kept.trained.tolist()) == ([0, 7, 100, 104], [True, True, False, False])


def test_training_images_with_foreground_join_those_kept_earlier(tmp_path):
    """As those of an update, of a method that puts defects on objects."""
    shared, images = SharedArrays(tmp_path), good(0, 2).images
    new = calibration_images(images._replace(foreground=np.ones((2, 224, 224), bool)), trained=True)
    kept = load(shared, keep(shared, new, 8, good(100, 3)), 0)
    assert kept.images.features["rgb"][:, 0, 0].tolist() == [0, 1, 100, 102, 101]  # untrained ones first
