"""Groups of unknown images, compared with clustering by SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from iumad_jax.inference.unknown_images import group


@given(st.integers(2, 25), st.integers(1, 9), st.floats(0.3, 3), st.integers(0, 2**32 - 1))
def test_groups_are_those_of_average_linkage(images, channels, threshold, seed):
    """Distances are root mean squares; images of one group are on average at most sqrt(2) thresholds apart."""
    x = np.random.default_rng(seed).normal(size=(images, channels)).astype(np.float32)
    tree = linkage(x.astype(np.float64), "average")
    tree[:, 2] /= np.sqrt(channels)
    labels = fcluster(tree, np.sqrt(2) * threshold, "distance")
    groups = group(x, threshold)
    assert {frozenset(rows) for rows in groups} == {frozenset(np.flatnonzero(labels == n)) for n in set(labels)}
    assert [len(rows) for rows in groups] == sorted(map(len, groups), reverse=True)
    assert all(rows == sorted(rows) for rows in groups)


@pytest.mark.parametrize("images", [0, 1])
def test_a_single_image_is_a_group(images):
    assert group(np.ones((images, 3), np.float32), 1.0) == [[0]] * images


@pytest.mark.parametrize("channels", [384, 1536])
def test_images_that_spread_up_to_the_threshold_stay_together(channels):
    """Images of two objects, all almost as far from their objects' means as known images may be."""
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(20, channels))
    deviations *= 0.95 * np.sqrt(channels) / np.linalg.norm(deviations, axis=1, keepdims=True)
    means = np.repeat(rng.normal(size=(2, channels)) * 1.5, [12, 8], axis=0)
    groups = group((means + deviations).astype(np.float32), 1.0)
    assert groups == [list(range(12)), list(range(12, 20))]
