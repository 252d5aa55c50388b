"""UniAD (You et al., NeurIPS 2022): one reconstruction transformer for all objects, without object information.

Our extension to two modalities has a branch for each and combines their errors.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.methods.method import Method
from iumad_jax.methods.network import Residuals, from_network, reconstruct
from iumad_jax.shapes import Image, Logits, Modality, Scalars, Tokens


def project_to_features(network: Any, modality: Modality, decoded: Float[Array, "p d"], channels: int) -> Tokens:
    """Project the last decoder output to features. Must be called within a network's `__call__`.

    The weights start at zero: with random ones, training first makes all tokens equal to suppress the random output,
    and never recovers.
    """
    return nn.Dense(channels, kernel_init=nn.initializers.zeros, name=f"project_{modality}")(decoded)


def residuals(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]) -> Residuals:
    """Subtract the true features of each modality from the rebuilt ones."""
    return {m: rebuilt[m] - features[m] for m in rebuilt}


def reconstruction_losses(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]) -> Scalars:
    """Compute the mean squared error of each modality, as one loss term each."""
    return {f"reconstruction_{m}": jnp.mean((rebuilt[m] - features[m]) ** 2) for m in rebuilt}


class Network(nn.Module):
    """The trained network, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[dict[Modality, Tokens], dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """Return the rebuilt features and the outputs of the decoder layers, both by modality."""
        decoder = {
            m: reconstruct(self, m, tokens[m], None, deterministic=deterministic, hide_neighbours=True)
            for m in self.modalities
        }
        return {m: project_to_features(self, m, decoder[m][-1], tokens[m].shape[-1]) for m in decoder}, decoder


def uniad(config: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """Build the method from the keys of `config.model` that concern the reconstruction transformer."""

    def losses(rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens], _: Array) -> Scalars:
        return reconstruction_losses(rebuilt, features)

    def residuals_and_logits(
        rebuilt: dict[Modality, Tokens], features: dict[Modality, Tokens]
    ) -> tuple[Residuals, dict[Modality, Logits]]:
        return residuals(rebuilt, features), {}

    return from_network(Network(config, modalities), config, modalities, losses, residuals_and_logits)
