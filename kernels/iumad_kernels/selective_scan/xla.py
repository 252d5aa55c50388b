"""The selective scan in chunks of positions, with a hand-written backward pass, for any platform that XLA serves.

The forward pass keeps the states at the starts of chunks; the backward pass walks the chunks from the last to the
first, recomputes each one's states and propagates the gradients through it. No (length, channels, states) array
exists.
"""

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 16


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
    batch, length, channels = x.shape
    groups, states = B.shape[2:]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)

    d = delta.astype(dtype)
    if delta_bias is not None:
        d += delta_bias.astype(dtype)[None, None]
    if delta_softplus:
        d = jnp.logaddexp(d, 0)
    h = jnp.zeros((batch, channels, states), dtype) if initial_state is None else initial_state.astype(dtype)

    width, chunks = channels // groups, -(-length // CHUNK)

    def in_chunks(array: Array) -> Array:
        """(batch, length, ...) as (chunks, CHUNK, batch, groups, ...); the padding has step size 0: no change."""
        array = array.astype(dtype).swapaxes(0, 1)
        if reverse:
            array = array[::-1]
        array = jnp.pad(array, ((0, -length % CHUNK), *[(0, 0)] * (array.ndim - 1)))
        return array.reshape(chunks, CHUNK, batch, groups, array.shape[-1] if array.ndim == 4 else width)

    def channels_last(array: Array) -> Array:
        return array.reshape(*array.shape[:-2], groups, width, states).swapaxes(-1, -2)

    y, h = _scan(*map(in_chunks, (wide, d, B, C)), channels_last(A.astype(dtype)), channels_last(h))
    y = y.reshape(chunks * CHUNK, batch, channels)[:length]
    if reverse:
        y = y[::-1]
    y = y.swapaxes(0, 1)
    if D is not None:
        y += D.astype(dtype)[None, None] * wide
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return y.astype(x.dtype), h.swapaxes(-1, -2).reshape(batch, channels, states)


def _states(x: Array, d: Array, B: Array, A: Array, h: Array) -> tuple[list[Array], list[Array]]:
    """The decays of a chunk's positions, and the states before each of them and after the last."""
    decays, states = [], [h]
    for t in range(CHUNK):
        decays.append(jnp.exp(d[t, :, :, None] * A[None]))
        states.append(decays[t] * states[t] + (d[t] * x[t])[:, :, None] * B[t, ..., None])
    return decays, states


@jax.custom_vjp
def _scan(x: Array, d: Array, B: Array, C: Array, A: Array, h: Array) -> tuple[Array, Array]:
    """The recurrence alone.

    x and d are (chunks, CHUNK, batch, groups, width), B and C (chunks, CHUNK, batch, groups, states),
    A (groups, states, width), h (batch, groups, states, width): channels innermost, for vector units.
    """
    return _forward(x, d, B, C, A, h)[0]


def _forward(x, d, B, C, A, h):
    def chunk(h, inputs):
        x, d, B, C = inputs
        _, states = _states(x, d, B, A, h)
        y = jnp.stack([(C[t, ..., None] * states[t + 1]).sum(-2) for t in range(CHUNK)])
        return states[-1], (y, h)

    final_state, (y, starts) = jax.lax.scan(chunk, h, (x, d, B, C))
    return (y, final_state), (x, d, B, C, A, starts)


def _backward(residuals, cotangents):
    x, d, B, C, A, starts = residuals
    dy, dh = cotangents

    def chunk(carry, inputs):
        dh, dA = carry
        x, d, B, C, dy, h = inputs
        decays, states = _states(x, d, B, A, h)
        dx, dd, dB, dC = [], [], [], []
        for t in reversed(range(CHUNK)):
            dC.append((dy[t, :, :, None] * states[t + 1]).sum(-1))
            dh += dy[t, :, :, None] * C[t, ..., None]
            dB.append((dh * (d[t] * x[t])[:, :, None]).sum(-1))
            du = (dh * B[t, ..., None]).sum(-2)
            dh *= decays[t]
            exponent = dh * states[t]
            dx.append(du * d[t])
            dd.append(du * x[t] + (exponent * A[None]).sum(-2))
            dA += exponent * d[t, :, :, None]
        return (dh, dA), tuple(jnp.stack(array[::-1]) for array in (dx, dd, dB, dC))

    (dh, dA), (dx, dd, dB, dC) = jax.lax.scan(chunk, (dh, jnp.zeros_like(dh)), (x, d, B, C, dy, starts), reverse=True)
    return dx, dd, dB, dC, dA.sum(0), dh


_scan.defvjp(_forward, _backward)
