"""What the selective scan is compared with: the two scans that JAX has, and other packages if they are installed."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def _in_groups(x: Array, delta: Array, A: Array, B: Array, delta_bias: Array) -> tuple[Array, Array, Array]:
    """X and step sizes as (batch, length, groups, width), A as (groups, states, width): channels innermost."""
    batch, length, channels = x.shape
    groups, states = B.shape[2:]
    shape = (batch, length, groups, channels // groups)
    d = jax.nn.softplus(delta + delta_bias[None, None])
    return x.reshape(shape), d.reshape(shape), A.reshape(groups, -1, states).swapaxes(1, 2)


def lax_scan(x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, delta_bias: Array) -> Array:
    """`jax.lax.scan` over positions, differentiated by JAX."""
    grouped, d, A = _in_groups(x, delta, A, B, delta_bias)

    def step(h: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, d, B, C = position
        h = jnp.exp(d[:, :, None] * A[None]) * h + (d * x)[:, :, None] * B[..., None]
        return h, (h * C[..., None]).sum(-2)

    positions = tuple(array.swapaxes(0, 1) for array in (grouped, d, B, C))
    _, y = jax.lax.scan(step, jnp.zeros((len(x), *A.shape)), positions)
    return y.swapaxes(0, 1).reshape(x.shape) + D[None, None] * x


def associative_scan(x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, delta_bias: Array) -> Array:
    """`jax.lax.associative_scan` over positions, differentiated by JAX."""
    grouped, d, A = _in_groups(x, delta, A, B, delta_bias)

    def then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decays = jnp.exp(d[..., None, :] * A[None, None])
    _, h = jax.lax.associative_scan(then, (decays, (d * grouped)[..., None, :] * B[..., None]), axis=1)
    return (h * C[..., None]).sum(-2).reshape(x.shape) + D[None, None] * x


def peers() -> dict[str, Callable[..., Array]]:
    """Other packages' scans that are installed, for one group."""
    found: dict[str, Callable[..., Array]] = {}
    if importlib.util.find_spec("jla"):
        from jla.ops.mosaic_gpu.mamba1 import mamba1

        def jax_linear_attention(x, delta, A, B, C, D, delta_bias):
            options = {"d": D, "dt_bias": delta_bias, "dt_softplus": True, "scale": 1.0}
            return mamba1(C[:, :, 0], B[:, :, 0], x, delta, A, **options)[0]

        found["jax-linear-attention"] = jax_linear_attention
    return found
