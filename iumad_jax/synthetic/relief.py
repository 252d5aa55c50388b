"""Bumps and dents in encoded depth images (see `data.depth.encode`).

A relief stands out along the normals of the surface that it lies on, so that it tilts normals equally on flat and steep
parts of an object.
"""

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
        height: Greatest height of the relief within the mask as a fraction of the range of heights, for encodings with
            height; negative for a dent.
        encoding: Depth encoding other than "xyz_uint8".
    """
    down, right = jnp.gradient(profile)
    scale = slope / _largest(jnp.hypot(down, right), mask)
    slopes = scale * right, -scale * down
    raised = jnp.clip(image + 255 * height / _largest(profile, mask) * profile[..., None], 0, 255)
    match encoding:
        case "height":
            changed = raised
        case "height+normals":
            x, y = image[..., 1] / 127.5 - 1, image[..., 2] / 127.5 - 1
            tilted = _tilt(x, y, jnp.sqrt(jnp.maximum(1 - x**2 - y**2, 0)), slopes)
            changed = jnp.concatenate([raised[..., :1], (tilted[..., :2] + 1) * 127.5], axis=-1)
        case _:
            x, y, z = (image[..., axis] / 127.5 - 1 for axis in range(3))
            changed = (_tilt(x, y, z, slopes) + 1) * 127.5
    return jnp.where(mask[..., None], changed, image)


def _tilt(
    x: Float[Array, "h w"],
    y: Float[Array, "h w"],
    z: Float[Array, "h w"],
    slopes: tuple[Float[Array, "h w"], Float[Array, "h w"]],
) -> Float[Array, "h w 3"]:
    """Tilt normals (x, y, z) by slopes along their tangents, of which one points right and one up in the image.

    The tangents are the first two axes after the shortest rotation from the third axis to the normal.
    """
    normal = _unit(jnp.stack([x, y, jnp.maximum(z, _LEAST_Z)], axis=-1))
    x, y, z = jnp.moveaxis(normal, -1, 0)
    right = jnp.stack([1 - x**2 / (1 + z), -x * y / (1 + z), -x], axis=-1)
    up = jnp.stack([-x * y / (1 + z), 1 - y**2 / (1 + z), -y], axis=-1)
    return _unit(normal - slopes[0][..., None] * right - slopes[1][..., None] * up)


def _unit(vectors: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _largest(values: Float[Array, "h w"], mask: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Return the largest value within the mask, or 1 if there is none above 0."""
    largest = jnp.max(jnp.where(mask, values, 0))
    return jnp.where(largest > 0, largest, 1)
