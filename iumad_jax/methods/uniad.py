"""UniAD (You et al., NeurIPS 2022): one reconstruction transformer for all objects, told nothing of which it sees.

With two modalities (ours): a branch for each, whose errors are joined.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.methods.error_maps import group, norm
from iumad_jax.methods.method import Method
from iumad_jax.methods.network import Errors, from_network, reconstruct
from iumad_jax.shapes import Image, Logits, Modality, Scalars, Tokens


def project(network: Any, modality: Modality, decoded: Float[Array, "p d"], channels: int) -> Tokens:
    """Within a network: from the last decoder output to features.

    From zero, or training first makes all tokens alike to silence a random output, and stays there.
    """
    return nn.Dense(channels, kernel_init=nn.initializers.zeros, name=f"project_{modality}")(decoded)


def reconstruction_errors(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]) -> Float[Array, " p"]:
    """sqrt(|e_rgb|^2 + |e_depth|^2) at each token, e being the difference from the features of a modality."""
    return norm(jnp.concatenate([rebuilt[m] - features[m] for m in rebuilt], axis=-1))


def reconstruction_losses(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]) -> Scalars:
    """The mean squared error of each modality."""
    return {f"reconstruction_{m}": jnp.mean((rebuilt[m] - features[m]) ** 2) for m in rebuilt}


class Network(nn.Module):
    """Everything that is trained, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[dict[Modality, Tokens], dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """The rebuilt features and the outputs of each modality's decoder layers."""
        decoder = {
            m: reconstruct(self, m, tokens[m], None, deterministic=deterministic, hide_neighbours=True)
            for m in self.modalities
        }
        return {m: project(self, m, decoder[m][-1], tokens[m].shape[-1]) for m in decoder}, decoder


def uniad(config: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """The method for `config.model`, of which it reads what the reconstruction transformer needs."""

    def losses(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens], _: Array) -> Scalars:
        return reconstruction_losses(rebuilt, features)

    def explain(
        rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]
    ) -> tuple[Errors, dict[Modality, Logits]]:
        return {group(modalities): reconstruction_errors(rebuilt, features)}, {}

    return from_network(Network(config, modalities), config, modalities, losses, explain)
