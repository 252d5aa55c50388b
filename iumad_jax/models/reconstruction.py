"""The reconstruction transformer of UniAD, conditioned on the object (IUF, IB-IUMAD section 4).

Modules process the tokens of one image; use `jax.vmap` for batches.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from iumad_jax.models.layers import Attention, FeedForward
from iumad_jax.shapes import Condition

_xavier = nn.initializers.xavier_uniform()


def neighbour_mask(grid: int, side: int = 7) -> Bool[np.ndarray, "p p"]:
    """Compute which tokens (columns) each token (row) may attend to: all but its side x side neighbourhood (UniAD)."""
    row, column = np.divmod(np.arange(grid * grid), grid)
    distance = np.maximum(abs(row[:, None] - row[None]), abs(column[:, None] - column[None]))
    return distance > side // 2


@dataclass(frozen=True)
class Layers:
    """Layers of transformers with norms after each sum. Methods create modules, so they run within one."""

    heads: int
    hidden: int
    dropout: float
    mask: Bool[np.ndarray, "p p"] | None
    deterministic: bool

    def attend(self, q: Float[Array, "p d"], k: Float[Array, "p d"], v: Float[Array, "p d"], name: str) -> Array:
        """Attend from the queries q to the keys k and values v."""
        out = Attention(self.heads, self.dropout, self.mask, name=name)(q, k, v, deterministic=self.deterministic)
        return nn.Dropout(self.dropout)(out, deterministic=self.deterministic)

    def feed_forward(self, x: Float[Array, "p d"], name: str) -> Float[Array, "p d"]:
        """Transform each token."""
        out = FeedForward(self.hidden, self.dropout, name=name)(x, deterministic=self.deterministic)
        return nn.Dropout(self.dropout)(out, deterministic=self.deterministic)

    def encode(
        self, x: Float[Array, "p d"], position: Float[Array, "p d"], layers: int, condition: Condition | None = None
    ) -> Float[Array, "p d"]:
        """Run the encoder; `condition` are factors of the queries, one per layer, and None means 1."""
        for i in range(layers):
            name = f"encoder_{i}"
            query = x + position if condition is None else (x + position) * condition[i]
            x = norm(x + self.attend(query, x + position, x, f"{name}_attention"), f"{name}_norm_1")
            x = norm(x + self.feed_forward(x, f"{name}_feed_forward"), f"{name}_norm_2")
        return x


def norm(x: Float[Array, "p d"], name: str) -> Float[Array, "p d"]:
    """Normalise each token."""
    return nn.LayerNorm(epsilon=1e-5, name=name)(x)


class ReconstructionTransformer(nn.Module):
    """Transformer that reconstructs the tokens of a good image from jittered tokens."""

    grid: int
    width: int = 256
    heads: int = 8
    layers: int = 4
    hidden: int = 1024
    dropout: float = 0.1
    hide_neighbours: bool = False

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "p f"], condition: Condition | None = None, *, deterministic: bool
    ) -> tuple[Float[Array, "p d"], ...]:
        """Return the outputs of all decoder layers; the last one is the reconstruction.

        Args:
            tokens: Features of an image, possibly jittered, with p = grid * grid.
            condition: Factors of the queries, one per encoder layer; None means 1, as in UniAD.
            deterministic: Whether to disable dropout.
        """
        mask = neighbour_mask(self.grid) if self.hide_neighbours else None
        layers = Layers(self.heads, self.hidden, self.dropout, mask, deterministic)
        attend, feed_forward, position = layers.attend, layers.feed_forward, self._position()
        x = nn.Dense(self.width, kernel_init=_xavier, name="embed")(tokens)
        x = layers.encode(x, position, self.layers, condition)

        memory, previous, outputs = x, x, []
        for i in range(self.layers):
            name = f"decoder_{i}"
            x = self.param(f"{name}_query", nn.initializers.normal(1.0), (self.grid**2, self.width))
            x = norm(x + attend(x + position, memory + position, memory, f"{name}_attention_1"), f"{name}_norm_1")
            x = norm(x + attend(x + position, previous + position, previous, f"{name}_attention_2"), f"{name}_norm_2")
            previous = norm(x + feed_forward(x, f"{name}_feed_forward"), f"{name}_norm_3")
            outputs.append(previous)
        final_norm = nn.LayerNorm(epsilon=1e-5, name="final_norm")
        return tuple(final_norm(output) for output in outputs)

    def _position(self) -> Float[Array, "p d"]:
        """Return learned 2-D position embeddings: half of the width encodes the row, half the column."""
        half = self.width // 2
        row = self.param("row_position", nn.initializers.uniform(1.0), (self.grid, 1, half))
        column = self.param("column_position", nn.initializers.uniform(1.0), (1, self.grid, half))
        shape = (self.grid, self.grid, half)
        both = jnp.concatenate([jnp.broadcast_to(row, shape), jnp.broadcast_to(column, shape)], axis=-1)
        return both.reshape(self.grid**2, self.width)
