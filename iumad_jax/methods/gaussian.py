"""A baseline without training: the Mahalanobis distance of frozen features from an object's good ones.

After Rippel et al. (ICPR 2020), with one Gaussian per object and modality for patches from anywhere in the image.
"""

import jax

from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.methods.mahalanobis import arrange, distances, fit, in_parts
from iumad_jax.methods.method import Method, of_objects, with_object
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Variables


def gaussian() -> Method:
    """Build the method whose error is the distance of features from those of the recognised object."""

    def init(_: jax.Array, __: Batch) -> Variables:
        return {"params": {}, "statistics": {}, BY_OBJECT: ()}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        object_id, by_object = int(batch.object_id[0]), variables[BY_OBJECT]
        earlier = by_object[object_id] if object_id < len(by_object) else None
        return with_object(variables, object_id, fit(in_parts(batch.features), earlier))

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        gaussians = of_objects(variables[BY_OBJECT], batch.object_id)
        return upsample_errors({m: jax.vmap(distances)(x, gaussians[m]) for m, x in batch.features.items()})

    return Method(init, predict, observe=observe, arrange=arrange, independent=True)
