"""IUF's class network, which recognises the object in an image and conditions the reconstruction on it.

Modules process one image; use `jax.vmap` for batches.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import Attention, pool_to_grid
from iumad_jax.models.object_head import ObjectHead
from iumad_jax.shapes import Condition, Image, Logits


def pooled_pixels(image: Image, side: int) -> Float[Array, "s 3"]:
    """Average an image (0..255) to side * side pixels with values from -1 to 1."""
    return pool_to_grid(image / 127.5 - 1, side)


def identity_statistics() -> dict[str, Array]:
    """Return the statistics of no pixels: zero mean and unit covariance, which leave pixels unchanged."""
    return {"count": jnp.zeros(()), "mean": jnp.zeros(3), "covariance": jnp.eye(3)}


class Stem(nn.Module):
    """1 x 1 convolution, batch norm and ReLU.

    The convolution is linear in the three colour channels, so the mean and variance of its outputs follow from the mean
    and covariance of the colours. These are gathered over all images of the base step and replace batch statistics and
    running averages: the output depends neither on the batch nor on the number of devices, and training and inference
    agree.
    """

    width: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "s 3"]) -> Float[Array, "s d"]:
        """Compute normalised features of each pixel."""
        colours = self.variable("statistics", "colours", identity_statistics).value
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, self.width))
        scale = self.param("scale", nn.initializers.ones, self.width)
        bias = self.param("bias", nn.initializers.zeros, self.width)  # a bias of the convolution would cancel out
        variance = jnp.einsum("cd,ce,ed->d", kernel, colours["covariance"], kernel)
        normalised = (pixels - colours["mean"][None]) @ kernel / jnp.sqrt(variance + 1e-5)[None]
        return nn.relu(normalised * scale[None] + bias[None]).astype(pixels.dtype)


class RowBlock(nn.Module):
    """A pre-norm transformer block whose attention runs along each row of the grid."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "s s d"]) -> Float[Array, "s s d"]:
        """Apply the block."""
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x)
        x = x + Attention(self.heads, dropout=0.0, name="attention")(normed, normed, normed, deterministic=True)
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_2")(x)
        hidden = nn.gelu(nn.Dense(self.hidden, name="hidden")(normed), approximate=False)
        return x + nn.Dense(x.shape[-1], name="output")(hidden)


class ClassNetwork(nn.Module):
    """Classifier of the object; the outputs of its blocks condition the reconstruction."""

    grid: int
    width: int = 256
    blocks: int = 4
    side: int = 56
    heads: int = 4
    hidden: int = 128

    @nn.compact
    def __call__(self, image: Image) -> tuple[Condition, Logits]:
        """Return one condition of grid * grid tokens per block, and the object logits, of an image (0..255)."""
        pixels = pooled_pixels(image, self.side)
        x = Stem(self.width, name="stem")(pixels).reshape(self.side, self.side, self.width)
        condition = []
        for i in range(self.blocks):
            x = RowBlock(self.heads, self.hidden, name=f"block_{i}")(x)
            condition.append(pool_to_grid(x, self.grid))
        hidden = nn.relu(nn.Dense(self.width, name="head_hidden")(x.mean((0, 1))))
        return tuple(condition), ObjectHead(name="head")(hidden)
