"""IUF's class network: learns what object it sees, so that objects do not interfere.

Modules take one image; batches are made with `jax.vmap`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import Attention, pool_to_grid
from iumad_jax.shapes import Condition, Image, Logits


def pooled_pixels(image: Image, side: int) -> Float[Array, "s 3"]:
    """An image (0..255) as side * side colours, about -1 to 1."""
    return pool_to_grid(image / 127.5 - 1, side)


def no_colours() -> dict[str, Array]:
    """The statistics of no pixels, which leave them as they are."""
    return {"count": jnp.zeros(()), "mean": jnp.zeros(3), "covariance": jnp.eye(3)}


class Stem(nn.Module):
    """1 x 1 convolution, batch norm and ReLU.

    The convolution is linear in three colours, so the mean and variance of its outputs follow from the colours' mean
    and covariance. These are gathered over all images of the base step, in the place of a batch's own and of running
    averages: nothing depends on the batch, nor on the number of devices, and training and inference agree.
    """

    width: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "s 3"]) -> Float[Array, "s d"]:
        """Normalised features of each pixel."""
        colours = self.variable("statistics", "colours", no_colours).value
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, self.width))
        scale = self.param("scale", nn.initializers.ones, self.width)
        bias = self.param("bias", nn.initializers.zeros, self.width)  # the convolution's own would cancel out
        variance = jnp.einsum("cd,ce,ed->d", kernel, colours["covariance"], kernel)
        normalised = (pixels - colours["mean"][None]) @ kernel / jnp.sqrt(variance + 1e-5)[None]
        return nn.relu(normalised * scale[None] + bias[None])


class RowBlock(nn.Module):
    """A pre-norm transformer block whose attention runs along each row of the grid."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "s s d"]) -> Float[Array, "s s d"]:
        """One block."""
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_1")(x)
        x = x + Attention(self.heads, dropout=0.0, name="attention")(normed, normed, normed, deterministic=True)
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_2")(x)
        hidden = nn.gelu(nn.Dense(self.hidden, name="hidden")(normed), approximate=False)
        return x + nn.Dense(x.shape[-1], name="output")(hidden)


class ClassNetwork(nn.Module):
    """Recognises the object; the outputs of its blocks are the condition that steers the reconstruction."""

    objects: int
    grid: int
    width: int = 256
    blocks: int = 4
    side: int = 56
    heads: int = 4
    hidden: int = 128

    @nn.compact
    def __call__(self, image: Image) -> tuple[Condition, Logits]:
        """From an image (0..255) to one condition per block, each of grid * grid tokens, and the object's logits."""
        pixels = pooled_pixels(image, self.side)
        x = Stem(self.width, name="stem")(pixels).reshape(self.side, self.side, self.width)
        condition = []
        for i in range(self.blocks):
            x = RowBlock(self.heads, self.hidden, name=f"block_{i}")(x)
            condition.append(pool_to_grid(x, self.grid))
        hidden = nn.relu(nn.Dense(self.width, name="head_hidden")(x.mean((0, 1))))
        return tuple(condition), nn.Dense(self.objects, name="head")(hidden)
