"""Selective scan in chunks of positions with a hand-written backward pass, for every platform that XLA supports.

The forward pass stores the state before each chunk. The backward pass walks the chunks from the last to the first,
recomputes their states and propagates the gradients through them. No array of all states, (length, channels, states),
is ever allocated.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from iumad_kernels.selective_scan import reference
from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences
from iumad_kernels.selective_scan.blocks import Blocks
from iumad_kernels.selective_scan.rules import differentiable
from iumad_kernels.selective_scan.softplus import softplus

HALVED_ELEMENTS = 2**20  # smallest size of all states of a scan that is walked in two halves

# Without this barrier, XLA recomputes a state from the first state of its chunk instead of reading it.
_keep = jax.lax.optimization_barrier

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # neither bfloat16 (TPU) nor TF32 (GPU)


def selective_scan(sequences: Sequences, parameters: Parameters, options: Options) -> tuple[Array, Array]:
    """Compute y and the final state of `iumad_kernels.selective_scan`, in chunks of positions."""
    scan = differentiable(
        functools.partial(_forward, options=options),
        functools.partial(_backward, options=options),
        functools.partial(reference.selective_scan, options=options),
    )
    return scan(sequences, parameters)


def _forward(
    sequences: Sequences, parameters: Parameters, *, options: Options, differentiated: bool
) -> tuple[tuple, dict]:
    x, z, h, D = sequences.x, sequences.z, sequences.initial_state, parameters.D
    batch, length, channels = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    blocks = Blocks.for_arrays(x, sequences.B)
    d = sequences.delta.astype(dtype)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(dtype)[None, None]
    if options.delta_softplus:
        d = softplus(d)
    h = jnp.zeros((batch, *parameters.A.shape), dtype) if h is None else h.astype(dtype)

    inputs = _block_inputs(blocks, sequences, parameters, d)
    walk = functools.partial(
        _walk, inputs, blocks.split_state(h), blocks=blocks, reverse=options.reverse, with_starts=differentiated
    )
    y, h, starts = _walk_halves(walk, x, sequences.B.shape[3])
    y = blocks.merge_channels(blocks.merge_positions(y, length), channels)
    residuals = {"d": d, "starts": starts, "scanned": None if z is None else y}
    if D is not None:
        y += D.astype(dtype)[None, None] * x
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return (y.astype(x.dtype), blocks.merge_state(h, channels)), residuals


def _backward(
    sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple, *, options: Options
) -> tuple[Sequences, Parameters]:
    x, z, D, d = sequences.x, sequences.z, parameters.D, residuals["d"]
    _, length, channels = x.shape
    blocks = Blocks.for_arrays(x, sequences.B)
    dy, dh = (cotangent.astype(d.dtype) for cotangent in cotangents)

    dz = dD = None
    if z is not None:
        skipped = 0 if D is None else D.astype(d.dtype)[None, None] * x
        gate, gate_backward = jax.vjp(jax.nn.silu, z.astype(d.dtype))
        (dz,) = gate_backward(dy * (residuals["scanned"] + skipped))
        dy = dy * gate
    inputs = _block_inputs(blocks, sequences, parameters, d)
    cotangents = (blocks.split_channels(blocks.split_positions(dy)), blocks.split_state(dh))
    walk = functools.partial(
        _walk_back, inputs, residuals["starts"], *cotangents, blocks=blocks, reverse=options.reverse
    )
    dx, dd, dB, dC, dh, dA = _walk_halves(walk, x, sequences.B.shape[3])
    dx, dd, dB, dC = (blocks.merge_positions(array, length) for array in (dx, dd, dB, dC))
    dx, dd = (blocks.merge_channels(array, channels) for array in (dx, dd))
    if D is not None:
        dD = (dy * x).sum(1)
        dx += D.astype(d.dtype)[None, None] * dy
    if options.delta_softplus:
        dd *= -jnp.expm1(-d)  # derivative of softplus (the sigmoid), computed from the value of softplus
    dh = None if sequences.initial_state is None else blocks.merge_state(dh, channels)
    dbias = None if parameters.delta_bias is None else dd.sum(1)
    dsequences = jax.tree.map(
        lambda gradient, array: gradient.astype(array.dtype), Sequences(dx, dd, dB, dC, dz, dh), sequences
    )
    return dsequences, Parameters(blocks.merge_state(dA, channels), dD, dbias)


def _block_inputs(blocks: Blocks, sequences: Sequences, parameters: Parameters, d: Array) -> tuple[Array, ...]:
    """Convert x, d, B, C and A to the layout of the blocks."""
    x, B, C = (blocks.split_positions(array.astype(d.dtype)) for array in (sequences.x, sequences.B, sequences.C))
    A = blocks.split_state(parameters.A.astype(d.dtype))
    return blocks.split_channels(x), blocks.split_channels(blocks.split_positions(d)), B, C, A


def _walk_halves(walk: Callable[[range], Any], x: Array, states: int) -> Any:
    """Walk the two halves of the batch separately if the scan is large: on CPU, XLA runs them in parallel."""
    batch = len(x)
    if batch == 1 or x.size * states < HALVED_ELEMENTS or jax.default_backend() != "cpu":
        return walk(range(batch))
    halves = walk(range(batch // 2)), walk(range(batch // 2, batch))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)


def _walk(
    inputs: tuple[Array, ...], h: Array, batch: range, *, blocks: Blocks, reverse: bool, with_starts: bool
) -> tuple[Array, Array, Array | None]:
    """Compute y without skip connection and gate, the final state and, if requested, the state before each chunk."""
    x, d, B, C, A = inputs

    def walk_block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        y, ends, starts = carry
        block = blocks.block(number, batch.start)

        def walk_chunk(c: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            h, y, starts = carry
            c = blocks.chunks - 1 - c if reverse else c
            if with_starts:
                starts = block.write_start(starts, h, c)
            x_c, d_c, B_c, C_c = (block.read(array, c) for array in (x, d, B, C))
            y_c = {}
            for t in _order(blocks, reverse):
                h = _keep(_decay(d_c[t], A_block) * h + _outer(B_c[t], d_c[t] * x_c[t]))
                y_c[t] = _einsum("bgn,bgnw->bgw", C_c[t], h)
            return h, block.write(y, y_c, c), starts

        A_block = block.read_parameter(A)
        end, y, starts = jax.lax.fori_loop(0, blocks.chunks, walk_chunk, (block.read_state(h), y, starts))
        return y, block.write_state(ends, end), starts

    starts = jnp.zeros((len(batch), blocks.chunks, *h.shape[1:]), h.dtype) if with_starts else None
    carry = (jnp.zeros((len(batch), *x.shape[1:]), x.dtype), jnp.zeros((len(batch), *h.shape[1:]), h.dtype), starts)
    return jax.lax.fori_loop(0, blocks.number_of_blocks(len(batch)), walk_block, carry)


def _walk_back(
    inputs: tuple[Array, ...], starts: Array, dy: Array, dh: Array, batch: range, *, blocks: Blocks, reverse: bool
) -> tuple[Array, ...]:
    """Compute the gradients of x, d, B, C, the initial state and, for each sequence, A."""
    x, d, B, C, A = inputs

    def walk_block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *outputs, ends, dA = carry
        block = blocks.block(number, batch.start)

        def walk_chunk(c: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dx, dd, dB, dC, dh, dA = carry
            c = c if reverse else blocks.chunks - 1 - c
            x_c, d_c, B_c, C_c, dy_c = (block.read(array, c) for array in (x, d, B, C, dy))
            decays, before, after = {}, {}, {}
            h = block.read_start(starts, c)
            for t in _order(blocks, reverse):
                decays[t], before[t] = _keep(_decay(d_c[t], A_block)), h
                h = after[t] = _keep(decays[t] * h + _outer(B_c[t], d_c[t] * x_c[t]))
            dx_c, dd_c, dB_c, dC_c = {}, {}, {}, {}
            for t in _order(blocks, not reverse):
                dh = _keep(dh + _outer(C_c[t], dy_c[t]))
                dC_c[t] = _einsum("bgw,bgnw->bgn", dy_c[t], after[t])
                dB_c[t] = _einsum("bgw,bgnw->bgn", d_c[t] * x_c[t], dh)
                du = _keep(_einsum("bgn,bgnw->bgw", B_c[t], dh))
                dh = _keep(decays[t] * dh)
                dx_c[t] = du * d_c[t]
                dd_c[t] = du * x_c[t] + _keep(_sum_states(A_block[None], dh, before[t]))
                dA = _keep(dA + d_c[t][..., None, :] * dh * before[t])
            dB, dC = block.add(dB, dB_c, c), block.add(dC, dC_c, c)
            return block.write(dx, dx_c, c), block.write(dd, dd_c, c), dB, dC, dh, dA

        A_block = block.read_parameter(A)
        carry = (*outputs, block.read_state(dh), jnp.zeros((blocks.batch, *A_block.shape), A.dtype))
        *outputs, end, dA_block = jax.lax.fori_loop(0, blocks.chunks, walk_chunk, carry)
        return *outputs, block.write_state(ends, end), block.write_state(dA, dA_block)

    outputs = [jnp.zeros((len(batch), *array.shape[1:]), array.dtype) for array in (x, d, B, C, dh, dh)]
    return jax.lax.fori_loop(0, blocks.number_of_blocks(len(batch)), walk_block, tuple(outputs))


def _order(blocks: Blocks, backwards: bool) -> range:
    return range(blocks.positions)[:: -1 if backwards else 1]


def _outer(states: Array, channels: Array) -> Array:
    return states[..., None] * channels[..., None, :]


def _decay(d: Array, A: Array) -> Array:
    return jnp.exp(d[..., None, :] * A[None])


def _sum_states(*factors: Array) -> Array:
    """Sum the product of the factors over the states. The sum is unrolled, as XLA does not vectorise it on CPU."""
    products = (
        functools.reduce(jnp.multiply, (factor[..., n, :] for factor in factors)) for n in range(factors[0].shape[-2])
    )
    return functools.reduce(jnp.add, products)
