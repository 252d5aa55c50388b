"""Variables of methods and their expected error maps."""

import jax
import numpy as np

from iumad_jax.methods.error_maps import upsample_errors


def grown_variables(method, batch, objects):
    """Return the variables of a method that has learned a number of objects; all its parameters are random.

    Biases and scales differ from their initial 0 and 1, and so do the weights of objects that are not learned.
    """
    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, key, batch)["params"]
    params = jax.tree.map(lambda p: (0.4 * rng.standard_normal(p.shape)).astype(np.float32), shapes)
    statistics = jax.jit(lambda key: method.init(key, batch)["statistics"])(key)  # compiled without the parameters
    grown = method.grow({"params": params, "statistics": statistics}, objects, key)
    return grown | {"params": params}


def map_from(errors):
    """Upsample errors at tokens, shape (b, p)."""
    return upsample_errors({"all": errors}).maps["all"]
