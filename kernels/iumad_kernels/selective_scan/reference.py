"""The selective scan one position at a time, as its definition reads; differentiable in both modes."""

import jax
import jax.numpy as jnp
from jax import Array


def selective_scan(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    initial_state: Array | None = None,
    *,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Array, Array]:
    """See `iumad_kernels.selective_scan`; B and C are (batch, length, groups, states)."""
    batch, _, channels = x.shape
    states = A.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)

    def position_first(array: Array) -> Array:
        return array.astype(dtype).swapaxes(0, 1)

    def of_channels(array: Array) -> Array:
        """Each group's B or C, (length, batch, groups, states), for each of its channels."""
        return jnp.repeat(array, channels // array.shape[2], axis=2)

    d = position_first(delta)
    if delta_bias is not None:
        d += delta_bias.astype(dtype)[None, None]
    if delta_softplus:
        d = jnp.logaddexp(d, 0)

    def step(h: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, d, B, C = position
        h = jnp.exp(d[..., None] * A.astype(dtype)[None]) * h + (d * x)[..., None] * B
        return h, (C * h).sum(-1)

    h = jnp.zeros((batch, channels, states), dtype) if initial_state is None else initial_state.astype(dtype)
    positions = (position_first(x), d, of_channels(position_first(B)), of_channels(position_first(C)))
    final_state, y = jax.lax.scan(step, h, positions, reverse=reverse)
    y = y.swapaxes(0, 1)
    if D is not None:
        y += D.astype(dtype)[None, None] * x.astype(dtype)
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return y.astype(x.dtype), final_state
