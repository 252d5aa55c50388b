"""Selective scan one position at a time, as in its definition; differentiable in both modes."""

import jax
import jax.numpy as jnp
from jax import Array

from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences


def selective_scan(sequences: Sequences, parameters: Parameters, options: Options) -> tuple[Array, Array]:
    """Compute y and the final state of `iumad_kernels.selective_scan`, one position at a time."""
    x, A = sequences.x, parameters.A
    batch, _, channels = x.shape
    states = A.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def position_first(array: Array) -> Array:
        return array.astype(dtype).swapaxes(0, 1)

    def repeat_for_channels(array: Array) -> Array:
        """Repeat B or C, (length, batch, groups, states), for every channel of a group."""
        return jnp.repeat(array, channels // array.shape[2], axis=2)

    d = position_first(sequences.delta)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(dtype)[None, None]
    if options.delta_softplus:
        d = jnp.logaddexp(d, 0)

    def step(h: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, d, B, C = position
        h = jnp.exp(d[..., None] * A.astype(dtype)[None]) * h + (d * x)[..., None] * B
        return h, (C * h).sum(-1)

    h = sequences.initial_state
    h = jnp.zeros((batch, channels, states), dtype) if h is None else h.astype(dtype)
    B, C = (repeat_for_channels(position_first(array)) for array in (sequences.B, sequences.C))
    final_state, y = jax.lax.scan(step, h, (position_first(x), d, B, C), reverse=options.reverse)
    y = y.swapaxes(0, 1)
    if parameters.D is not None:
        y += parameters.D.astype(dtype)[None, None] * x.astype(dtype)
    if sequences.z is not None:
        y *= jax.nn.silu(sequences.z.astype(dtype))
    return y.astype(x.dtype), final_state
