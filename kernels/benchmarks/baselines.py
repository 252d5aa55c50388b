"""Scans that the selective scan is compared with: two in plain JAX, and two of other packages if installed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def _split_groups(x: Array, delta: Array, A: Array, B: Array, delta_bias: Array) -> tuple[Array, Array, Array]:
    """Return x and step sizes as (batch, length, groups, width), A as (groups, states, width): channels innermost."""
    batch, length, channels = x.shape
    groups, states = B.shape[2:]
    shape = (batch, length, groups, channels // groups)
    d = jax.nn.softplus(delta + delta_bias[None, None])
    return x.reshape(shape), d.reshape(shape), A.reshape(groups, -1, states).swapaxes(1, 2)


def lax_scan(x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, delta_bias: Array) -> Array:
    """Scan with `jax.lax.scan` over positions, differentiated by JAX."""
    grouped_x, d, A = _split_groups(x, delta, A, B, delta_bias)

    def step(h: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, d, B, C = position
        h = jnp.exp(d[:, :, None] * A[None]) * h + (d * x)[:, :, None] * B[..., None]
        return h, (h * C[..., None]).sum(-2)

    positions = tuple(array.swapaxes(0, 1) for array in (grouped_x, d, B, C))
    _, y = jax.lax.scan(step, jnp.zeros((len(x), *A.shape)), positions)
    return y.swapaxes(0, 1).reshape(x.shape) + D[None, None] * x


def associative_scan(x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, delta_bias: Array) -> Array:
    """Scan with `jax.lax.associative_scan` over positions, differentiated by JAX."""
    grouped_x, d, A = _split_groups(x, delta, A, B, delta_bias)

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decays = jnp.exp(d[..., None, :] * A[None, None])
    _, h = jax.lax.associative_scan(compose, (decays, (d * grouped_x)[..., None, :] * B[..., None]), axis=1)
    return (h * C[..., None]).sum(-2).reshape(x.shape) + D[None, None] * x


PASSES = {"forward": False, "forward + backward": True}  # whether the pass includes the backward pass
ARGUMENTS = ("x", "delta", "A", "B", "C", "D", "delta_bias")


class Program(NamedTuple):
    """Compiled scan with its arguments, ready to run."""

    run: Callable[[], Any]  # starts the scan and returns its output
    wait_for: Callable[[Any], Any]  # waits until the output is computed and returns it
    results: Callable[[Any], Any]  # converts the output to JAX arrays: y, or y and the gradients by name
    temporary_bytes: int | None  # temporary memory; None if unknown


def jax_program(scan: Callable[..., Array]) -> Callable[..., Program]:
    """Return a function (args, dy, backward) -> Program that compiles a scan written in JAX."""

    def forward_backward(args: dict[str, Array], dy: Array) -> Any:
        y, vjp = jax.vjp(lambda args: scan(**args), args)
        return y, vjp(dy.astype(y.dtype))[0]

    def program(args: dict[str, Array], dy: Array, backward: bool) -> Program:
        function = jax.jit(forward_backward if backward else lambda args, dy: scan(**args))
        compiled = function.lower(args, dy).compile()
        temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        return Program(lambda: compiled(args, dy), jax.block_until_ready, lambda output: output, temporary_bytes)

    return program


def jax_linear_attention() -> Callable[..., Program]:
    """Load the scan of `jax-linear-attention`: Pallas kernels for Hopper that support one group.

    Raises:
        ImportError: If the package is not installed.
    """
    from jla.ops.mosaic_gpu.mamba1 import mamba1

    def scan(x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, delta_bias: Array) -> Array:
        if B.shape[2] > 1:
            raise ValueError("supports one group only")
        return mamba1(C[:, :, 0], B[:, :, 0], x, delta, A, d=D, dt_bias=delta_bias, dt_softplus=True)[0]

    return jax_program(scan)


def mamba_ssm() -> Callable[..., Program]:
    """Load the scan of `mamba-ssm`: CUDA kernels for PyTorch that read arrays with positions innermost.

    Raises:
        ImportError: If the package is not installed.
    """
    import torch
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def to_torch(array: Array) -> Any:
        return torch.from_dlpack(jax.block_until_ready(jnp.moveaxis(array, 1, -1) if array.ndim > 2 else array))

    def to_jax(tensor: Any) -> Array:
        array = jnp.from_dlpack(tensor.contiguous())
        return jnp.moveaxis(array, -1, 1) if array.ndim > 2 else array

    def wait_for(output: Any) -> Any:
        torch.cuda.synchronize()
        return output

    def program(args: dict[str, Array], dy: Array, backward: bool) -> Program:
        tensors = [to_torch(args[name]).requires_grad_(backward) for name in ARGUMENTS]
        cotangent = to_torch(dy)

        def forward() -> Any:
            *others, delta_bias = tensors
            return selective_scan_fn(*others, delta_bias=delta_bias, delta_softplus=True)

        def forward_backward() -> Any:
            y = forward()
            return y.detach(), *torch.autograd.grad(y, tensors, cotangent)

        def results(output: Any) -> Any:
            if not backward:
                return to_jax(output)
            y, *gradients = map(to_jax, output)
            return y, dict(zip(ARGUMENTS, gradients, strict=True))

        return Program(forward_backward if backward else forward, wait_for, results, None)

    return program


PEERS = {"jax-linear-attention": jax_linear_attention, "mamba-ssm": mamba_ssm}
