"""Puts synthetic defects into good images: textures into photographs, bumps and dents into depth.

Masks and the opacity of textures are those of DeSTSeg (Zhang et al., CVPR 2023), the reliefs are this project's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from iumad_jax.shapes import Image, Keys, Modality
from iumad_jax.synthetic import draws, perlin, relief
from iumad_jax.synthetic.textures import texture

_THRESHOLD = 0.5  # noise above it is a defect
_FULL = 0.4  # excess over the threshold at which a relief has its full height
_TRIALS = 4  # masks drawn per image
_LEAST_AREA = 0.001  # fraction of an image that a defect covers at least
_RADIUS = (0.02, 0.15)  # radius of a confined defect, image sides
_SLOPE = (5, 45)  # steepest slope of a relief, degrees
_HEIGHT = (0.01, 0.1)  # height of a relief as a fraction of the range that the `height` encoding spans
_FAINTEST = 0.2  # least weight of a texture


class Defective(NamedTuple):
    """Images with synthetic defects."""

    images: dict[Modality, Float[Array, "b h w 3"]]
    mask: Bool[Array, "b h w"]  # pixels of the defect, empty where the image stayed good
    shown: dict[Modality, Bool[Array, " b"]]  # whether the modality shows the defect


def make_defects(
    keys: Keys,
    images: dict[Modality, Float[Array, "b h w 3"]],
    allowed: Bool[Array, "b h w"] | None,
    depth_encoding: str,
    confined: bool,
    others: Float[Array, "b h w 3"] | None = None,
    photographs: UInt8[Array, "n h w 3"] | None = None,
) -> Defective:
    """Make a synthetic defect in each good image.

    With two modalities, rgb alone, depth alone or both show the defect, with equal probability. An image stays good if
    none of four random masks covers 0.1 % of it.

    Args:
        keys: One random key per image.
        images: Good images by modality, square, 0..255.
        allowed: Pixels where defects may lie; None allows all.
        depth_encoding: Encoding of the depth images, see `relief.check_encoding`.
        confined: Whether a defect is a disc with an uneven outline and a radius of 2 to 15 % of the image's side (this
            project's choice), or its parts may be spread over the whole image (as published).
        others: Another photograph for each image, from which a fifth of the textures are made; None leaves them out.
        photographs: Textures; None draws them.
    """

    def make_one(
        key: Key[Array, ""], images: dict[Modality, Image], allowed: Bool[Array, "h w"] | None, other: Image | None
    ) -> Defective:
        size = next(iter(images.values())).shape[0]
        mask_key, modality_key, rgb_key, depth_key = jax.random.split(key, 4)
        noise, mask = draw_mask(mask_key, jnp.ones((size, size), bool) if allowed is None else allowed, confined)
        left_out = draws.below(jax.random.uniform(modality_key), 3)  # the modality with this number; 2: none
        shown = {m: mask.any() & ((left_out != i) | (len(images) == 1)) for i, m in enumerate(images)}
        defective = dict(images)
        if "rgb" in images:
            texture_key, weight_key = jax.random.split(rgb_key)
            if photographs is None:
                stain = texture(texture_key, size, other)
            else:
                number = draws.below(jax.random.uniform(texture_key), len(photographs))
                stain = jnp.asarray(photographs)[number].astype(jnp.float32)
            defective["rgb"] = _stain(weight_key, images["rgb"], mask & shown["rgb"], stain)
        if "depth" in images:
            defective["depth"] = _deform(depth_key, images["depth"], mask & shown["depth"], noise, depth_encoding)
        return Defective(defective, mask, shown)

    return jax.vmap(make_one)(keys, images, allowed, others)


def draw_mask(
    key: Key[Array, ""], allowed: Bool[Array, "s s"], confined: bool
) -> tuple[Float[Array, "s s"], Bool[Array, "s s"]]:
    """Draw noise and the mask of its values above 0.5 on allowed pixels; see `make_defects`."""

    def draw(key: Key[Array, ""]) -> Float[Array, "s s"]:
        noise_key, window_key = jax.random.split(key)
        noise = perlin.noise(noise_key, len(allowed))
        return _confine(window_key, noise, allowed) if confined else noise

    noise = jax.lax.map(draw, jax.random.split(key, _TRIALS))  # compiles faster than jax.vmap
    masks = (noise > _THRESHOLD) & allowed[None]
    sufficient = masks.mean((1, 2)) >= _LEAST_AREA
    first = jnp.argmax(sufficient)
    return noise[first], masks[first] & sufficient.any()


def _confine(key: Key[Array, ""], noise: Float[Array, "s s"], allowed: Bool[Array, "s s"]) -> Float[Array, "s s"]:
    """Return a cone around a random allowed pixel, 1 at its tip and 0.5 at a random radius, disturbed by noise.

    The radius of the region above 0.5 is proportional to 1 + noise, so that the noise makes its outline uneven.
    """
    priority, radius = draws.uniform(key, allowed.shape, ())
    row, column = jnp.unravel_index(jnp.argmax(jnp.where(allowed, priority, -1)), allowed.shape)
    radius = len(allowed) * draws.log_between(radius, *_RADIUS)
    y, x = perlin.pixel_grid(len(allowed))
    return 1 - 0.5 * jnp.hypot(y - row, x - column) / radius + 0.5 * noise


def _stain(key: Key[Array, ""], image: Image, mask: Bool[Array, "h w"], stain: Image) -> Image:
    """Blend a texture into the image within the mask."""
    weight = draws.between(jax.random.uniform(key), 1, _FAINTEST)
    return jnp.where(mask[..., None], image + weight * (stain - image), image)


def _deform(
    key: Key[Array, ""], image: Image, mask: Bool[Array, "h w"], noise: Float[Array, "h w"], encoding: str
) -> Image:
    """Make a bump or a dent of the noise within the mask."""
    up, slope, height = draws.uniform(key, (), (), ())
    t = jnp.clip((noise - _THRESHOLD) / _FULL, 0, 1)
    profile = t**2 * (3 - 2 * t)
    sign = jnp.where(up < 0.5, 1, -1)
    slope = jnp.tan(jnp.radians(draws.log_between(slope, *_SLOPE)))
    height = draws.log_between(height, *_HEIGHT)
    return relief.emboss(image, mask, profile, sign * slope, sign * height, encoding)
