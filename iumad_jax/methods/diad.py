"""DiAD (He et al., AAAI 2024): a latent diffusion model, guided by a network that sees the image.

Only the guide's coarse outputs reach the UNet. The guide's spatial-aware fusion (SFF) lets its finer outputs take part.

Our choices: the latents are principal components of frozen features, see `latents`, and the whole UNet is trained.
SFF's convolutions start at random: in the release they and what they multiply start at zero, and stay there.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from iumad_jax.methods.diffusion import Latent, from_guided, sizes_of
from iumad_jax.methods.latents import cosine_distance
from iumad_jax.methods.method import Method
from iumad_jax.models.diffusion import LatentHint, SemanticGuide, Sizes, UNet
from iumad_jax.shapes import Scalars

_POOLED = 8  # poolings over 8 x 8 pixels that an image score takes the largest value of


class Network(nn.Module):
    """UNet and guide of a modality, for one image."""

    sizes: Sizes
    fuse: bool

    def setup(self) -> None:
        """Create both networks."""
        self.unet = UNet(self.sizes)
        self.guide = SemanticGuide(self.sizes, LatentHint(self.sizes.channels[0], zero=True), self.fuse)

    def look(self, z: Latent, deterministic: bool) -> Latent:
        """Return what the guide needs at each level of noise: the latent of the image."""
        return z

    def __call__(self, z: Latent, level: Int[Array, ""], seen: Latent) -> Latent:
        """Predict the noise of a latent."""
        return self.unet(z, level, None, self.guide(z, level, None, seen))

    def own_losses(self, z: Latent, seen: Latent) -> Scalars:
        """Return no further losses."""
        return {}

    def everything(self, z: Latent) -> Latent:
        """Run all layers, to initialise them."""
        return self(z, jnp.int32(0), z)


def diad(config: ConfigDict) -> Method:
    """Build the method for a run's config, of which it uses `diffusion`, `backbone` and `modality`.

    Raises:
        UserError: If a value of these is unknown, or sizes do not fit each other.
    """

    def begin(params: Any) -> Any:
        """Let the guide begin as a copy of the UNet's way down."""
        return params | {"guide": params["guide"] | {name: params["unet"][name] for name in _shared(params)}}

    return from_guided(
        Network(sizes_of(config.diffusion), config.diffusion.sff),
        config,
        difference=cosine_distance,
        score=pooled_maximum,
        begin=begin,
    )


def _shared(params: Any) -> set[str]:
    return set(params["unet"]) & set(params["guide"])


def pooled_maximum(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the largest value after 8 average poolings over 8 x 8 pixels."""
    for _ in range(_POOLED):
        maps = nn.avg_pool(maps[..., None], (8, 8))[..., 0]
    return maps.max((1, 2))
