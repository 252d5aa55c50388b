"""The text encoder of CLIP (Radford et al., ICML 2021), ViT-L/14 as in Stable Diffusion 1.5.

Names of modules and parameters are those of `transformers`, with underscores for its dots.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

LENGTH = 77  # tokens of every prompt
EMPTY_PROMPT = np.array([49406] + [49407] * (LENGTH - 1), np.int32)  # begin, then end, which also pads


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "l d"]) -> Float[Array, "l d"]:
        """Apply the layer."""
        length, width = x.shape

        def heads(name: str) -> Float[Array, "heads l dh"]:
            return nn.Dense(width, name=name)(x).reshape(length, self.heads, -1).swapaxes(0, 1)

        similarity = heads("q_proj") @ heads("k_proj").swapaxes(1, 2) * (width // self.heads) ** -0.5
        similarity = jnp.where(np.tri(length, dtype=bool)[None], similarity, -jnp.inf)
        attended = nn.softmax(similarity) @ heads("v_proj")
        return nn.Dense(width, name="out_proj")(attended.swapaxes(0, 1).reshape(length, width))


class FeedForward(nn.Module):
    """d -> 4 d -> d with a fast approximation of GELU."""

    @nn.compact
    def __call__(self, x: Float[Array, "l d"]) -> Float[Array, "l d"]:
        """Transform each token."""
        hidden = nn.Dense(4 * x.shape[-1], name="fc1")(x)
        return nn.Dense(x.shape[-1], name="fc2")(hidden * nn.sigmoid(1.702 * hidden))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward layer."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "l d"]) -> Float[Array, "l d"]:
        """Transform the tokens."""
        x = x + Attention(self.heads, name="self_attn")(_norm("layer_norm1")(x))
        return x + FeedForward(name="mlp")(_norm("layer_norm2")(x))


class Embeddings(nn.Module):
    """The sum of a token's and its position's embedding."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, " l"]) -> Float[Array, "l d"]:
        """Embed the tokens."""
        positions = nn.Embed(LENGTH, self.width, name="position_embedding")(jnp.arange(len(tokens)))
        return nn.Embed(self.vocabulary, self.width, name="token_embedding")(tokens) + positions


class Encoder(nn.Module):
    """The layers."""

    layers: int
    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "l d"]) -> Float[Array, "l d"]:
        """Apply all layers."""
        for i in range(self.layers):
            x = Layer(self.heads, name=f"layers_{i}")(x)
        return x


class TextEncoder(nn.Module):
    """The last hidden states of a prompt, after the final layer norm."""

    vocabulary: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, tokens: Int[Array, " l"]) -> Float[Array, "l d"]:
        """Encode at most 77 tokens, given by their numbers in the vocabulary."""
        x = Embeddings(self.vocabulary, self.width, name="embeddings")(tokens)
        return _norm("final_layer_norm")(Encoder(self.layers, self.heads, name="encoder")(x))
