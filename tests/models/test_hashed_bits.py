"""Random numbers of dropout and jitter: uniform, normal, independent, and a function of key and index alone."""

import jax
import numpy as np
import pytest
from scipy import stats

from iumad_jax.models.hashed_bits import hashed_keys

SIZE = 200_000


@pytest.fixture(scope="module")
def keys():
    return hashed_keys(jax.random.split(jax.random.key(0), 6))


@pytest.fixture(scope="module")
def bits(keys):
    """Return 32-bit numbers of six neighbouring keys and of six keys folded and split from the first one."""
    others = jax.random.split(keys[0], 3), jax.vmap(lambda i: jax.random.fold_in(keys[0], i))(np.arange(3))
    draw = jax.jit(jax.vmap(lambda key: jax.random.bits(key, SIZE)))
    return np.concatenate([np.asarray(draw(group)) for group in (keys, *others)])


def test_every_bit_is_set_half_of_the_time(bits):
    share = np.unpackbits(bits.view(np.uint8).reshape(len(bits), SIZE, 4), axis=2).mean(1)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / SIZE**0.5


def test_bytes_are_uniform(bits):
    for place in range(4):
        counts = [np.bincount(row >> 8 * place & 255, minlength=256) for row in bits]
        assert min(stats.chisquare(row).pvalue for row in counts) > 1e-5


def test_streams_and_neighbours_are_uncorrelated(bits):
    limit = 5 / SIZE**0.5
    x = bits / 2**32 - 0.5
    between_keys = np.corrcoef(x) - np.eye(len(x))
    lags = [np.corrcoef(x[0, :-lag], x[0, lag:])[0, 1] for lag in (1, 2, 3, 8, 64, 196, 1024)]
    assert max(np.abs(between_keys).max(), np.abs(lags).max()) < limit


def test_single_bits_of_neighbours_are_independent(bits):
    """Each bit of a number changes with probability 1/2 from one index to the next."""
    changed = np.unpackbits((bits[:, 1:] ^ bits[:, :-1]).view(np.uint8).reshape(len(bits), SIZE - 1, 4), axis=2)
    assert np.abs(changed.mean(1) - 0.5).max() < 5 * 0.5 / SIZE**0.5


def test_distributions_of_jax_random(keys):
    normal = np.asarray(jax.random.normal(keys[1], SIZE))
    kept = np.asarray(jax.random.bernoulli(keys[2], 0.9, SIZE))
    assert stats.kstest(normal, "norm").pvalue > 1e-4
    assert abs(kept.mean() - 0.9) < 5 * (0.09 / SIZE) ** 0.5


@pytest.mark.parametrize("width", [8, 16])
def test_narrow_integers(keys, width):
    numbers = np.asarray(jax.random.bits(keys[0], SIZE, f"uint{width}"))
    assert numbers.dtype == f"uint{width}"
    assert abs(numbers.mean() / 2**width - 0.5) < 0.005


def test_a_batch_of_keys_gives_the_numbers_of_each_key(keys):
    """So results do not depend on how devices share a batch, nor on whether the code is compiled."""
    batched = np.asarray(jax.jit(jax.vmap(lambda key: jax.random.uniform(key, (5, 7))))(keys))
    alone = np.stack([np.asarray(jax.random.uniform(key, (5, 7))) for key in keys])
    np.testing.assert_array_equal(batched, alone)
    assert len(np.unique(batched)) == batched.size


def test_both_words_of_a_key_count():
    """Keys that share a word have unrelated streams."""
    keys = hashed_keys(jax.random.wrap_key_data(np.uint32([[7, 1], [7, 2], [9, 1], [1, 7]])))
    x = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, SIZE))(keys)) - 0.5
    assert np.abs(np.corrcoef(x) - np.eye(len(x))).max() < 5 / SIZE**0.5


def test_keys_of_other_generators_give_random_numbers():
    keys = hashed_keys(jax.random.split(jax.random.key(0, impl="rbg"), 1000))
    numbers = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, 10))(keys))
    assert len(np.unique(numbers)) > 9_990
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 0.01
