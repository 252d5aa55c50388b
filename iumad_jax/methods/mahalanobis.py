"""Mahalanobis distances of patches from the good ones of an object.

Directions in which good patches vary count less. In a Euclidean norm they would count most, as channels are correlated.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from iumad_jax.methods.error_maps import norm
from iumad_jax.methods.method import stack_objects
from iumad_jax.shapes import BY_OBJECT, Modality, Variables

Gaussian = dict[str, Any]  # count () of patches; mean (f,); whitening (f, f), which maps deviations to equal spreads

_SHRINKAGE = 0.03  # added to the correlation matrix's eigenvalues, which average 1; chosen on synthetic defects
_IMAGES = 64  # held in memory at once in float64


def fit(
    parts: Iterable[dict[Modality, Float[np.ndarray, "n p f"]]], earlier: dict[Modality, Gaussian] | None = None
) -> dict[Modality, Gaussian]:
    """Fit a Gaussian to all patches of each modality, in float64; constant channels are left out.

    The correlation matrix is shrunk towards the identity, since patches of few images leave directions without spread.

    Args:
        parts: Features of the images, divided among parts.
        earlier: Gaussians of other images, whose patches are included.
    """
    sums: dict[Modality, tuple[Any, ...]] = {m: _to_sums(gaussian) for m, gaussian in (earlier or {}).items()}
    for part in parts:
        for m, features in part.items():
            rows = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
            moments = len(rows), rows.sum(0), rows.T @ rows
            sums[m] = tuple(map(np.add, sums[m], moments)) if m in sums else moments
    return {m: _from_sums(*moments) for m, moments in sums.items()}


def _from_sums(count: float, total: Float[np.ndarray, " f"], square: Float[np.ndarray, "f f"]) -> Gaussian:
    mean = total / count
    covariance = square / count - np.outer(mean, mean)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6 * np.abs(mean))
    correlations, directions = np.linalg.eigh(inverse[:, None] * covariance * inverse)
    whitening = inverse[:, None] * directions / np.sqrt(np.maximum(correlations, 0) + _SHRINKAGE)
    return {
        "count": np.float32(count),
        "mean": mean.astype(np.float32),
        "whitening": whitening.astype(np.float32),
    }


def _to_sums(gaussian: Gaussian) -> tuple[float, Float[np.ndarray, " f"], Float[np.ndarray, "f f"]]:
    """Return number, sum and sum of products of the patches that a Gaussian was fitted to; inverts `_from_sums`."""
    count, mean, whitening = (np.asarray(gaussian[name], np.float64) for name in ("count", "mean", "whitening"))
    varying = whitening.any(1)
    lengths = np.linalg.norm(whitening[varying], axis=1)  # divided out, as the matrix to invert needs equal scales
    rows = whitening[varying] / lengths[:, None]
    shrunk = np.linalg.inv(rows @ rows.T) / np.outer(lengths, lengths)  # variances are multiplied by 1 + _SHRINKAGE
    covariance = np.zeros_like(whitening)
    covariance[np.ix_(varying, varying)] = shrunk - np.diag(np.diag(shrunk)) * _SHRINKAGE / (1 + _SHRINKAGE)
    return float(count), count * mean, count * (covariance + np.outer(mean, mean))


def arrange(variables: Variables) -> Variables:
    """Stack the Gaussians of all objects, if any are fitted, for `method.of_objects`."""
    return variables | {BY_OBJECT: stack_objects(variables[BY_OBJECT]) if variables[BY_OBJECT] else ()}


def distances(x: Float[Array, "p f"], gaussian: Gaussian) -> Float[Array, " p"]:
    """Compute the Mahalanobis distance of each row from a Gaussian."""
    with jax.default_matmul_precision("float32"):
        return norm((x - gaussian["mean"][None]) @ gaussian["whitening"])


def in_parts(images: Any) -> Iterable[Any]:
    """Split a tree of arrays along the first axis into parts that fit into memory."""
    count = len(jax.tree.leaves(images)[0])
    for start in range(0, count, _IMAGES):
        yield jax.tree.map(lambda array, start=start: array[start : start + _IMAGES], images)
