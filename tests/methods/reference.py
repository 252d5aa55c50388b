"""Expected predictions of methods."""

from iumad_jax.inference.anomaly_map import combine
from iumad_jax.methods.error_maps import upsample_errors


def prediction_from(errors):
    """Combine errors at tokens, shape (b, p), into a prediction."""
    return combine(upsample_errors({"all": errors}))
