"""Statistics that are updated object by object against NumPy's statistics of all features at once."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.methods.moments import merge_moments, no_moments, standardise


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_merging_sets_successively_equals_all_at_once(sizes, seed):
    rng = np.random.default_rng(seed)
    sets = [(rng.normal(rng.normal(0, 10), rng.random() + 0.1, (n, 3, 2))).astype(np.float32) for n in sizes]
    moments = no_moments(2)
    for features in sets:
        moments = merge_moments(moments, features)
    rows = np.concatenate(sets).reshape(-1, 2).astype(np.float64)
    assert moments["count"] == len(rows)
    np.testing.assert_allclose(moments["mean"], rows.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments["variance"], rows.var(0), rtol=1e-4, atol=1e-5)
    assert all(value.dtype == np.float32 for value in moments.values())


def test_a_large_mean_does_not_cost_the_variance():
    features = (1e4 + np.random.default_rng(0).standard_normal((50, 20, 1))).astype(np.float32)
    moments = merge_moments(merge_moments(no_moments(1), features[:20]), features[20:])
    np.testing.assert_allclose(moments["variance"], features.astype(np.float64).var(), rtol=1e-3)


def test_standardise():
    features = np.random.default_rng(0).normal(5, 3, (4, 6, 2)).astype(np.float32)
    actual = standardise(jnp.asarray(features), merge_moments(no_moments(2), features))
    expected = (features - features.mean((0, 1))) / features.std((0, 1))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_standardise_survives_a_constant_channel():
    features = np.full((2, 3, 1), 7, np.float32)
    actual = standardise(jnp.asarray(features), merge_moments(no_moments(1), features))
    np.testing.assert_array_equal(actual, np.zeros((2, 3, 1)))
