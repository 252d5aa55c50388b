"""A training-free baseline: the distance to the nearest patch of a good image."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iumad_jax.methods.error_maps import group_name, upsample_errors
from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Variables


def nearest_neighbours(patches_per_object: int, seed: int) -> Method:
    """Build the method, whose error is the distance of z-scored features to a memory bank of training patches.

    The memory bank grows by at most `patches_per_object` random patches per object. The distances of a modality are
    divided by its usual distance (the median distance from a sample of the memory bank to the nearest of the other
    patches) and then summed over modalities.
    """

    def init(_: jax.Array, batch: Batch) -> Variables:
        statistics = {
            modality: {"moments": no_moments(features.shape[-1]), "scale": np.ones((), np.float32)}
            for modality, features in batch.features.items()
        }
        return {"params": {}, "statistics": statistics | {BY_OBJECT: ()}}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        statistics: dict[str, Any] = {}
        patches_by_object = variables["statistics"][BY_OBJECT]
        new_patches = {}
        for modality, features in batch.features.items():
            old_patches = [patches[modality] for patches in patches_by_object]
            rng = np.random.default_rng([seed, sum(map(len, old_patches))])
            images, tokens, channels = features.shape
            chosen = rng.permutation(images * tokens)[:patches_per_object]
            new_patches[modality] = np.asarray(features, np.float32).reshape(-1, channels)[chosen]
            memory_bank = np.concatenate([*old_patches, new_patches[modality]])
            moments = merge_moments(variables["statistics"][modality]["moments"], features)
            statistics[modality] = {"moments": moments, "scale": _usual_distance(memory_bank, moments, rng)}
        return {"params": {}, "statistics": statistics | {BY_OBJECT: (*patches_by_object, new_patches)}}

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        errors = []
        for modality, features in batch.features.items():
            statistics = variables["statistics"][modality]
            memory_bank = jnp.concatenate([patches[modality] for patches in variables["statistics"][BY_OBJECT]])
            memory_bank = standardise(memory_bank, statistics["moments"])
            tokens = standardise(features, statistics["moments"])
            distances = jax.lax.map(lambda x, memory_bank=memory_bank: _nearest(x, memory_bank), tokens)
            errors.append(distances / statistics["scale"])
        return upsample_errors({group_name(batch.features): sum(errors[1:], errors[0])})

    return Method(init, predict, observe=observe)


def _usual_distance(memory_bank: Float[np.ndarray, "n f"], moments: dict, rng: np.random.Generator) -> np.ndarray:
    """Estimate the median distance from up to 512 patches of the memory bank to the nearest of the others.

    A median of 0 is replaced by 1.
    """
    standardised = standardise(jnp.asarray(memory_bank), moments)
    order = rng.permutation(len(memory_bank))
    sampled, others = np.split(order, [min(512, len(memory_bank) // 2)])
    median = jnp.median(_nearest(standardised[sampled], standardised[others]))
    return np.asarray(jnp.where(median > 0, median, 1.0))


@jax.jit
def _nearest(x: Float[Array, "p f"], memory_bank: Float[Array, "n f"]) -> Float[Array, " p"]:
    """Compute the Euclidean distance of each row of x to the nearest row of the memory bank."""
    square = (x**2).sum(-1)[:, None] - 2 * x @ memory_bank.T + (memory_bank**2).sum(-1)[None]
    return jnp.sqrt(jnp.maximum(square.min(-1), 0))
