"""softplus against numpy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan.softplus import softplus


def test_is_exact_from_one_tail_to_the_other():
    x = np.linspace(-86, 200, 300001, dtype=np.float32)
    np.testing.assert_allclose(jax.jit(softplus)(x), np.logaddexp(x.astype(np.float64), 0), rtol=5e-7)


def test_is_exact_in_float64():
    x = np.linspace(-300, 300, 300001)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(softplus)(x), np.logaddexp(x, 0), rtol=1e-14)


def test_has_limits_and_keeps_nan():
    found = softplus(jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(found, [0, 0, np.float32(1e30), np.inf, np.nan])
