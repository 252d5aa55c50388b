"""Softplus for kernels."""

import jax.numpy as jnp
from jax import Array


def softplus(x: Array) -> Array:
    """Compute log(1 + exp(x)) without overflow and accurately for very negative x.

    It is several times as fast as `jnp.logaddexp` on CPU and uses only operations that Pallas supports.
    """
    small = jnp.exp(-jnp.abs(x))
    w = small / (2 + small)  # log(1 + small) = 2 artanh(w) with 0 <= w <= 1/3
    square, series = w * w, jnp.zeros_like(w)
    for k in reversed(range(17 if x.dtype == jnp.float64 else 8)):
        series = series * square + 1 / (2 * k + 1)
    return jnp.maximum(x, 0) + 2 * w * series
