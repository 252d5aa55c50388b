"""Upsamples the errors at tokens to error maps, one per modality or group; `inference.anomaly_map` combines them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iumad_jax.models.layers import resize_aligned
from iumad_jax.shapes import MAP_SIZE, ErrorMaps


def upsample_errors(
    errors: dict[str, Float[Array, "b p"]],
    object_logits: Float[Array, "b k"] | None = None,
    published: Float[Array, "b p"] | None = None,
) -> ErrorMaps:
    """Upsample errors at tokens to maps by bilinear interpolation with aligned corners.

    Args:
        errors: Errors at the tokens, by modality or group of modalities.
        object_logits: Logits of the object in each image, or None if the method does not recognise objects.
        published: Errors as the method's paper combines the modalities, or None for their sum.
    """

    def upsample(error: Float[Array, "b p"]) -> Float[Array, "b m m"]:
        side = round(error.shape[1] ** 0.5)
        return resize_aligned(error.reshape(-1, side, side, 1), MAP_SIZE)[..., 0]

    joint = None if published is None else upsample(published)
    return ErrorMaps({name: upsample(error) for name, error in errors.items()}, object_logits, joint)


def norm(error: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """Compute the Euclidean norm over channels. Its gradient at zero is zero."""
    square = jnp.sum(jax.lax.square(error), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
