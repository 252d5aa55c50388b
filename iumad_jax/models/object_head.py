"""Classification head that grows by the objects that a run learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from iumad_jax.shapes import Logits, Variables, capacity

_NOT_LEARNED = -1e9  # logit of an object that is not learned yet; finite, so that products with probability 0 are 0


class ObjectHead(nn.Module):
    """Linear layer with one output for each learned object, and room for further ones; `grow_heads` adds objects."""

    @nn.compact
    def __call__(self, x: Float[Array, " d"]) -> Logits:
        """Compute the logits of all objects; those not learned yet have probability 0."""
        learned = self.variable("statistics", "objects", lambda: jnp.zeros((), jnp.int32)).value
        kernel, bias = (
            self.get_variable("params", name)  # `param` would refuse a size that has grown
            if self.has_variable("params", name)
            else self.param(name, nn.initializers.zeros, shape)
            for name, shape in {"kernel": (len(x), capacity(0)), "bias": (capacity(0),)}.items()
        )
        return jnp.where(jnp.arange(len(bias)) < learned, x @ kernel + bias, _NOT_LEARNED)


def grow_heads(variables: Variables, objects: int, key: jax.Array) -> Variables:
    """Let all heads of a network recognise a number of objects.

    The weights of a new object depend only on the key, the head and the number of the object.
    """
    params, statistics = (flatten_dict(variables[name]) for name in ("params", "statistics"))
    heads = sorted(path[:-1] for path in statistics if path[-1] == "objects")
    for head_key, head in zip(jax.random.split(key, len(heads)) if heads else (), heads, strict=True):
        kernel, bias = (np.asarray(params[*head, name]) for name in ("kernel", "bias"))
        missing = max(capacity(objects) - len(bias), 0)
        kernel, bias = np.pad(kernel, ((0, 0), (0, missing))), np.pad(bias, (0, missing))
        for number in range(int(statistics[*head, "objects"]), objects):
            kernel[:, number] = _initial_weights(head_key, number, len(kernel))
        params |= {(*head, "kernel"): kernel, (*head, "bias"): bias}
        statistics[*head, "objects"] = np.int32(objects)
    return variables | {"params": unflatten_dict(params), "statistics": unflatten_dict(statistics)}


@functools.partial(jax.jit, static_argnums=2)
def _initial_weights(key: jax.Array, number: int | Array, width: int) -> Float[Array, " d"]:
    """Draw the weights of one object."""
    return nn.initializers.lecun_normal()(jax.random.fold_in(key, number), (width, 1))[:, 0]
