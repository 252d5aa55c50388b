"""A baseline without training: the distance to the nearest patch of a good image."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iumad_jax.methods.error_maps import group, maps_of
from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Variables


def nearest_neighbours(patches_per_object: int, seed: int) -> Method:
    """Distance of z-scored features to a memory_bank of training patches that grows by a bounded number per object.

    The distances of two modalities are divided by what is normal for each (the median distance from some patches
    of the memory_bank to the nearest of the others) and summed.
    """

    def init(_: jax.Array, batch: Batch) -> Variables:
        scales = {
            modality: {"moments": no_moments(array.shape[-1]), "scale": np.ones((), np.float32)}
            for modality, array in batch.features.items()
        }
        return {"params": {}, "statistics": scales | {BY_OBJECT: ()}}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        statistics: dict[str, Any] = {}
        patches_by_object = variables["statistics"][BY_OBJECT]
        drawn = {}
        for modality, features in batch.features.items():
            old = [patches[modality] for patches in patches_by_object]
            rng = np.random.default_rng([seed, sum(map(len, old))])
            images, patches, channels = features.shape
            order = rng.permutation(images * patches)[:patches_per_object]
            drawn[modality] = np.asarray(features, np.float32).reshape(-1, channels)[order]
            memory_bank = np.concatenate([*old, drawn[modality]])
            moments = merge_moments(variables["statistics"][modality]["moments"], features)
            statistics[modality] = {"moments": moments, "scale": _usual_distance(memory_bank, moments, rng)}
        return {"params": {}, "statistics": statistics | {BY_OBJECT: (*patches_by_object, drawn)}}

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        errors = []
        for modality, features in batch.features.items():
            statistics = variables["statistics"][modality]
            memory_bank = jnp.concatenate([patches[modality] for patches in variables["statistics"][BY_OBJECT]])
            memory_bank = standardise(memory_bank, statistics["moments"])
            x = standardise(features, statistics["moments"])
            errors.append(jax.lax.map(lambda one, m=memory_bank: _nearest(one, m), x) / statistics["scale"])
        return maps_of({group(batch.features): sum(errors[1:], errors[0])})

    return Method(init, predict, observe=observe)


def _usual_distance(memory_bank: Float[np.ndarray, "n f"], moments: dict, rng: np.random.Generator) -> np.ndarray:
    """The median distance from some patches of the memory_bank to the nearest of the others; 1 where that is 0."""
    standardised = standardise(jnp.asarray(memory_bank), moments)
    held_out = rng.permutation(len(memory_bank))
    some, others = np.split(held_out, [min(512, len(memory_bank) // 2)])
    median = jnp.median(_nearest(standardised[some], standardised[others]))
    return np.asarray(jnp.where(median > 0, median, 1.0))


@jax.jit
def _nearest(x: Float[Array, "p f"], memory_bank: Float[Array, "n f"]) -> Float[Array, " p"]:
    """Euclidean distance of each row of x to the nearest row of the memory_bank."""
    square = (x**2).sum(-1)[:, None] - 2 * x @ memory_bank.T + (memory_bank**2).sum(-1)[None]
    return jnp.sqrt(jnp.maximum(square.min(-1), 0))
