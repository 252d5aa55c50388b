"""A baseline without training: how far frozen features are from the average good feature."""

import jax

from iumad_jax.methods.error_maps import group, maps_of, norm
from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.shapes import Batch, ErrorMaps, Variables


def feature_norm() -> Method:
    """|(f - mean) / std| with per-channel statistics of all training features seen so far; modalities are summed."""

    def init(_: jax.Array, batch: Batch) -> Variables:
        statistics = {modality: no_moments(array.shape[-1]) for modality, array in batch.features.items()}
        return {"params": {}, "statistics": statistics}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        seen = variables["statistics"]
        statistics = {modality: merge_moments(seen[modality], array) for modality, array in batch.features.items()}
        return {"params": {}, "statistics": statistics}

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        errors = [norm(standardise(x, variables["statistics"][modality])) for modality, x in batch.features.items()]
        return maps_of({group(batch.features): sum(errors[1:], errors[0])})

    return Method(init, predict, observe=observe)
