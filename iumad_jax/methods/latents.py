"""The space in which diffusion takes place: `Space`, and whitened principal components of the backbone's features.

These latents are a linear map of features, from statistics of the base step. Nothing is trained, so nothing is
forgotten. `methods.pixels` has the published space.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.error_maps import norm, upsample_errors
from iumad_jax.methods.mahalanobis import in_parts
from iumad_jax.methods.moments import Covariance, merge_covariance, no_covariance
from iumad_jax.models.backbone import chosen_levels, named
from iumad_jax.models.diffusion import LatentHint
from iumad_jax.shapes import Batch, Keys, Modality, Tokens, Variables

Components = dict[str, Any]  # moments, see `Covariance`; encode (f, c), decode (c, f)
Latents = Float[Array, "b h w c"]
Difference = Callable[[Float[Array, "*n f"], Float[Array, "*n f"]], Float[Array, "*n"]]  # of features, token by token

_PATCHES = 4  # at most, in a corrupted image
_HALF_SIDE = (0.03, 0.4)  # half of a patch's side, in image sides
_FLOOR = 1e-3  # added to the variances along the components, relative to their mean


class Space(NamedTuple):
    """Where diffusion takes place. All functions concern a batch in one modality m.

    Attributes:
        shape: (batch) -> shape (h, w, c) of a latent.
        hint: (channels, zero, bias) -> module that takes what the guide sees of an image, see `models.diffusion`.
        begin: (batch, m) -> statistics before any observation.
        observe: (statistics, batch, m) -> statistics. Called with the images of the base step.
        encode: (variables, batch, m, keys or None) -> latents; with keys, in training.
        view: (batch, m, latents) -> what the guide sees.
        corrupt: (key, what the guide sees of an image) -> the same, with a defect.
        published: (variables, batch, m, latents, rebuilt latents, difference) -> anomaly maps as published.
        fits: Whether errors are Mahalanobis distances of rebuilt latents, instead of the published maps.
        weights: () -> parameters of the UNet, `unet`, and what is neither trained nor stored: `context`, the embedding
            of the text, and further arrays that the functions above need. None if the UNet's parameters are drawn.
    """

    shape: Callable[[Batch], tuple[int, int, int]]
    hint: Callable[[int, bool, bool], Any]
    begin: Callable[[Batch, Modality], Any]
    observe: Callable[[Any, Batch, Modality], Any]
    encode: Callable[[Variables, Batch, Modality, Keys | None], Latents]
    view: Callable[[Batch, Modality, Latents], Any]
    corrupt: Callable[[Any, Any], Any]
    published: Callable[[Variables, Batch, Modality, Latents, Latents, Difference], Float[Array, "b m m"]]
    fits: bool
    weights: Callable[[], Any] | None = None


def feature_space(config: ConfigDict) -> Space:
    """Build the space of the frozen features for a run's config."""
    components = config.diffusion.latent
    channels = np.cumsum(channels_of_levels(config.backbone))[:-1]

    def shape(batch: Batch) -> tuple[int, int, int]:
        side = round(next(iter(batch.features.values())).shape[1] ** 0.5)
        return side, side, components

    def of_images(variables: Variables, batch: Batch, m: Modality, keys: Keys | None) -> Latents:
        return jax.vmap(functools.partial(encode, variables["statistics"]["space"][m]))(batch.features[m])

    def published(
        variables: Variables, batch: Batch, m: Modality, z: Latents, rebuilt: Latents, difference: Difference
    ) -> Float[Array, "b m m"]:
        decoded = (jax.vmap(functools.partial(decode, variables["statistics"]["space"][m]))(x) for x in (z, rebuilt))
        levels = zip(*(jnp.split(x, channels, axis=-1) for x in decoded), strict=True)
        return upsample_errors({m: functools.reduce(jnp.add, [difference(a, b) for a, b in levels])}).maps[m]

    return Space(
        shape,
        LatentHint,
        begin=lambda batch, m: no_components(batch.features[m].shape[-1], components),
        observe=lambda space, batch, m: observe(space, np.asarray(batch.features[m])),
        encode=of_images,
        view=lambda batch, m, z: z,
        corrupt=paste,
        published=published,
        fits=True,
    )


def no_components(features: int, latent: int) -> Components:
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


def observe(space: Components, features: Float[np.ndarray, "n p f"]) -> Components:
    """Update the space with further features."""
    moments = space["moments"]
    for part in in_parts(features):
        moments = merge_covariance(moments, np.asarray(part, np.float64).reshape(-1, part.shape[-1]))
    return _with_maps(moments, len(space["decode"]))


def _with_maps(moments: Covariance, latent: int) -> Components:
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


def encode(space: Components, tokens: Tokens) -> Float[Array, "g g c"]:
    """Return the latent of an image's features."""
    side = round(len(tokens) ** 0.5)
    with jax.default_matmul_precision("float32"):
        return ((tokens - space["moments"]["mean"][None]) @ space["encode"]).reshape(side, side, -1)


def decode(space: Components, z: Float[Array, "g g c"]) -> Tokens:
    """Return the z-scores of the features that a latent stands for."""
    with jax.default_matmul_precision("float32"):
        return z.reshape(-1, z.shape[-1]) @ space["decode"]


def channels_of_levels(backbone: ConfigDict) -> list[int]:
    """Return the number of channels of each level of `config.backbone`, in the order of the features."""
    architecture = named(backbone.name).architecture
    channels = dict(zip(architecture.levels, architecture.channels_of_levels, strict=True))
    return [channels[level] for level in chosen_levels(backbone.name, backbone.levels)]


def _as_it_is(image: Any, copy: Any, inside: Any, half: Any) -> Any:
    return copy


def paste(
    key: Key[Array, ""], image: Float[Array, "h w c"], blend: Callable[[Any, Any, Any, Any], Any] = _as_it_is
) -> Float[Array, "h w c"]:
    """Copy one to four rectangles of an image to other places in it, each further one with probability 1/2.

    Args:
        key: Random key.
        image: Square image, or latent.
        blend: (image, what is copied to each pixel, mask of the rectangle, half of its sides) -> what is pasted.
    """
    side, source = len(image), image
    places = jnp.arange(side)
    for i, patch in enumerate(jax.random.split(key, _PATCHES)):
        size_key, from_key, to_key, chance = jax.random.split(patch, 4)
        half = side * jax.random.uniform(size_key, (2,), minval=_HALF_SIDE[0], maxval=_HALF_SIDE[1])
        half = jnp.maximum(half, 0.5)  # a token at least
        centre = jax.random.uniform(to_key, (2,)) * side
        origin = half + jax.random.uniform(from_key, (2,)) * (side - 2 * half)  # so that the source is all inside
        shift = jnp.round(origin - centre).astype(int)
        rows, columns = (jnp.clip(places + shift[axis], 0, side - 1) for axis in (0, 1))
        near = [jnp.abs(places + 0.5 - centre[axis]) <= half[axis] for axis in (0, 1)]
        inside = jnp.outer(near[0], near[1])
        pasted = blend(image, source[rows][:, columns], inside, half)
        chosen = inside & ((i == 0) | jax.random.bernoulli(chance))
        image = jnp.where(chosen[..., None], pasted, image)
    return image


def cosine_distance(a: Float[Array, "*n f"], b: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """Compute 1 minus the cosine of the angle between vectors."""
    lengths = jnp.maximum(norm(a) * norm(b), 1e-8)
    return 1 - jnp.sum(a * b, axis=-1) / lengths


def root_mean_square(a: Float[Array, "*n f"], b: Float[Array, "*n f"]) -> Float[Array, "*n"]:
    """Compute the root of the mean square of the difference of vectors."""
    return norm(a - b) / a.shape[-1] ** 0.5
