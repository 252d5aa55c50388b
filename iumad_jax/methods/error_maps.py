"""Enlarges the errors at tokens to maps, one per modality or group; `inference.anomaly_map` combines them."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iumad_jax.models.layers import resize_aligned
from iumad_jax.shapes import MAP_SIZE, ErrorMaps, Modality


def maps_of(errors: dict[str, Float[Array, "b p"]], object_logits: Float[Array, "b k"] | None = None) -> ErrorMaps:
    """Maps of the errors at tokens, by bilinear interpolation with aligned corners.

    Args:
        errors: by modality or group of modalities.
        object_logits: as in `ErrorMaps`.
    """

    def enlarge(error: Float[Array, "b p"]) -> Float[Array, "b m m"]:
        side = round(error.shape[1] ** 0.5)
        return resize_aligned(error.reshape(-1, side, side, 1), MAP_SIZE)[..., 0]

    return ErrorMaps({group: enlarge(error) for group, error in errors.items()}, object_logits)


def group(modalities: Iterable[Modality]) -> str:
    """The name of modalities that a method judges together, such as "rgb+depth"."""
    return "+".join(sorted(modalities, reverse=True))


def norm(error: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """The Euclidean norm over channels, with a gradient of zero at zero."""
    square = jnp.sum(jax.lax.square(error), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
