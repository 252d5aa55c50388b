"""DiAD (He et al., AAAI 2024): a latent diffusion model, guided by a network that sees the image.

Only the guide's coarse outputs reach the UNet. The guide's spatial-aware fusion (SFF) lets its finer outputs take part.

Our choices: without weights of Stable Diffusion, latents are principal components of frozen features, see `latents`,
and the whole UNet is trained; with them, its way up, as in the release. SFF's convolutions start at random: in the
release, they and what they multiply start at zero and stay there.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.diffusion import Latent, View, from_guided, sizes_of
from iumad_jax.methods.latents import cosine_distance
from iumad_jax.methods.method import Method
from iumad_jax.methods.pixels import space_of
from iumad_jax.models.diffusion import Context, SemanticGuide, Sizes, UNet
from iumad_jax.shapes import Scalars

_POOLED = 8  # poolings over 8 x 8 pixels that an image score takes the largest value of


class Network(nn.Module):
    """UNet and guide of a modality, for one image."""

    sizes: Sizes
    hint: Callable[[int, bool, bool], nn.Module]
    fuse: bool

    def setup(self) -> None:
        """Create both networks."""
        self.unet = UNet(self.sizes)
        self.guide = SemanticGuide(self.sizes, self.hint(self.sizes.channels[0], True, True), self.fuse)

    def look(self, view: View, deterministic: bool) -> View:
        """Return what the guide needs at each level of noise: all that it sees."""
        return view

    def __call__(self, z: Latent, level: Int[Array, ""], seen: View, context: Context | None) -> Latent:
        """Predict the noise of a latent."""
        return self.unet(z, level, context, self.guide(z, level, context, seen))

    def own_losses(self, view: View, seen: View) -> Scalars:
        """Return no further losses."""
        return {}

    def everything(self, z: Latent, view: View, context: Context | None) -> Latent:
        """Run all layers, to initialise them."""
        return self(z, jnp.int32(0), view, context)


def diad(config: ConfigDict) -> Method:
    """Build the method for a run's config, of which it uses `diffusion`, `backbone` and `modality`.

    Raises:
        UserError: If a value of these is unknown, or sizes do not fit each other.
    """

    def begin(params: Any) -> Any:
        """Let the guide begin as a copy of the UNet's way down."""
        shared = set(params["unet"]) & set(params["guide"])
        return params | {"guide": params["guide"] | {name: params["unet"][name] for name in shared}}

    sizes = sizes_of(config)
    if config.diffusion.sff and len(sizes.channels) < 2:
        raise UserError(
            f'config.diffusion.channels is "{config.diffusion.channels}", but the fusion of two levels needs two; add'
            " one, or set --config.diffusion.sff=False."
        )
    space = space_of(config, sizes)
    return from_guided(
        Network(sizes, space.hint, config.diffusion.sff),
        space,
        config,
        difference=cosine_distance,
        score=pooled_maximum,
        begin=begin,
        trained=lambda path: path[0].startswith(("up_blocks", "conv_norm_out", "conv_out")),
    )


def pooled_maximum(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the largest value after 8 average poolings over 8 x 8 pixels."""
    for _ in range(_POOLED):
        maps = nn.avg_pool(maps[..., None], (8, 8))[..., 0]
    return maps.max((1, 2))
