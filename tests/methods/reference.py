"""What tests of methods compare with."""

from iumad_jax.inference.anomaly_map import combine
from iumad_jax.methods.error_maps import upsample_errors


def prediction_of(errors):
    """The prediction for errors (b p) at tokens."""
    return combine(upsample_errors({"all": errors}))
