"""IUF (Tang et al., ECCV 2024): UniAD without its attention mask, conditioned on the object by a class network.

Its protection against forgetting is a separate strategy, `continual.strategy=iuf`. Our extension to two modalities has
a branch and a class network for each and combines their errors.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import Covariance, merge_covariance
from iumad_jax.methods.network import Residuals, from_network, reconstruct
from iumad_jax.methods.uniad import project_to_features, reconstruction_losses, residuals
from iumad_jax.models.class_network import ClassNetwork, pooled_pixels
from iumad_jax.shapes import Batch, Image, Logits, Modality, Scalars, Tokens, Variables

Output = tuple[dict[Modality, Tokens], dict[Modality, Logits]]  # rebuilt features, logits of the object


class Network(nn.Module):
    """The trained network, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[Output, dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """Return the output and the outputs of the decoder layers, all by modality."""
        config = self.config
        rebuilt, logits, decoder = {}, {}, {}
        for m in self.modalities:
            grid, channels = round(tokens[m].shape[0] ** 0.5), tokens[m].shape[-1]
            class_network = ClassNetwork(grid, config.width, config.layers, config.class_grid, name=f"class_{m}")
            condition, logits[m] = class_network(images[m])
            if config.detach_condition:
                condition = jax.lax.stop_gradient(condition)
            decoder[m] = reconstruct(self, m, tokens[m], condition, deterministic=deterministic)
            rebuilt[m] = project_to_features(self, m, decoder[m][-1], channels)
        return (rebuilt, logits), decoder


def merge_colours(colours: Covariance, images: Float[Array | np.ndarray, "n h w 3"], side: int) -> Covariance:
    """Update the mean and covariance of pixel colours with further images, pooled to side * side pixels."""
    pool = jax.jit(pooled_pixels, static_argnums=1)
    pixels = [np.asarray(pool(np.asarray(image, np.float32), side), np.float64) for image in images]
    return merge_covariance(colours, np.concatenate(pixels))


def iuf(config: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """Build the method from the keys of `config.model` that concern its networks."""

    def losses(output: Output, features: dict[Modality, Tokens], object_id: Array) -> Scalars:
        rebuilt, logits = output
        terms = reconstruction_losses(rebuilt, features)
        for m in modalities:
            ce = optax.softmax_cross_entropy_with_integer_labels(logits[m], object_id)
            terms[f"object_{m}"] = config.object_weight * ce
        return terms

    def residuals_and_logits(
        output: Output, features: dict[Modality, Tokens]
    ) -> tuple[Residuals, dict[Modality, Logits]]:
        rebuilt, logits = output
        return residuals(rebuilt, features), logits

    method = from_network(Network(config, modalities), config, modalities, losses, residuals_and_logits)

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        variables = method.observe(variables, batch, step)
        statistics = dict(variables["statistics"])
        for m in modalities:
            colours = statistics[f"class_{m}"]["stem"]["colours"]
            colours = merge_colours(colours, batch.images[m], config.class_grid)
            statistics[f"class_{m}"] = statistics[f"class_{m}"] | {"stem": {"colours": colours}}
        return variables | {"statistics": statistics}

    return dataclasses.replace(method, observe=observe)
