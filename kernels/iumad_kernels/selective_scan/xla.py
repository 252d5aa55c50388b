"""The selective scan in chunks of positions, with a hand-written backward pass, for any platform that XLA serves.

The forward pass keeps the states at the starts of chunks; the backward pass walks the chunks from the last to the
first, recomputes each one's states and propagates the gradients through it. No (length, channels, states) array
exists.
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

LARGE = 2**20  # elements of all states of a scan

# Without it, XLA would rather compute a state again from the chunk's first one than read it.
_keep = jax.lax.optimization_barrier

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)  # not bfloat16 (TPU) nor TF32 (GPU)


def selective_scan(sequences: Sequences, parameters: Parameters, options: Options) -> tuple[Array, Array]:
    """See `iumad_kernels.selective_scan`."""
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
    blocks = Blocks.of(x, sequences.B)
    d = sequences.delta.astype(dtype)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(dtype)[None, None]
    if options.delta_softplus:
        d = softplus(d)
    h = jnp.zeros((batch, *parameters.A.shape), dtype) if h is None else h.astype(dtype)

    inputs = _inputs(blocks, sequences, parameters, d)
    walk = functools.partial(
        _walk, inputs, blocks.of_state(h), blocks=blocks, reverse=options.reverse, with_starts=differentiated
    )
    y, h, starts = _two_halves(walk, x, sequences.B.shape[3])
    y = blocks.to_channels(blocks.to_positions(y, length), channels)
    residuals = {"d": d, "starts": starts, "scanned": None if z is None else y}
    if D is not None:
        y += D.astype(dtype)[None, None] * x
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return (y.astype(x.dtype), blocks.to_state(h, channels)), residuals


def _backward(
    sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple, *, options: Options
) -> tuple[Sequences, Parameters]:
    x, z, D, d = sequences.x, sequences.z, parameters.D, residuals["d"]
    _, length, channels = x.shape
    blocks = Blocks.of(x, sequences.B)
    dy, dh = (cotangent.astype(d.dtype) for cotangent in cotangents)

    dz = dD = None
    if z is not None:
        skipped = 0 if D is None else D.astype(d.dtype)[None, None] * x
        gate, gate_backward = jax.vjp(jax.nn.silu, z.astype(d.dtype))
        (dz,) = gate_backward(dy * (residuals["scanned"] + skipped))
        dy = dy * gate
    inputs = _inputs(blocks, sequences, parameters, d)
    cotangents = (blocks.of_channels(blocks.of_positions(dy)), blocks.of_state(dh))
    walk = functools.partial(
        _walk_back, inputs, residuals["starts"], *cotangents, blocks=blocks, reverse=options.reverse
    )
    dx, dd, dB, dC, dh, dA = _two_halves(walk, x, sequences.B.shape[3])
    dx, dd, dB, dC = (blocks.to_positions(array, length) for array in (dx, dd, dB, dC))
    dx, dd = (blocks.to_channels(array, channels) for array in (dx, dd))
    if D is not None:
        dD = (dy * x).sum(1)
        dx += D.astype(d.dtype)[None, None] * dy
    if options.delta_softplus:
        dd *= -jnp.expm1(-d)  # softplus' derivative, the sigmoid, from softplus itself
    dh = None if sequences.initial_state is None else blocks.to_state(dh, channels)
    dbias = None if parameters.delta_bias is None else dd.sum(1)
    of_sequences = jax.tree.map(
        lambda gradient, of: gradient.astype(of.dtype), Sequences(dx, dd, dB, dC, dz, dh), sequences
    )
    return of_sequences, Parameters(blocks.to_state(dA, channels), dD, dbias)


def _inputs(blocks: Blocks, sequences: Sequences, parameters: Parameters, d: Array) -> tuple[Array, ...]:
    """x, d, B, C and A in blocks."""
    x, B, C = (blocks.of_positions(array.astype(d.dtype)) for array in (sequences.x, sequences.B, sequences.C))
    A = blocks.of_state(parameters.A.astype(d.dtype))
    return blocks.of_channels(x), blocks.of_channels(blocks.of_positions(d)), B, C, A


def _two_halves(walk: Callable[[range], Any], x: Array, states: int) -> Any:
    """The walk over each half of the batch: XLA runs the two at the same time on CPU. A small one is not worth it."""
    batch = len(x)
    if batch == 1 or x.size * states < LARGE or jax.default_backend() != "cpu":
        return walk(range(batch))
    halves = walk(range(batch // 2)), walk(range(batch // 2, batch))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)


def _walk(
    inputs: tuple[Array, ...], h: Array, batch: range, *, blocks: Blocks, reverse: bool, with_starts: bool
) -> tuple[Array, Array, Array | None]:
    """What the states give, the last state, and, if wanted, the states before each chunk."""
    x, d, B, C, A = inputs

    def block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        y, ends, starts = carry
        here = blocks.block(number, batch.start)

        def chunk(c: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            h, y, starts = carry
            c = blocks.chunks - 1 - c if reverse else c
            if with_starts:
                starts = here.write_start(starts, h, c)
            x_, d_, B_, C_ = (here.read(array, c) for array in (x, d, B, C))
            y_ = {}
            for t in _order(blocks, reverse):
                h = _keep(_decay(d_[t], A_) * h + _outer(B_[t], d_[t] * x_[t]))
                y_[t] = _einsum("bgn,bgnw->bgw", C_[t], h)
            return h, here.write(y, y_, c), starts

        A_ = here.read_parameter(A)
        end, y, starts = jax.lax.fori_loop(0, blocks.chunks, chunk, (here.read_state(h), y, starts))
        return y, here.write_state(ends, end), starts

    starts = jnp.zeros((len(batch), blocks.chunks, *h.shape[1:]), h.dtype) if with_starts else None
    carry = (jnp.zeros((len(batch), *x.shape[1:]), x.dtype), jnp.zeros((len(batch), *h.shape[1:]), h.dtype), starts)
    return jax.lax.fori_loop(0, blocks.number(len(batch)), block, carry)


def _walk_back(
    inputs: tuple[Array, ...], starts: Array, dy: Array, dh: Array, batch: range, *, blocks: Blocks, reverse: bool
) -> tuple[Array, ...]:
    """The gradients of x, d, B, C, the initial state and, by sequence, A."""
    x, d, B, C, A = inputs

    def block(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *outputs, ends, dA = carry
        here = blocks.block(number, batch.start)

        def chunk(c: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dx, dd, dB, dC, dh, dA = carry
            c = c if reverse else blocks.chunks - 1 - c
            x_, d_, B_, C_, dy_ = (here.read(array, c) for array in (x, d, B, C, dy))
            decays, before, after = {}, {}, {}
            h = here.read_start(starts, c)
            for t in _order(blocks, reverse):
                decays[t], before[t] = _keep(_decay(d_[t], A_)), h
                h = after[t] = _keep(decays[t] * h + _outer(B_[t], d_[t] * x_[t]))
            dx_, dd_, dB_, dC_ = {}, {}, {}, {}
            for t in _order(blocks, not reverse):
                dh = _keep(dh + _outer(C_[t], dy_[t]))
                dC_[t] = _einsum("bgw,bgnw->bgn", dy_[t], after[t])
                dB_[t] = _einsum("bgw,bgnw->bgn", d_[t] * x_[t], dh)
                du = _keep(_einsum("bgn,bgnw->bgw", B_[t], dh))
                dh = _keep(decays[t] * dh)
                dx_[t] = du * d_[t]
                dd_[t] = du * x_[t] + _keep(_sum_states(A_[None], dh, before[t]))
                dA = _keep(dA + d_[t][..., None, :] * dh * before[t])
            dB, dC = here.add(dB, dB_, c), here.add(dC, dC_, c)
            return here.write(dx, dx_, c), here.write(dd, dd_, c), dB, dC, dh, dA

        A_ = here.read_parameter(A)
        carry = (*outputs, here.read_state(dh), jnp.zeros((blocks.batch, *A_.shape), A.dtype))
        *outputs, end, dA_ = jax.lax.fori_loop(0, blocks.chunks, chunk, carry)
        return *outputs, here.write_state(ends, end), here.write_state(dA, dA_)

    outputs = [jnp.zeros((len(batch), *array.shape[1:]), array.dtype) for array in (x, d, B, C, dh, dh)]
    return jax.lax.fori_loop(0, blocks.number(len(batch)), block, tuple(outputs))


def _order(blocks: Blocks, backwards: bool) -> range:
    return range(blocks.positions)[:: -1 if backwards else 1]


def _outer(states: Array, channels: Array) -> Array:
    return states[..., None] * channels[..., None, :]


def _decay(d: Array, A: Array) -> Array:
    return jnp.exp(d[..., None, :] * A[None])


def _sum_states(*factors: Array) -> Array:
    """Their product summed over the states: written out, as XLA does not vectorise this sum on CPU."""
    products = (
        functools.reduce(jnp.multiply, (factor[..., n, :] for factor in factors)) for n in range(factors[0].shape[-2])
    )
    return functools.reduce(jnp.add, products)
