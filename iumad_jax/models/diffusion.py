"""The latent diffusion model of Stable Diffusion 1.5 (Rombach et al., CVPR 2022), and how DiAD and CDAD guide it.

Modules process one image, channels last; use `jax.vmap` for batches. Their parameters have the names that `diffusers`
gives them, with "_" before a number and between levels of modules.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from iumad_jax.models.layers import DenseWithMean
from iumad_jax.models.reconstruction import Layers, neighbour_mask

LEVELS_OF_NOISE = 1000
_LARGEST = 901  # level at which sampling begins, even from an image with more noise, as in both releases
_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, LEVELS_OF_NOISE) ** 2
KEPT = np.cumprod(1 - _BETAS)  # share of the variance that is the latent's, by level of noise, in float64

Latent = Float[Array, "h w c"]
Context = Float[Array, "q width"]  # embedding of a text


class Sizes(NamedTuple):
    """Sizes of a UNet; the defaults are those of Stable Diffusion 1.5.

    Attributes:
        channels: Channels of each level, the finest first. A level has half the side of the one before.
        blocks: Residual blocks of a level on the way down; one more on the way up.
        attending: Levels with transformers, and with them the middle.
        heads: Heads of attention.
        groups: Groups of group norm.
        latent: Channels of the latent.
        cross: Whether transformers attend to a context.
        remat: Whether gradients recompute the blocks' values, which saves memory.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    attending: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    groups: int = 32
    latent: int = 4
    cross: bool = True
    remat: bool = False


class Guidance(NamedTuple):
    """What is added inside of a UNet.

    Attributes:
        start: To the output of the first convolution.
        middle: To the output of the middle.
        coarsest: To the skips of the coarsest level, in the order of the way down.
    """

    start: Float[Array, "h w c"] | None = None
    middle: Float[Array, "h w c"] | None = None
    coarsest: tuple[Float[Array, "h w c"], ...] = ()


def add_noise(z: Float[Array, "*n"], noise: Float[Array, "*n"], level: Int[Array, ""] | int) -> Float[Array, "*n"]:
    """Return the latent with noise of a level from 0 to 999."""
    kept = jnp.asarray(KEPT, jnp.float32)[level]
    return jnp.sqrt(kept) * z + jnp.sqrt(1 - kept) * noise


def target(z: Float[Array, "*n"], noise: Float[Array, "*n"], level: Int[Array, ""], kind: str) -> Float[Array, "*n"]:
    """Return what a network predicts: the noise, or v (Salimans and Ho, ICLR 2022) if `kind` is "v"."""
    return noise if kind == "noise" else add_noise(noise, -z, level)


def sampling_levels(steps: int, start: int) -> Int[np.ndarray, " steps"]:
    """Return the levels of noise of DDIM; the published ones for 10 steps from 999: 901, 801, ..., 1."""
    return np.linspace(min(start, _LARGEST), 1, steps).round().astype(np.int32)


def ddim(
    predict: Callable[[Float[Array, "*n"], Int[Array, ""]], Float[Array, "*n"]],
    z: Float[Array, "*n"],
    levels: Int[np.ndarray, " steps"],
    kind: str = "noise",
) -> tuple[Float[Array, "*n"], Float[Array, "steps *n"]]:
    """Denoise without randomness (Song et al., ICLR 2021).

    Args:
        predict: (latent with noise, level) -> what the network predicts, see `target`.
        z: Latent with the noise of the first level.
        levels: Falling levels of noise. The last step ends at level 0.
        kind: "noise" or "v".

    Returns:
        The latent with the noise of level 0, and what the network received at each step.
    """

    def step(z: Float[Array, "*n"], level_and_kept: tuple[Any, ...]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        level, now, following = level_and_kept
        output = predict(z, level)
        signal, spread = jnp.sqrt(now), jnp.sqrt(1 - now)
        noise = output if kind == "noise" else signal * output + spread * z
        clean = (z - spread * noise) / signal
        return jnp.sqrt(following) * clean + jnp.sqrt(1 - following) * noise, z

    kept = KEPT[np.append(levels, 0)].astype(np.float32)
    return jax.lax.scan(step, z, (jnp.asarray(levels), jnp.asarray(kept[:-1]), jnp.asarray(kept[1:])))


def embed_level(level: Int[Array, ""] | Float[Array, ""], width: int) -> Float[Array, " width"]:
    """Embed a level of noise: cosines, then sines."""
    angles = level * jnp.exp(-math.log(10_000) * jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def _group_norm(groups: int, name: str, epsilon: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=epsilon, reduction_axes=(-3, -2, -1), use_fast_variance=False, name=name)


def _conv(
    channels: int, name: str, *, size: int = 3, stride: int = 1, zero: bool = False, bias: bool = True
) -> nn.Conv:
    padding = size // 2, size // 2
    init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    return nn.Conv(channels, (size, size), stride, (padding, padding), use_bias=bias, kernel_init=init, name=name)


class ResBlock(nn.Module):
    """Residual block with two convolutions, which also receives the level of noise."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"], level: Float[Array, " e"]) -> Float[Array, "h w d"]:
        """Transform the image."""
        h = _conv(self.channels, "conv1")(nn.silu(_group_norm(self.groups, "norm1")(x)))
        h += nn.Dense(self.channels, name="time_emb_proj")(nn.silu(level)).reshape(1, 1, -1)
        h = _conv(self.channels, "conv2", zero=True)(nn.silu(_group_norm(self.groups, "norm2")(h)))
        return h + (x if x.shape == h.shape else _conv(self.channels, "conv_shortcut", size=1)(x))


class _Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "p c"], source: Float[Array, "q d"]) -> Float[Array, "p c"]:
        width = x.shape[-1]

        def project(values: Array, name: str) -> Float[Array, "heads n dh"]:
            projected = nn.Dense(width, use_bias=False, name=name)(values)
            return projected.reshape(len(values), self.heads, -1).swapaxes(0, 1)

        q, k, v = project(x, "to_q"), project(source, "to_k"), project(source, "to_v")
        scores = (q @ k.swapaxes(1, 2)).astype(jnp.float32) / math.sqrt(q.shape[-1])
        attended = nn.softmax(scores).astype(v.dtype) @ v
        return nn.Dense(width, name="to_out_0")(attended.swapaxes(0, 1).reshape(-1, width))


class _Gated(nn.Module):
    """Linear layer whose output is gated by GELU of another."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "p c"]) -> Float[Array, "p d"]:
        value, gate = jnp.split(nn.Dense(2 * self.width, name="proj")(x), 2, axis=-1)
        return value * nn.gelu(gate, approximate=False)


class _FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "p c"]) -> Float[Array, "p c"]:
        return DenseWithMean(x.shape[-1], name="net_2")(_Gated(4 * x.shape[-1], name="net_0")(x))


class _TransformerBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "p c"], context: Context | None) -> Float[Array, "p c"]:
        def norm(name: str) -> Float[Array, "p c"]:
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)

        normalised = norm("norm1")
        x += _Attention(self.heads, name="attn1")(normalised, normalised)
        if context is not None:
            x += _Attention(self.heads, name="attn2")(norm("norm2"), context)
        return x + _FeedForward(name="ff")(norm("norm3"))


class Transformer(nn.Module):
    """Transformer over the pixels of a map, and over the context if there is one."""

    heads: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"], context: Context | None) -> Float[Array, "h w c"]:
        """Transform the map."""
        tokens = _conv(x.shape[-1], "proj_in", size=1)(_group_norm(self.groups, "norm", 1e-6)(x))
        tokens = tokens.reshape(-1, x.shape[-1])
        tokens = _TransformerBlock(self.heads, name="transformer_blocks_0")(tokens, context)
        return x + _conv(x.shape[-1], "proj_out", size=1, zero=True)(tokens.reshape(x.shape))


class _Resampling(nn.Module):
    """Convolution that halves the side, or follows an enlargement to another size."""

    size: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "i j c"]:
        if self.size is None:
            return _conv(x.shape[-1], "conv", stride=2)(x)
        rows, columns = (np.arange(new) * old // new for new, old in zip(self.size, x.shape, strict=False))
        return _conv(x.shape[-1], "conv")(x[rows][:, columns])


class _Down(nn.Module):
    sizes: Sizes
    level: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "h w c"], noise: Float[Array, " e"], context: Context | None
    ) -> tuple[Float[Array, "i j d"], tuple[Array, ...]]:
        """Return the output and the skips, of which the last one equals the output."""
        skips = []
        for i in range(self.sizes.blocks):
            x = ResBlock(self.sizes.channels[self.level], self.sizes.groups, name=f"resnets_{i}")(x, noise)
            if self.level in self.sizes.attending:
                x = Transformer(self.sizes.heads, self.sizes.groups, name=f"attentions_{i}")(x, context)
            skips.append(x)
        if self.level < len(self.sizes.channels) - 1:
            x = _Resampling(name="downsamplers_0")(x)
            skips.append(x)
        return x, tuple(skips)


class _Middle(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(
        self, x: Float[Array, "h w c"], noise: Float[Array, " e"], context: Context | None
    ) -> Float[Array, "h w c"]:
        channels, groups = self.sizes.channels[-1], self.sizes.groups
        x = ResBlock(channels, groups, name="resnets_0")(x, noise)
        x = Transformer(self.sizes.heads, groups, name="attentions_0")(x, context)
        return ResBlock(channels, groups, name="resnets_1")(x, noise)


class _Up(nn.Module):
    sizes: Sizes
    level: int
    size: tuple[int, int] | None  # of the output

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "h w c"],
        skips: tuple[Array, ...],
        noise: Float[Array, " e"],
        context: Context | None,
    ) -> Float[Array, "i j d"]:
        for i, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = ResBlock(self.sizes.channels[self.level], self.sizes.groups, name=f"resnets_{i}")(x, noise)
            if self.level in self.sizes.attending:
                x = Transformer(self.sizes.heads, self.sizes.groups, name=f"attentions_{i}")(x, context)
        return x if self.size is None else _Resampling(self.size, name="upsamplers_0")(x)


class _LevelEmbedding(nn.Module):
    """Embedding of the level of noise."""

    width: int

    @nn.compact
    def __call__(self, level: Int[Array, ""] | Float[Array, ""]) -> Float[Array, " e"]:
        hidden = nn.Dense(4 * self.width, name="linear_1")(embed_level(level, self.width))
        return nn.Dense(4 * self.width, name="linear_2")(nn.silu(hidden))


def _encode(
    sizes: Sizes, h: Float[Array, "h w c"], noise: Float[Array, " e"], context: Context | None
) -> tuple[Float[Array, "i j d"], tuple[Array, ...]]:
    """Run the way down and the middle, within a module; return the middle's output and all skips."""
    block = nn.remat(_Down) if sizes.remat else _Down
    skips: tuple[Array, ...] = (h,)
    for level in range(len(sizes.channels)):
        h, further = block(sizes, level, name=f"down_blocks_{level}")(h, noise, context)
        skips += further
    return _Middle(sizes, name="mid_block")(h, noise, context), skips


class UNet(nn.Module):
    """The network that predicts the noise of a latent (or v)."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self,
        z: Latent,
        level: Int[Array, ""] | Float[Array, ""],
        context: Context | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008
    ) -> Latent:
        """Predict.

        Args:
            z: Latent with noise. The coarsest level must have more than one pixel for DiAD's guidance.
            level: Level of noise, from 0 to 999.
            context: Embedding of the text; None without cross-attention.
            guidance: What a guide adds.
        """
        sizes = self.sizes
        noise = _LevelEmbedding(sizes.channels[0], name="time_embedding")(level)
        h = _conv(sizes.channels[0], "conv_in")(z)
        h = h if guidance.start is None else h + guidance.start
        h, skips = _encode(sizes, h, noise, context)
        h = h if guidance.middle is None else h + guidance.middle
        block = nn.remat(_Up) if sizes.remat else _Up
        for i, of_level in enumerate(reversed(range(len(sizes.channels)))):
            own, skips = skips[-sizes.blocks - 1 :], skips[: -sizes.blocks - 1]
            if i == 0 and guidance.coarsest:
                own = tuple(skip + added for skip, added in zip(own, guidance.coarsest, strict=True))
            size = (skips[-1].shape[0], skips[-1].shape[1]) if skips else None
            h = block(sizes, of_level, size, name=f"up_blocks_{i}")(h, own, noise, context)
        h = nn.silu(_group_norm(sizes.groups, "conv_norm_out")(h))
        return _conv(sizes.latent, "conv_out", zero=True)(h)


class PixelHint(nn.Module):
    """Convolutions from pixels to an eighth of their side, as in ControlNet (Zhang et al., ICCV 2023)."""

    channels: int
    zero: bool  # whether the output starts at zero
    bias: bool = True
    widths: tuple[int, ...] = (16, 32, 96, 256)

    @nn.compact
    def __call__(self, image: Float[Array, "h w 3"]) -> Float[Array, "i j c"]:
        """Transform a normalised image."""
        x = nn.silu(_conv(self.widths[0], "conv_in", bias=self.bias)(image))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = nn.silu(_conv(width, f"blocks_{2 * i}", bias=self.bias)(x))
            x = nn.silu(_conv(wider, f"blocks_{2 * i + 1}", stride=2, bias=self.bias)(x))
        return _conv(self.channels, "conv_out", zero=self.zero, bias=self.bias)(x)


class LatentHint(nn.Module):
    """Two convolutions of a latent, where there are no pixels."""

    channels: int
    zero: bool
    bias: bool = True

    @nn.compact
    def __call__(self, z: Latent) -> Float[Array, "h w d"]:
        """Transform a latent without noise."""
        hidden = nn.silu(_conv(self.channels, "conv_in", bias=self.bias)(z))
        return _conv(self.channels, "conv_out", zero=self.zero, bias=self.bias)(hidden)


class SemanticGuide(nn.Module):
    """DiAD's SG network: a copy of the UNet's way down that sees the image, with spatial-aware fusion (SFF).

    Of its outputs, only the coarsest reach the UNet, so that defects do not.
    """

    sizes: Sizes
    hint: Any  # PixelHint or LatentHint
    fuse: bool = True  # whether SFF adds the second coarsest level's outputs to the coarsest ones

    @nn.compact
    def __call__(
        self, z: Latent, level: Int[Array, ""] | Float[Array, ""], context: Context | None, image: Float[Array, "i j f"]
    ) -> Guidance:
        """Guide a UNet that sees the same latent with noise; `image` is the hint's input."""
        sizes = self.sizes
        noise = _LevelEmbedding(sizes.channels[0], name="time_embedding")(level)
        h = _conv(sizes.channels[0], "conv_in")(z) + self.hint(image)
        middle, skips = _encode(sizes, h, noise, context)
        each = sizes.blocks + 1  # outputs of a level: its downsampled input and its blocks' outputs
        outputs = [
            _conv(skips[i].shape[-1], f"controlnet_down_blocks_{i}", size=1, zero=True)(skips[i])
            for i in range(len(skips) - (2 * each if self.fuse else each), len(skips))
        ]
        coarsest = [self._fused(x, outputs[:-each], k) for k, x in enumerate(outputs[-each:])]
        middle = _conv(middle.shape[-1], "controlnet_mid_block", size=1, zero=True)(middle)
        return Guidance(None, middle, tuple(coarsest))

    def _fused(self, x: Float[Array, "h w c"], finer: list[Array], k: int) -> Float[Array, "h w c"]:
        total = x
        for j, source in enumerate(finer):
            reduced = _conv(x.shape[-1], f"fusion_{j}_{k}", stride=2, bias=False)(source)
            centred = reduced - reduced.mean((0, 1), keepdims=True)
            total += nn.silu(centred / jnp.sqrt(jnp.square(centred).mean((0, 1), keepdims=True) + 1e-5))
        return nn.silu(total)


class AnomalyMasked(nn.Module):
    """CDAD's anomaly-masked network: a transformer whose tokens do not see their neighbourhood."""

    hint: Any  # PixelHint or LatentHint
    layers: int = 8
    heads: int = 8
    hidden: int = 1025
    neighbourhood: int = 7  # side of what attention hides, in tokens
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self, image: Float[Array, "i j c"], *, deterministic: bool
    ) -> tuple[Float[Array, "h w d"], Float[Array, "h w d"]]:
        """Return what is added to the output of the UNet's first convolution, and what attention received."""
        embedded = self.hint(image)
        h, w, d = embedded.shape
        mask = neighbour_mask(h, self.neighbourhood)
        layers = Layers(self.heads, self.hidden, self.dropout, mask, deterministic)
        x = layers.encode(embedded.reshape(h * w, d), jnp.asarray(sine_positions(h, d), embedded.dtype), self.layers)
        return x.reshape(h, w, d), embedded


def sine_positions(grid: int, width: int) -> Float[np.ndarray, "p d"]:
    """Return sines and cosines of the positions in a square: half of the width for rows, half for columns."""
    half = width // 2
    angles = np.arange(1, grid + 1) / (grid + 1e-6) * 2 * np.pi
    angles = angles[:, None] / 10_000 ** (2 * (np.arange(half) // 2) / half)
    axis = np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles))
    shape = grid, grid, half
    rows, columns = np.broadcast_to(axis[:, None], shape), np.broadcast_to(axis[None], shape)
    return np.concatenate([rows, columns], axis=-1).reshape(grid**2, width).astype(np.float32)
