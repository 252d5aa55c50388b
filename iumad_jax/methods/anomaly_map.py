"""From the error at each token to an anomaly map and an image's score, the same for every method."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.efficientnet import resize_aligned
from iumad_jax.shapes import MAP_SIZE, Logits, Prediction


def predict_from_errors(errors: Float[Array, "b p"], object_logits: Logits | None = None) -> Prediction:
    """Maps by bilinear interpolation with aligned corners; score = maximum of the map averaged over 16 x 16 windows."""
    side = round(errors.shape[1] ** 0.5)
    maps = resize_aligned(errors.reshape(-1, side, side, 1), MAP_SIZE)
    score = nn.avg_pool(maps, (16, 16)).max((1, 2, 3))
    return Prediction(maps[..., 0], score, object_logits)


def norm(error: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """The Euclidean norm over channels, with a gradient of zero at zero."""
    square = jnp.sum(jax.lax.square(error), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
