"""Fusion of the branches under an information bottleneck (IB-IUMAD, section 5).

Modules process the tokens of one image; use `jax.vmap` for batches.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import Attention
from iumad_jax.models.object_head import ObjectHead
from iumad_jax.shapes import Logits


class Fused(NamedTuple):
    """Fused representations before and after the bottleneck, with object logits of each.

    Without a bottleneck, the representations are equal and the logits None.
    """

    fused: Float[Array, "p f"]  # F_fu
    compressed: Float[Array, "p f"]  # F_g
    fused_logits: Logits | None
    compressed_logits: Logits | None


class InformationBottleneckFusion(nn.Module):
    """Fusion of one reconstruction per modality, followed by a narrower layer (the bottleneck).

    With one modality, the bottleneck acts on its reconstruction alone.
    """

    features: int  # channels of the discriminator's target
    heads: int = 8
    bottleneck_ratio: float = 2 / 3
    dropout: float = 0.1
    addition: bool = False  # ablation: add the reconstructions instead of cross-attention between them
    bottleneck: bool = True  # ablation if False: only F_fu is computed

    @nn.compact
    def __call__(self, *reconstructions: Float[Array, "p d"], deterministic: bool) -> Fused:
        """Fuse one or two reconstructions of an image."""
        if self.addition:
            reconstructions = (sum(reconstructions[1:], start=reconstructions[0]),)
        elif len(reconstructions) == 2:
            reconstructions = tuple(
                self._cross_attend(query, context, f"attention_{i}", deterministic)
                for i, (query, context) in enumerate([reconstructions, reconstructions[::-1]])
            )
        joined = jnp.concatenate(reconstructions, axis=-1)
        # With a random initial output, training first makes all tokens alike to cancel it, and never recovers.
        zeros = nn.initializers.zeros
        if not self.bottleneck:
            fused = nn.Dense(self.features, kernel_init=zeros, name="fuse")(joined)
            return Fused(fused, fused, None, None)
        fused = nn.Dense(self.features, name="fuse")(joined)
        narrow = nn.relu(nn.Dense(round(self.features * self.bottleneck_ratio), name="squeeze")(fused))
        narrow = nn.Dropout(self.dropout)(narrow, deterministic=deterministic)
        compressed = nn.Dense(self.features, kernel_init=zeros, name="expand")(narrow)
        return Fused(
            fused,
            compressed,
            ObjectHead(name="fused_head")(fused.mean(0)),
            ObjectHead(name="compressed_head")(compressed.mean(0)),
        )

    def _cross_attend(
        self, query: Float[Array, "p d"], context: Float[Array, "p d"], name: str, deterministic: bool
    ) -> Float[Array, "p d"]:
        attended = Attention(self.heads, self.dropout, name=name)(query, context, context, deterministic=deterministic)
        return nn.LayerNorm(epsilon=1e-5, name=f"{name}_norm")(query + attended)
