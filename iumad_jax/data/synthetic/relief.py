"""Bumps and dents in encoded depth images (see `data.depth.encode`)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from iumad_jax.errors import UserError
from iumad_jax.shapes import Image

_LEAST_Z = 0.05  # normals are taken to lean at most 87 degrees


def check_encoding(encoding: str) -> None:
    """Raise a UserError if the depth encoding cannot show bumps and dents."""
    if encoding == "xyz_uint8":
        raise UserError(
            'config.input.depth_encoding is "xyz_uint8", whose grey levels are 4 mm apart and hide synthetic bumps and'
            " dents; use normals or height."
        )


def emboss(
    image: Image,
    mask: Bool[Array, "h w"],
    profile: Float[Array, "h w"],
    slope: Float[Array, ""],
    height: Float[Array, ""],
    encoding: str,
) -> Image:
    """Raise or lower the surface in an encoded depth image.

    Args:
        image: Encoded depth, 0..255.
        mask: Pixels to change.
        profile: Shape of the relief, >= 0, up to a factor.
        slope: Steepest slope of the relief within the mask, for encodings with normals; negative for a dent.
        height: Greatest height of the relief within the mask as a fraction of the range of heights, for encodings
            with height; negative for a dent.
        encoding: Depth encoding other than "xyz_uint8".
    """
    scale = 255 * height / _positive(jnp.max(jnp.where(mask, profile, 0)))
    raised = jnp.clip(image + scale * profile[..., None], 0, 255)
    match encoding:
        case "height":
            changed = raised
        case "height+normals":
            directions = image[..., 1:] / 127.5 - 1
            z = jnp.sqrt(jnp.maximum(1 - (directions**2).sum(-1, keepdims=True), 0))
            tilted = _tilt(jnp.concatenate([directions, z], axis=-1), mask, profile, slope)
            changed = jnp.concatenate([raised[..., :1], (tilted[..., :2] + 1) * 127.5], axis=-1)
        case _:
            changed = (_tilt(image / 127.5 - 1, mask, profile, slope) + 1) * 127.5
    return jnp.where(mask[..., None], changed, image)


def _tilt(
    normals: Float[Array, "h w 3"], mask: Bool[Array, "h w"], profile: Float[Array, "h w"], slope: Float[Array, ""]
) -> Float[Array, "h w 3"]:
    """Add a profile, scaled to its steepest slope within the mask, to a surface; return its unit normals.

    A normal along (-p, -q, 1) has slope p along the columns and q upwards in the image.
    """
    down, right = jnp.gradient(profile)
    scale = slope / _positive(jnp.max(jnp.where(mask, jnp.hypot(down, right), 0)))
    z = jnp.maximum(normals[..., 2], _LEAST_Z)
    p, q = scale * right - normals[..., 0] / z, -scale * down - normals[..., 1] / z
    tilted = jnp.stack([-p, -q, jnp.ones_like(p)], axis=-1)
    return tilted / jnp.linalg.norm(tilted, axis=-1, keepdims=True)


def _positive(divisor: Float[Array, ""]) -> Float[Array, ""]:
    """Replace 0 by 1: an empty mask has no slope and no height."""
    return jnp.where(divisor > 0, divisor, 1)
