"""Softplus against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan.softplus import softplus


def test_softplus_is_accurate_in_both_tails():
    x = np.linspace(-86, 200, 300001, dtype=np.float32)
    np.testing.assert_allclose(jax.jit(softplus)(x), np.logaddexp(x.astype(np.float64), 0), rtol=5e-7)


def test_softplus_is_accurate_in_float64():
    x = np.linspace(-300, 300, 300001)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(softplus)(x), np.logaddexp(x, 0), rtol=1e-14)


def test_softplus_of_infinities_and_nan():
    values = softplus(jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(values, [0, 0, np.float32(1e30), np.inf, np.nan])
