"""Mean and variance or covariance of training features, updated object by object."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Moments = dict[str, Any]  # count, shape (); mean and variance, shape (f,)
Covariance = dict[str, Any]  # count, shape (); mean, shape (f,); covariance, shape (f, f)


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


def no_covariance(features: int) -> Covariance:
    """Return the mean and covariance before any observation: zero and the identity."""
    mean, covariance = np.zeros(features, np.float32), np.eye(features, dtype=np.float32)
    return {"count": np.zeros((), np.float32), "mean": mean, "covariance": covariance}


def merge_covariance(moments: Covariance, rows: Float[np.ndarray, "n f"]) -> Covariance:
    """Update the mean and covariance with further rows, in float64."""
    count, mean, covariance = (np.asarray(moments[key], np.float64) for key in ("count", "mean", "covariance"))
    share = len(rows) / (count + len(rows))
    shift = rows.mean(0) - mean
    new = np.cov(rows, rowvar=False, bias=True).reshape(covariance.shape)
    covariance = (1 - share) * covariance + share * new + share * (1 - share) * np.outer(shift, shift)
    return {
        "count": np.float32(count + len(rows)),
        "mean": (mean + share * shift).astype(np.float32),
        "covariance": covariance.astype(np.float32),
    }
