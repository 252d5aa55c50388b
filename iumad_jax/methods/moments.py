"""Per-channel mean and variance of training features, updated object by object."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Moments = dict[str, Any]  # count, shape (); mean and variance, shape (f,)


def no_moments(features: int) -> Moments:
    """Return the moments before any observation: mean 0 and variance 1."""
    return {
        "count": np.zeros((), np.float32),
        "mean": np.zeros(features, np.float32),
        "variance": np.ones(features, np.float32),
    }


def merge_moments(moments: Moments, features: Float[Array | np.ndarray, "n p f"]) -> Moments:
    """Update the moments with further features (Chan et al., 1979)."""
    values = np.asarray(features)
    new_count = values.shape[0] * values.shape[1]
    new_mean = values.mean((0, 1), dtype=np.float64)
    new_variance = values.var((0, 1), dtype=np.float64)
    total = moments["count"] + new_count
    share = new_count / total
    shift = new_mean - moments["mean"]
    mean = moments["mean"] + share * shift
    variance = (1 - share) * moments["variance"] + share * new_variance + share * (1 - share) * shift**2
    return {"count": np.float32(total), "mean": mean.astype(np.float32), "variance": variance.astype(np.float32)}


def standardise(features: Float[Array, "*n f"], moments: Moments) -> Float[Array, "*n f"]:
    """Compute per-channel z-scores."""
    deviation = jnp.sqrt(moments["variance"] + 1e-6)
    return (features - jnp.broadcast_to(moments["mean"], features.shape)) / jnp.broadcast_to(deviation, features.shape)
