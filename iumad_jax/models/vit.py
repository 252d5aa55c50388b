"""Frozen vision transformers of DINOv2 for inference (Oquab et al., TMLR 2024; Dosovitskiy et al., ICLR 2021).

These are the ViTs without registers. pretrained.py folds every layer scale into the preceding projection, and the class
token's position into the class token, when it loads weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import Attention

PATCH = 14  # pixels
POSITIONS = 37  # per side: the grid of the training images of 518 pixels
DEPTH = 12
EPSILON = 1e-6  # of layer norms


@dataclass(frozen=True)
class Architecture:
    """A vision transformer of 12 blocks."""

    width: int
    heads: int

    levels: ClassVar = tuple(range(DEPTH))  # numbers of blocks, as in the names of the file's tensors
    default_levels: ClassVar = (2, 5, 8, 11)  # as DINOv2's own heads for depth, whose `layers` is 4

    @property
    def channels_of_levels(self) -> tuple[int, ...]:
        """Number of feature channels of each level."""
        return (self.width,) * len(self.levels)


def cubic_weights(size: int, scale: float, resized: int) -> Float[np.ndarray, "i n"]:
    """Compute the matrix that resizes `size` numbers as PyTorch's bicubic interpolation with a scale factor does.

    Output i samples position (i + 0.5) / scale - 0.5 by Keys' cubic with a = -0.75; the ends are repeated.
    """
    position = (np.arange(resized) + 0.5) / scale - 0.5
    low = np.floor(position).astype(int)
    weights, a = np.zeros((resized, size)), -0.75
    for index in (low - 1, low, low + 1, low + 2):
        d = np.abs(position - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weights[np.arange(resized), np.clip(index, 0, size - 1)] += np.where(d <= 1, near, far)
    return weights


def resize_positions(positions: Float[Array, "m m d"], rows: int, columns: int) -> Float[Array, "i j d"]:
    """Resize the positions to a grid of patches, as the models of torch.hub do: bicubic, not antialiased, offset 0.1.

    The offset is added to the grid's size before it is divided by the number of positions, which gives the scale.
    """
    size = len(positions)
    if (rows, columns) == (size, size):
        return positions
    vertical, horizontal = (
        jnp.asarray(cubic_weights(size, (n + 0.1) / size, n), positions.dtype) for n in (rows, columns)
    )
    return jnp.einsum("im,jn,mnd->ijd", vertical, horizontal, positions)


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b p d"]) -> Float[Array, "b p d"]:
        """Transform each token."""
        y = nn.LayerNorm(EPSILON, name="norm1")(x)
        x = x + Attention(self.heads, dropout=0.0, name="attention")(y, y, y, deterministic=True)
        y = nn.LayerNorm(EPSILON, name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="hidden")(y), approximate=False)
        return x + nn.Dense(x.shape[-1], name="output")(y)


class VisionTransformer(nn.Module):
    """The network up to the last of the levels, for normalised images."""

    architecture: Architecture
    levels: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b i j d"]]:
        """Return the patch tokens after the blocks `levels`, each by the final layer norm.

        Images are first resized to the nearest multiples of 14 pixels (antialiased bilinear).
        """
        width = self.architecture.width
        rows, columns = (max(1, round(n / PATCH)) for n in images.shape[1:3])
        shape = images.shape[0], rows * PATCH, columns * PATCH, 3
        resized = images if images.shape == shape else jax.image.resize(images, shape, "bilinear")
        patches = nn.Conv(width, (PATCH, PATCH), PATCH, padding="VALID", name="patches")(resized)
        table = self.param("positions", nn.initializers.normal(0.02), (POSITIONS, POSITIONS, width))
        patches += resize_positions(table, rows, columns)[None]
        class_token = self.param("class_token", nn.initializers.normal(0.02), (width,))
        first = jnp.broadcast_to(class_token, (len(images), 1, width))
        x = jnp.concatenate([first, patches.reshape(len(images), rows * columns, width)], axis=1)
        norm = nn.LayerNorm(EPSILON, name="norm")
        outputs = {}
        for i in range(max(self.levels) + 1):
            x = Block(self.architecture.heads, name=f"block_{i}")(x)
            if i in self.levels:
                outputs[i] = norm(x)[:, 1:].reshape(len(images), rows, columns, width)
        return [outputs[level] for level in self.levels]
