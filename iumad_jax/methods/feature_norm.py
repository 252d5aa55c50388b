"""A training-free baseline: the distance of frozen features from the average good feature."""

import jax

from iumad_jax.methods.error_maps import norm, upsample_errors
from iumad_jax.methods.method import Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.shapes import Batch, ErrorMaps, Variables


def feature_norm() -> Method:
    """Build the method with the error |(f - mean) / std|.

    Mean and standard deviation are those of each channel over all training features observed so far.
    """

    def init(_: jax.Array, batch: Batch) -> Variables:
        statistics = {modality: no_moments(features.shape[-1]) for modality, features in batch.features.items()}
        return {"params": {}, "statistics": statistics}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        moments = variables["statistics"]
        statistics = {m: merge_moments(moments[m], features) for m, features in batch.features.items()}
        return {"params": {}, "statistics": statistics}

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        moments = variables["statistics"]
        return upsample_errors({m: norm(standardise(features, moments[m])) for m, features in batch.features.items()})

    return Method(init, predict, observe=observe)
