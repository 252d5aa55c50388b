"""Fusion of the branches under an information bottleneck (IB-IUMAD, section 5).

Modules take the tokens of one image; batches are made with `jax.vmap`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import Attention
from iumad_jax.shapes import Logits


class Fused(NamedTuple):
    """The two fused representations and the object that each predicts; without a bottleneck they are one."""

    fused: Float[Array, "p f"]  # F_fu
    compressed: Float[Array, "p f"]  # F_g
    fused_logits: Logits | None
    compressed_logits: Logits | None


class InformationBottleneckFusion(nn.Module):
    """Fuses one reconstruction per modality and squeezes the result through a narrower layer.

    With one modality there is nothing to fuse and the bottleneck acts on its reconstruction.
    """

    features: int  # width of the discriminator's target
    objects: int
    heads: int = 8
    bottleneck_ratio: float = 2 / 3
    dropout: float = 0.1
    addition: bool = False  # ablation: the reconstructions are added where they would attend to each other
    bottleneck: bool = True  # False, an ablation: F_fu is all there is

    @nn.compact
    def __call__(self, *reconstructions: Float[Array, "p d"], deterministic: bool) -> Fused:
        """Fuse one or two reconstructions of one image."""
        if self.addition:
            reconstructions = (sum(reconstructions[1:], start=reconstructions[0]),)
        elif len(reconstructions) == 2:
            reconstructions = tuple(
                self._attend_to_other(own, other, f"attention_{i}", deterministic)
                for i, (own, other) in enumerate([reconstructions, reconstructions[::-1]])
            )
        joined = jnp.concatenate(reconstructions, axis=-1)
        # From zero, or training first makes all tokens alike to silence a random output, and stays there.
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
            nn.Dense(self.objects, name="fused_head")(fused.mean(0)),
            nn.Dense(self.objects, name="compressed_head")(compressed.mean(0)),
        )

    def _attend_to_other(
        self, own: Float[Array, "p d"], other: Float[Array, "p d"], name: str, deterministic: bool
    ) -> Float[Array, "p d"]:
        attended = Attention(self.heads, self.dropout, name=name)(own, other, other, deterministic=deterministic)
        return nn.LayerNorm(epsilon=1e-5, name=f"{name}_norm")(own + attended)
