"""Warnings about the good images of an object."""

import numpy as np
import pytest

from iumad_jax.data.prepared.good_images import several_kinds
from iumad_jax.data.prepared.store import PreparedSet
from iumad_jax.shapes import Batch


def prepared(*kinds):
    """Make images whose features spread by 1 about the value of their kind; each kind is a value and a count."""
    rng = np.random.default_rng(0)
    values = np.concatenate([np.full(count, value) for value, count in kinds])
    features = values[:, None, None] + np.repeat(rng.normal(size=(len(values), 1, 30)), 4, axis=1)
    ids = tuple(f"{number:03}" for number in range(len(values)))
    batch = Batch({"rgb": features.astype(np.float16)}, {}, np.zeros(len(values), np.int32))
    return PreparedSet(batch, None, ("good",) * len(values), ids)


@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        ([(0, 20)], None),
        ([(0, 20), (6, 10)], ("20 like 000", "10 like 020")),
        ([(0, 20), (6, 3)], None),  # outliers
        ([(0, 5), (6, 2)], None),
        ([(0, 1)], None),
    ],
)
def test_images_of_two_kinds_are_told(kinds, counts):
    message = several_kinds(prepared(*kinds), "bolt")
    assert (message is None) == (counts is None)
    assert all(count in message for count in counts or ())


def test_identical_images_are_of_one_kind():
    images = prepared((0, 10))
    same = images.batch._replace(features={"rgb": np.ones((10, 4, 30), np.float16)})
    assert several_kinds(images._replace(batch=same), "bolt") is None
