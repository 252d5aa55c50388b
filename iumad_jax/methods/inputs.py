"""Stores what the kernels of layers multiply, for strategies that protect it."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import taps
from iumad_jax.models.object_head import ObjectHead


def store_inputs(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Store the rows that a layer's kernel multiplies as `rows`, shape (n, d), in the collection `inputs`.

    An interceptor for `nn.intercept_methods`. Layers are linear ones, and convolutions with explicit padding.
    """
    layer = context.module
    linear = isinstance(layer, nn.Dense | nn.DenseGeneral | ObjectHead)
    linear |= isinstance(layer, nn.Conv) and not isinstance(layer.padding, str)
    if context.method_name == "__call__" and linear:
        layer.sow("inputs", "rows", _rows(layer, args[0]), reduce_fn=lambda _, new: new)
    return call(*args, **kwargs)


def _rows(layer: Any, x: Array) -> Float[Array, "n d"]:
    if isinstance(layer, nn.Conv):
        padding: Any = (*layer.padding, (0, 0)) if isinstance(layer.padding, tuple) else ()
        size, stride = (int(np.max(np.asarray(value))) for value in (layer.kernel_size, layer.strides))
        x = jnp.concatenate(taps(jnp.pad(x, padding), size, stride), axis=-1)  # in the kernel's order of axes
    contracted = np.size(layer.axis) if isinstance(layer, nn.DenseGeneral) else 1  # the last axes
    return x.reshape(-1, math.prod(x.shape[-contracted:]))
