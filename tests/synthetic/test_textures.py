"""Textures: every family occurs, with contrast and colour."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from iumad_jax.synthetic import textures

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZE = 32
DRAWS = 300


@pytest.fixture(scope="module")
def drawn():
    """Draw textures with an image of an impossible colour, which shows where it was used."""
    other = jnp.full((SIZE, SIZE, 3), -1.0)
    draw = jax.jit(jax.vmap(lambda key: textures.texture(key, SIZE, other)))
    return np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS)))


def test_families_are_equally_likely(drawn):
    other = (drawn == -1).all((1, 2, 3))
    colours = np.array([len(np.unique(image.reshape(-1, 3).round(2), axis=0)) for image in drawn])
    # Half of the gratings have sharp edges, half of the cells have one colour each.
    shares = {"another image": 1 / 5, "sharp gratings": 1 / 10, "flat cells": 1 / 10}
    two, few = ~other & (colours <= 3), (colours > 3) & (colours <= 64)
    for (name, share), found in zip(shares.items(), (other.sum(), two.sum(), few.sum()), strict=True):
        assert stats.binomtest(int(found), DRAWS, share).pvalue > 1e-3, name
    right, left = drawn[:, :, 1:].reshape(DRAWS, -1), drawn[:, :, :-1].reshape(DRAWS, -1)
    smooth = np.array([np.corrcoef(a, b)[0, 1] if a.std() else 1 for a, b in zip(right, left, strict=True)])
    rest = ~(other | two | few)
    assert (smooth[rest] < 0.5).any()  # only spectral noise is as rough
    assert stats.binomtest(int((smooth[rest] > 0.9).sum()), DRAWS, 0.25).pvalue > 1e-6  # octaves and half of the cells


def test_patterns_have_contrast_and_all_colours(drawn):
    patterns = drawn[~(drawn == -1).all((1, 2, 3))]
    assert patterns.min() >= 0
    assert patterns.max() <= 255
    assert np.ptp(patterns, axis=(1, 2)).min() > 63.9
    means = patterns.mean((1, 2))
    assert (np.quantile(means, 0.05, axis=0) < 80).all()
    assert (np.quantile(means, 0.95, axis=0) > 175).all()
    assert np.median(np.ptp(means, axis=1)) > 40  # few are grey


def test_another_image_is_mirrored_turned_and_its_channels_permuted():
    image = np.random.default_rng(0).uniform(0, 255, (4, 4, 3)).astype(np.float32)
    expected = {
        np.rot90(mirrored, turns)[..., list(channels)].tobytes()
        for mirrored, turns in itertools.product((image, image[::-1]), range(4))
        for channels in itertools.permutations(range(3))
    }
    assert len(expected) == 48
    numbers = itertools.product((0.0, 0.99), (0.0, 0.99), (0.0, 0.99), (np.arange(6) + 0.5) / 6)
    change = jax.jit(jax.vmap(lambda u: textures._rearrange(u, jnp.asarray(image))))
    changed = change(np.array([*numbers], np.float32))
    assert {x.tobytes() for x in np.asarray(changed)} == expected
