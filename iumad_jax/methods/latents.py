"""The space in which diffusion takes place: whitened principal components of the frozen backbone's features.

Latents are a linear map of features, from statistics of the base step. Nothing is trained, so nothing is forgotten.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.error_maps import norm
from iumad_jax.methods.mahalanobis import in_parts
from iumad_jax.methods.moments import Covariance, merge_covariance, no_covariance
from iumad_jax.models.backbone import chosen_levels, named
from iumad_jax.shapes import Tokens

Space = dict[str, Any]  # moments, see `Covariance`; encode (f, c), decode (c, f)

_FLOOR = 1e-3  # added to the variances along the components, relative to their mean


def no_space(features: int, latent: int) -> Space:
    """Return the space before any observation, of `features` channels with `latent` components.

    Raises:
        UserError: If there are more components than channels.
    """
    if latent > features:
        raise UserError(
            f"config.diffusion.latent is {latent}, but the backbone's features have {features} channels; use at most"
            " as many."
        )
    return _with_maps(no_covariance(features), latent)


def observe(space: Space, features: Float[np.ndarray, "n p f"]) -> Space:
    """Update the space with further features."""
    moments = space["moments"]
    for part in in_parts(features):
        moments = merge_covariance(moments, np.asarray(part, np.float64).reshape(-1, part.shape[-1]))
    return _with_maps(moments, len(space["decode"]))


def _with_maps(moments: Covariance, latent: int) -> Space:
    """Compute the maps to the strongest components of z-scores, each with variance 1, and back."""
    covariance = np.asarray(moments["covariance"], np.float64)
    deviation = np.sqrt(np.diag(covariance) + 1e-6)
    variances, directions = np.linalg.eigh(covariance / np.outer(deviation, deviation))
    spreads = np.sqrt(np.maximum(variances, 0) + _FLOOR * variances.mean())[::-1][:latent]
    directions = directions[:, ::-1][:, :latent]
    return {
        "moments": moments,
        "encode": (directions / deviation[:, None] / spreads).astype(np.float32),
        "decode": (directions * spreads).T.astype(np.float32),
    }


def encode(space: Space, tokens: Tokens) -> Float[Array, "g g c"]:
    """Return the latent of an image's features."""
    side = round(len(tokens) ** 0.5)
    with jax.default_matmul_precision("float32"):
        return ((tokens - space["moments"]["mean"][None]) @ space["encode"]).reshape(side, side, -1)


def decode(space: Space, z: Float[Array, "g g c"]) -> Tokens:
    """Return the z-scores of the features that a latent stands for."""
    with jax.default_matmul_precision("float32"):
        return z.reshape(-1, z.shape[-1]) @ space["decode"]


def channels_of_levels(backbone: ConfigDict) -> list[int]:
    """Return the number of channels of each level of `config.backbone`, in the order of the features."""
    architecture = named(backbone.name).architecture
    channels = dict(zip(architecture.levels, architecture.channels_of_levels, strict=True))
    return [channels[level] for level in chosen_levels(backbone.name, backbone.levels)]


def cosine_distance(a: Tokens, b: Tokens) -> Float[Array, " p"]:
    """Compute 1 minus the cosine of the angle between tokens."""
    lengths = jnp.maximum(norm(a) * norm(b), 1e-8)
    return 1 - jnp.sum(a * b, axis=-1) / lengths


def root_mean_square(a: Tokens, b: Tokens) -> Float[Array, " p"]:
    """Compute the root of the mean square of the difference of tokens."""
    return norm(a - b) / a.shape[-1] ** 0.5
