"""CDAD (Li et al., CVPR 2025): a latent diffusion model, guided by an anomaly-masked network.

The guide rebuilds each token of the image without its neighbourhood, and learns to repair corrupted images. It runs
once per image; what it returns is added to the output of the UNet's first convolution.

Our choices: without weights of Stable Diffusion, latents are principal components of frozen features, see `latents`.
Each image is corrupted with probability 1/2 in each update. Against forgetting, see `continual.isvd`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.diffusion import OF_THE_LEVEL, Latent, View, from_guided, sizes_of
from iumad_jax.methods.latents import root_mean_square
from iumad_jax.methods.method import Method
from iumad_jax.methods.pixels import space_of
from iumad_jax.models.diffusion import AnomalyMasked, Context, Guidance, Sizes, UNet
from iumad_jax.shapes import Scalars

Seen = tuple[Float[Array, "g g d"], Float[Array, "g g d"]]  # output of the guide, and what its attention received


class Network(nn.Module):
    """UNet and guide of a modality, for one image."""

    sizes: Sizes
    hint: Callable[[int, bool, bool], nn.Module]
    layers: int
    hidden: int
    neighbourhood: int
    dropout: float
    target_gradient: bool

    def setup(self) -> None:
        """Create both networks."""
        hint = self.hint(self.sizes.channels[0], False, False)
        self.unet = UNet(self.sizes)
        self.guide = AnomalyMasked(hint, self.layers, self.sizes.heads, self.hidden, self.neighbourhood, self.dropout)

    def look(self, view: View, deterministic: bool) -> Seen:
        """Run the guide."""
        return self.guide(view, deterministic=deterministic)

    def __call__(self, z: Latent, level: Int[Array, ""], seen: Seen, context: Context | None) -> Latent:
        """Predict the noise of a latent."""
        return self.unet(z, level, context, Guidance(start=seen[0]))

    def own_losses(self, view: View, seen: Seen) -> Scalars:
        """Compare the guide's output with the embedding of the clean image."""
        clean = self.guide.hint(view)
        clean = clean if self.target_gradient else jax.lax.stop_gradient(clean)
        return {"masked": jnp.mean(jnp.square(seen[0] - clean))}

    def everything(self, z: Latent, view: View, context: Context | None) -> Latent:
        """Run all layers, to initialise them."""
        return self(z, jnp.int32(0), self.look(view, True), context)


def cdad(config: ConfigDict) -> Method:
    """Build the method for a run's config, of which it uses `diffusion`, `backbone` and `modality`.

    Raises:
        UserError: If a value of these is unknown, or sizes do not fit each other.
    """
    masked, sizes = config.diffusion.masked, sizes_of(config)
    in_pixels = config.diffusion.space == "pixels"
    space = space_of(config, sizes)
    if masked.neighbourhood % 2 == 0:
        raise UserError(
            f"config.diffusion.masked.neighbourhood is {masked.neighbourhood}, an even side, in whose middle no token"
            " lies; use an odd number."
        )
    side = config.input.size // 8 if in_pixels else config.backbone.grid
    if side <= masked.neighbourhood:
        raise UserError(
            f"config.diffusion.masked.neighbourhood is {masked.neighbourhood}, which hides all {side} x {side} tokens"
            f" from some; use less, or a larger config.{'input.size' if in_pixels else 'backbone.grid'}."
        )
    network = Network(
        sizes, space.hint, masked.layers, masked.hidden, masked.neighbourhood, masked.dropout, masked.target_gradient
    )
    return from_guided(
        network,
        space,
        config,
        difference=root_mean_square,
        score=largest,
        corrupt=corruption(masked.corruption, space.corrupt),
        trained=lambda path: path[-1] == "kernel" and not OF_THE_LEVEL & set(path),
    )


def corruption(probability: float, corrupt: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the function (key, view) -> view that corrupts a share of all images."""

    def corrupt_some(key: Key[Array, ""], view: View) -> View:
        chosen, key = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chosen, probability), corrupt(key, view), view)

    return corrupt_some


def largest(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the largest value of each map."""
    return maps.max((1, 2))
