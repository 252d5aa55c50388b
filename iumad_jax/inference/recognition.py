"""Which object an image shows, and whether it is one that was never learned.

Each learned object is a normal distribution of an image's mean token (over all modalities, concatenated), with a mean
of its own and one covariance for all (linear discriminant analysis), as in the detection of unknown classes by
Mahalanobis distance (Lee et al., NeurIPS 2018). The backbone is frozen, so nothing of it is forgotten in later steps.

The covariance also holds how images move where a camera does somewhat worse. Training images of one camera hardly vary
in these directions, so that without it a photograph that was saved as JPEG is farther away than another object.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.linalg import block_diag

from iumad_jax.data.prepared.store import mean_tokens
from iumad_jax.shapes import Batch, Modality, Variables

RECOGNISE = -1  # in place of an object's number


class Recogniser(NamedTuple):
    """Distances to the learned objects, after all that is slow was computed."""

    centre: Float[Array, " f"]
    whiten: Float[Array, "f f"]
    means: Float[Array, "k f"]  # whitened, in the order of learning


def no_statistics(batch: Batch) -> Variables:
    """The statistics of nothing, for features such as the batch's."""
    channels = sum(array.shape[-1] for array in batch.features.values())
    return {
        "count": np.zeros(0, np.float32),  # images of each object
        "mean": np.zeros((0, channels), np.float32),
        "scatter": np.zeros((channels, channels), np.float32),  # see `observe`; summed over all images
    }


def observe(statistics: Variables, batch: Batch, shifts: dict[Modality, Float[np.ndarray, "s f"]]) -> Variables:
    """The statistics with one more object.

    Args:
        statistics: of the objects before.
        batch: all its training images.
        shifts: by how much the mean tokens of some of them move where they are worse. Every image counts as if it
            moved by these, about the object's mean, and in each modality by itself.
    """
    x = np.concatenate([mean_tokens(tokens) for tokens in _sorted(batch.features)], axis=-1)
    mean = x.mean(0)
    moved = block_diag(*(shift.T @ shift * (len(x) / len(shift)) for shift in _sorted(shifts)))
    return {
        "count": np.append(statistics["count"], np.float32(len(x))),
        "mean": np.append(statistics["mean"], mean[None].astype(np.float32), axis=0),
        "scatter": statistics["scatter"] + ((x - mean).T @ (x - mean) + moved).astype(np.float32),
    }


def fit(statistics: Variables) -> Recogniser:
    """The recogniser of the objects observed so far, with the covariance shrunk by `oas`."""
    means, count = np.asarray(statistics["mean"], np.float64), float(np.sum(statistics["count"]))
    covariance = oas(np.asarray(statistics["scatter"], np.float64) / count, count)
    whiten = np.linalg.cholesky(np.linalg.inv(covariance))
    centre = means.mean(0)
    return Recogniser(*(jnp.asarray(array, jnp.float32) for array in (centre, whiten, (means - centre) @ whiten)))


def oas(covariance: Float[np.ndarray, "f f"], samples: float) -> Float[np.ndarray, "f f"]:
    """A covariance shrunk towards a multiple of the identity (oracle approximating; Chen et al., 2010).

    The multiple is at least 1e-6, for features that do not vary.
    """
    size = len(covariance)
    scale = np.trace(covariance) / size
    mean_square = (covariance**2).mean()
    denominator = (samples + 1) * (mean_square - scale**2 / size)
    share = 1.0 if denominator <= 0 else min((mean_square + scale**2) / denominator, 1.0)
    return (1 - share) * covariance + max(share * scale, 1e-6) * np.eye(size)


def distances(recogniser: Recogniser, features: dict[Modality, Float[Array, "b p f"]]) -> Float[Array, "b k"]:
    """Of each image to each learned object: root mean square over whitened channels."""
    x = jnp.concatenate([jnp.asarray(tokens, jnp.float32).mean(1) for tokens in _sorted(features)], axis=-1)
    with jax.default_matmul_precision("float32"):
        x = (x - recogniser.centre[None]) @ recogniser.whiten
    return jnp.sqrt(jnp.square(x[:, None] - recogniser.means[None]).mean(-1))


def recognise(distance: Float[Array, "b k"], given: Int[Array, " b"] | None = None) -> Int[Array, " b"]:
    """The number of the object that each image shows: the nearest one, or the one that is given and not RECOGNISE."""
    nearest = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    return nearest if given is None else jnp.where(given == RECOGNISE, nearest, given)


def probabilities(distance: Float[Array, "b k"], channels: int, rms_distance: Float[Array, ""]) -> Float[Array, "b k"]:
    """Probability of each learned object, given that the image shows one of them.

    The normal distributions are widened to `rms_distance`, the distance of held-out images to their own object: few
    training images make them too narrow.
    """
    return jax.nn.softmax(-channels / 2 * jnp.square(distance / rms_distance), axis=-1)


def _sorted(features: dict[Modality, Any]) -> list[Any]:
    """By modality, as inside of jit: a dictionary comes out of it in another order than it went in."""
    return [features[modality] for modality in sorted(features)]
