"""Expected error maps of methods."""

from iumad_jax.methods.error_maps import upsample_errors


def map_from(errors):
    """Upsample errors at tokens, shape (b, p)."""
    return upsample_errors({"all": errors}).maps["all"]
