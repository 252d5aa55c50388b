"""Pastes synthetic defects into prepared images, whose masks have the size of anomaly maps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from iumad_jax.data import transforms
from iumad_jax.shapes import MAP_SIZE, Keys, Modality
from iumad_jax.synthetic import Defective, make_defects, relief


def paste(
    keys: Keys,
    images: dict[Modality, Float[Array, "b h w 3"]],
    foreground: Bool[Array, "b m m"] | None,
    depth_encoding: str,
    confined: bool = True,
) -> Defective:
    """Paste a synthetic defect into each good image, as `make_defects` does; masks have the size of anomaly maps.

    Textures may be cut from the next image of the batch.

    Args:
        keys: One random key per image.
        images: Good images by modality, square, 0..255.
        foreground: Pixels where defects may lie, see `transforms.foreground`; None allows all.
        depth_encoding: Encoding of the depth images.
        confined: Whether defects are small discs; see `make_defects`.

    Raises:
        UserError: If the depth encoding cannot show bumps and dents.
    """
    if "depth" in images:
        relief.check_encoding(depth_encoding)
    size = next(iter(images.values())).shape[1]
    allowed = None if foreground is None else jax.vmap(lambda mask: transforms.resize_nearest(mask, size))(foreground)
    others = jnp.roll(images["rgb"], 1, axis=0) if "rgb" in images and len(keys) > 1 else None
    made = make_defects(keys, images, allowed, depth_encoding, confined, others)
    mask = jax.vmap(lambda mask: transforms.resize_nearest(mask, MAP_SIZE))(made.mask)
    return made._replace(mask=mask)
