"""CDAD (Li et al., CVPR 2025): a latent diffusion model, guided by an anomaly-masked network.

The guide rebuilds each token of the image without its neighbourhood, and learns to repair corrupted images. It runs
once per image; what it returns is added to the output of the UNet's first convolution.

Our choices: the latents are principal components of frozen features, see `latents`, in which corruption copies
rectangles; each image is corrupted with probability 1/2 in each update. Against forgetting, see `continual.isvd`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.diffusion import Latent, from_guided, sizes_of
from iumad_jax.methods.latents import root_mean_square
from iumad_jax.methods.method import Method
from iumad_jax.models.diffusion import AnomalyMasked, Guidance, LatentHint, Sizes, UNet
from iumad_jax.shapes import Scalars

_PATCHES = 4  # at most, in a corrupted image
_HALF_SIDE = (0.03, 0.4)  # half of a patch's side, in image sides

Seen = tuple[Float[Array, "g g d"], Float[Array, "g g d"]]  # output of the guide, and what its attention received


class Network(nn.Module):
    """UNet and guide of a modality, for one image."""

    sizes: Sizes
    layers: int
    hidden: int
    neighbourhood: int
    dropout: float
    target_gradient: bool

    def setup(self) -> None:
        """Create both networks."""
        hint = LatentHint(self.sizes.channels[0], zero=False, bias=False)
        self.unet = UNet(self.sizes)
        self.guide = AnomalyMasked(hint, self.layers, self.sizes.heads, self.hidden, self.neighbourhood, self.dropout)

    def look(self, z: Latent, deterministic: bool) -> Seen:
        """Run the guide."""
        return self.guide(z, deterministic=deterministic)

    def __call__(self, z: Latent, level: Int[Array, ""], seen: Seen) -> Latent:
        """Predict the noise of a latent."""
        return self.unet(z, level, None, Guidance(start=seen[0]))

    def own_losses(self, z: Latent, seen: Seen) -> Scalars:
        """Compare the guide's output with the features of the clean latent."""
        clean = self.guide.hint(z)
        clean = clean if self.target_gradient else jax.lax.stop_gradient(clean)
        return {"masked": jnp.mean(jnp.square(seen[0] - clean))}

    def everything(self, z: Latent) -> Latent:
        """Run all layers, to initialise them."""
        return self(z, jnp.int32(0), self.look(z, True))


def cdad(config: ConfigDict) -> Method:
    """Build the method for a run's config, of which it uses `diffusion`, `backbone` and `modality`.

    Raises:
        UserError: If a value of these is unknown, or sizes do not fit each other.
    """
    settings = config.diffusion
    if config.backbone.grid <= settings.masked.neighbourhood:
        raise UserError(
            f"config.diffusion.masked.neighbourhood is {settings.masked.neighbourhood}, which hides all"
            f" {config.backbone.grid} x {config.backbone.grid} tokens; use less, or a larger config.backbone.grid."
        )
    masked = settings.masked
    network = Network(
        sizes_of(settings), masked.layers, masked.hidden, masked.neighbourhood, masked.dropout, masked.target_gradient
    )

    def corrupt_some(key: Key[Array, ""], z: Latent) -> Latent:
        chosen, key = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chosen, masked.corruption), corrupt(key, z), z)

    return from_guided(network, config, difference=root_mean_square, score=largest, corrupt=corrupt_some)


def corrupt(key: Key[Array, ""], z: Latent) -> Latent:
    """Copy one to four rectangles of a latent to other places in it, each further one with probability 1/2."""
    side, source = len(z), z
    places = jnp.arange(side)
    for i, patch in enumerate(jax.random.split(key, _PATCHES)):
        size_key, from_key, to_key, chance = jax.random.split(patch, 4)
        half = side * jax.random.uniform(size_key, (2,), minval=_HALF_SIDE[0], maxval=_HALF_SIDE[1])
        half = jnp.maximum(half, 0.5)  # a token at least
        centre = jax.random.uniform(to_key, (2,)) * side
        origin = half + jax.random.uniform(from_key, (2,)) * (side - 2 * half)  # so that the source is all inside
        moved = jnp.clip(places + jnp.round(origin - centre).astype(int)[:, None], 0, side - 1)
        inside = jnp.abs(places + 0.5 - centre[:, None]) <= half[:, None]
        pasted = (i == 0) | jax.random.bernoulli(chance)
        z = jnp.where((inside[0][:, None] & inside[1] & pasted)[..., None], source[moved[0]][:, moved[1]], z)
    return z


def largest(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the largest value of each map."""
    return maps.max((1, 2))
