"""Recognition of the object in an image, and its distances to all learned objects, which reveal unknown objects.

Each learned object is modelled as a normal distribution of the mean tokens of its images (modalities concatenated). The
objects differ in their means and share one covariance (linear discriminant analysis), as in the detection of unknown
classes by Mahalanobis distance (Lee et al., NeurIPS 2018). The backbone is frozen, so later steps cannot degrade it.

The covariance also includes the shifts that a slightly worse camera causes. Training images of one camera hardly vary
in these directions; without the shifts, a JPEG copy of an image would be farther away than another object.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.linalg import block_diag

from iumad_jax.data.prepared.store import mean_tokens
from iumad_jax.shapes import Batch, Modality, Variables

RECOGNISE = -1  # used in place of an object's number if the object is to be recognised
RETIRED = 1e10  # distance of images to retired objects: more than to any other, and its square fits into float32


class Recogniser(NamedTuple):
    """Precomputed arrays for distances to the learned objects."""

    centre: Float[Array, " f"]  # mean of the objects' means
    whiten: Float[Array, "f f"]  # whitening matrix of the shared covariance
    means: Float[Array, "k f"]  # centred and whitened mean of each object, in the order of learning


def empty_statistics(batch: Batch) -> Variables:
    """Return the statistics of zero objects, for features with the channels of the batch."""
    channels = sum(array.shape[-1] for array in batch.features.values())
    return {
        "count": np.zeros(0, np.float32),  # (k,) number of images per object
        "mean": np.zeros((0, channels), np.float32),  # (k, f) mean token per object
        "scatter": np.zeros((channels, channels), np.float32),  # (f, f) scatter about the objects' means, summed
    }


def add_object(statistics: Variables, batch: Batch, shifts: dict[Modality, Float[np.ndarray, "s f"]]) -> Variables:
    """Add one object to the statistics, or further images to an object.

    Args:
        statistics: Statistics of the objects learned so far.
        batch: All training images of the new object, or further images of one learned before.
        shifts: Differences between the mean tokens of s degraded images and of their originals, by modality. They add
            to the scatter as if every image had been shifted by each of them, weighted 1 / s, in one modality at a
            time.
    """
    x = np.concatenate([mean_tokens(tokens) for tokens in _sorted(batch.features)], axis=-1)
    object_id, images, mean = int(batch.object_id[0]), len(x), x.mean(0)
    new = int(object_id == len(statistics["count"]))
    counts, means = np.pad(statistics["count"], (0, new)), np.pad(statistics["mean"], ((0, new), (0, 0)))
    earlier, move = float(counts[object_id]), mean - means[object_id]  # zero images if the object is new
    share = images / (earlier + images)
    between = earlier * share * np.outer(move, move)  # scatter of the means of both sets about the mean of all
    counts[object_id] += images
    means[object_id] += share * move
    shift_scatter = block_diag(*(shift.T @ shift * (images / len(shift)) for shift in _sorted(shifts)))
    added = (x - mean).T @ (x - mean) + between + shift_scatter
    return {"count": counts, "mean": means, "scatter": statistics["scatter"] + added.astype(np.float32)}


def fit(statistics: Variables, retired: Sequence[int] = ()) -> Recogniser:
    """Fit the recogniser of the objects observed so far, with the covariance shrunk by `oas`.

    Args:
        statistics: Statistics of the objects.
        retired: Numbers of objects that no image is to be recognised as. Distances to the others stay.
    """
    means, count = np.asarray(statistics["mean"], np.float64), float(np.sum(statistics["count"]))
    covariance = oas(np.asarray(statistics["scatter"], np.float64) / count, count)
    whiten = np.linalg.cholesky(np.linalg.inv(covariance))
    centre = means.mean(0)
    whitened = (means - centre) @ whiten
    whitened[list(retired)] = RETIRED
    return Recogniser(*(jnp.asarray(array, jnp.float32) for array in (centre, whiten, whitened)))


def oas(covariance: Float[np.ndarray, "f f"], samples: float) -> Float[np.ndarray, "f f"]:
    """Shrink a covariance towards a multiple of the identity (oracle approximating shrinkage; Chen et al., 2010).

    The multiple is at least 1e-6, so that the result is invertible even if features do not vary.
    """
    size = len(covariance)
    scale = np.trace(covariance) / size
    mean_square = (covariance**2).mean()
    denominator = (samples + 1) * (mean_square - scale**2 / size)
    share = 1.0 if denominator <= 0 else min((mean_square + scale**2) / denominator, 1.0)
    return (1 - share) * covariance + max(share * scale, 1e-6) * np.eye(size)


def joint_means(features: dict[Modality, Float[Array, "b p f"]]) -> Float[Array, "b c"]:
    """Return the mean tokens of images, modalities concatenated: all that recognition depends on."""
    return jnp.concatenate([jnp.asarray(tokens, jnp.float32).mean(1) for tokens in _sorted(features)], axis=-1)


def whitened(recogniser: Recogniser, means: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Centre and whiten `joint_means`: those of like images are then close to each other."""
    with jax.default_matmul_precision("float32"):
        return (means - recogniser.centre[None]) @ recogniser.whiten


def distances(recogniser: Recogniser, features: dict[Modality, Float[Array, "b p f"]]) -> Float[Array, "b k"]:
    """Compute the distance of each image to each learned object: the root mean square over whitened channels."""
    return distances_of_means(recogniser, joint_means(features))


def distances_of_means(recogniser: Recogniser, means: Float[Array, "b c"]) -> Float[Array, "b k"]:
    """Compute `distances` from `joint_means`."""
    return jnp.sqrt(jnp.square(whitened(recogniser, means)[:, None] - recogniser.means[None]).mean(-1))


def of_images(distance: Float[Array, "r k"], tiles: int) -> Float[Array, "b k"]:
    """Compute the distances of images from those of their tiles: the root mean square."""
    return jnp.sqrt(jnp.square(distance).reshape(-1, tiles, distance.shape[-1]).mean(1)) if tiles > 1 else distance


def recognise(distance: Float[Array, "b k"], specified_id: Int[Array, " b"] | None = None) -> Int[Array, " b"]:
    """Return the number of each image's object: the specified one, or the nearest one instead of RECOGNISE."""
    nearest = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    return nearest if specified_id is None else jnp.where(specified_id == RECOGNISE, nearest, specified_id)


def probabilities(distance: Float[Array, "b k"], channels: int, rms_distance: Float[Array, ""]) -> Float[Array, "b k"]:
    """Compute the probability of each learned object, assuming that the image shows one of them.

    The normal distributions are widened to `rms_distance`, the distance of held-out images to their object, because
    fits to few training images are too narrow.
    """
    return jax.nn.softmax(-channels / 2 * jnp.square(distance / rms_distance), axis=-1)


def _sorted(features: dict[Modality, Any]) -> list[Any]:
    """Return the values sorted by modality. jit sorts dictionary keys, so unsorted values would differ within it."""
    return [features[modality] for modality in sorted(features)]
