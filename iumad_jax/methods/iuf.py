"""IUF (Tang et al., ECCV 2024): UniAD without its mask, told by a class network what object it sees.

What keeps it from forgetting is a strategy of its own, `continual.strategy=iuf`. With two modalities (ours): a branch
and a class network for each, whose errors are joined.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.methods.error_maps import group
from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import Moments
from iumad_jax.methods.network import Errors, from_network, reconstruct
from iumad_jax.methods.uniad import project, reconstruction_errors, reconstruction_losses
from iumad_jax.models.class_network import ClassNetwork, pooled_pixels
from iumad_jax.shapes import Batch, Image, Logits, Modality, Scalars, Tokens, Variables

Output = tuple[dict[Modality, Tokens], dict[Modality, Logits]]


class Network(nn.Module):
    """Everything that is trained, for one image."""

    config: Any  # config.model, frozen
    modalities: tuple[Modality, ...]
    objects: int

    @nn.compact
    def __call__(
        self, tokens: dict[Modality, Tokens], images: dict[Modality, Image], *, deterministic: bool
    ) -> tuple[Output, dict[Modality, tuple[Float[Array, "p d"], ...]]]:
        """The rebuilt features with the object's logits, and the outputs of each modality's decoder layers."""
        config = self.config
        rebuilt, logits, decoder = {}, {}, {}
        for m in self.modalities:
            grid, channels = round(tokens[m].shape[0] ** 0.5), tokens[m].shape[-1]
            network = ClassNetwork(
                self.objects, grid, config.width, config.layers, config.class_grid, name=f"class_{m}"
            )
            condition, logits[m] = network(images[m])
            if config.detach_condition:
                condition = jax.lax.stop_gradient(condition)
            decoder[m] = reconstruct(self, m, tokens[m], condition, deterministic=deterministic)
            rebuilt[m] = project(self, m, decoder[m][-1], channels)
        return (rebuilt, logits), decoder


def merge_colours(seen: Moments, images: Float[Array | np.ndarray, "n h w 3"], side: int) -> Moments:
    """Mean and covariance of the pixels of what was seen before and of these images together."""
    pool = jax.jit(pooled_pixels, static_argnums=1)
    count = np.float64(seen["count"])
    mean = np.asarray(seen["mean"], np.float64)
    total = count * mean
    square = count * (np.asarray(seen["covariance"], np.float64) + np.outer(mean, mean))
    for image in images:
        pixels = np.asarray(pool(np.asarray(image, np.float32), side), np.float64)
        count, total, square = count + len(pixels), total + pixels.sum(0), square + pixels.T @ pixels
    mean = total / count
    return {
        "count": np.float32(count),
        "mean": mean.astype(np.float32),
        "covariance": (square / count - np.outer(mean, mean)).astype(np.float32),
    }


def iuf(config: ConfigDict, modalities: tuple[Modality, ...], objects: int) -> Method:
    """The method for `config.model`, of which it reads what its networks need."""

    def losses(output: Output, features: dict[Modality, Tokens], object_id: Array) -> Scalars:
        rebuilt, logits = output
        terms = reconstruction_losses(rebuilt, features)
        for m in modalities:
            ce = optax.softmax_cross_entropy_with_integer_labels(logits[m], object_id)
            terms[f"object_{m}"] = config.object_weight * ce
        return terms

    def explain(output: Output, features: dict[Modality, Tokens]) -> tuple[Errors, dict[Modality, Logits]]:
        rebuilt, logits = output
        return {group(modalities): reconstruction_errors(rebuilt, features)}, logits

    method = from_network(Network(config, modalities, objects), config, modalities, losses, explain)

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        variables = method.observe(variables, batch, step)
        statistics = dict(variables["statistics"])
        for m in modalities:
            seen = statistics[f"class_{m}"]["stem"]["colours"]
            statistics[f"class_{m}"] = {"stem": {"colours": merge_colours(seen, batch.images[m], config.class_grid)}}
        return variables | {"statistics": statistics}

    return dataclasses.replace(method, observe=observe)
