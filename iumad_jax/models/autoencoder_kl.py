"""The autoencoder of latent diffusion models (Rombach et al., CVPR 2022): KL-f8, as in Stable Diffusion.

Modules process one image, channels last; use `jax.vmap` for batches. Names of modules and parameters are those of
`diffusers`, with underscores for its dots.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

LOG_VARIANCE = -30.0, 20.0  # its limits


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=1e-6, use_fast_variance=False, reduction_axes=(-3, -2, -1), name=name)


def _conv3x3(channels: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), name=name)


class Residual(nn.Module):
    """Two 3 x 3 convolutions, added to the input or, if the channels differ, to its projection."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w d"]:
        """Apply the block."""
        y = _conv3x3(self.channels, "conv1")(nn.silu(_norm(self.groups, "norm1")(x)))
        y = _conv3x3(self.channels, "conv2")(nn.silu(_norm(self.groups, "norm2")(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), name="conv_shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Attention with a single head over the positions of a map, added to its input."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Apply the layer."""
        channels = x.shape[-1]
        tokens = _norm(self.groups, "group_norm")(x).reshape(-1, channels)
        q, k, v = (nn.Dense(channels, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        attended = nn.softmax(q @ k.T * channels**-0.5) @ v
        return x + nn.Dense(channels, name="to_out_0")(attended).reshape(x.shape)


class Middle(nn.Module):
    """The layers on the coarsest level."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Apply the layers."""
        x = Residual(x.shape[-1], self.groups, name="resnets_0")(x)
        x = Attention(self.groups, name="attentions_0")(x)
        return Residual(x.shape[-1], self.groups, name="resnets_1")(x)


class Sampled(nn.Module):
    """The convolution that halves or doubles the sides of a map."""

    up: bool

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "i j c"]:
        """Repeat every pixel and convolve, or convolve at every second pixel, padded below and on the right alone."""
        if self.up:
            return _conv3x3(x.shape[-1], "conv")(x.repeat(2, 0).repeat(2, 1))
        return nn.Conv(x.shape[-1], (3, 3), 2, padding=((0, 1), (0, 1)), name="conv")(x)


class Level(nn.Module):
    """Residual blocks of equal channels and, except on the last level, `Sampled`."""

    channels: int
    groups: int
    blocks: int
    up: bool
    last: bool

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "i j d"]:
        """Apply the blocks."""
        for i in range(self.blocks):
            x = Residual(self.channels, self.groups, name=f"resnets_{i}")(x)
        if self.last:
            return x
        return Sampled(self.up, name="upsamplers_0" if self.up else "downsamplers_0")(x)


class Encoder(nn.Module):
    """From an image to the parameters of its latents' distribution, before their last convolution."""

    channels: Sequence[int]
    latent: int
    groups: int

    @nn.compact
    def __call__(self, image: Float[Array, "h w 3"]) -> Float[Array, "i j c"]:
        """Encode."""
        x = _conv3x3(self.channels[0], "conv_in")(image)
        for i, channels in enumerate(self.channels):
            last = i == len(self.channels) - 1
            x = Level(channels, self.groups, 2, up=False, last=last, name=f"down_blocks_{i}")(x)
        x = Middle(self.groups, name="mid_block")(x)
        return _conv3x3(2 * self.latent, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


class Decoder(nn.Module):
    """From latents, after their first convolution, to an image."""

    channels: Sequence[int]
    groups: int

    @nn.compact
    def __call__(self, latent: Float[Array, "i j c"]) -> Float[Array, "h w 3"]:
        """Decode."""
        x = Middle(self.groups, name="mid_block")(_conv3x3(self.channels[-1], "conv_in")(latent))
        for i, channels in enumerate(reversed(self.channels)):
            last = i == len(self.channels) - 1
            x = Level(channels, self.groups, 3, up=True, last=last, name=f"up_blocks_{i}")(x)
        return _conv3x3(3, "conv_out")(nn.silu(_norm(self.groups, "conv_norm_out")(x)))


class AutoencoderKL(nn.Module):
    """An encoder to a normal distribution of latents, and a decoder; the latents are not scaled.

    Attributes:
        channels: Channels of the levels, the finest first; each level halves the sides of the one before.
        latent: Channels of the latents.
        groups: Groups of the group norms; they divide the channels.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    latent: int = 4
    groups: int = 32

    def setup(self) -> None:
        """Create the parts."""
        self.encoder = Encoder(self.channels, self.latent, self.groups)
        self.decoder = Decoder(self.channels, self.groups)
        self.quant_conv = nn.Conv(2 * self.latent, (1, 1))
        self.post_quant_conv = nn.Conv(self.latent, (1, 1))

    def __call__(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
        """Decode the mean of the image's latents; sides that are no multiples of the smallest map's become so."""
        return self.decode(self.encode(image)[0])

    def encode(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "i j c"], Float[Array, "i j c"]]:
        """Return mean and log-variance of the latents of an image (Stable Diffusion: -1..1)."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, latent: Float[Array, "i j c"]) -> Float[Array, "h w 3"]:
        """Return the image of latents, not clipped."""
        return self.decoder(self.post_quant_conv(latent))
