"""Selective scan in chunks of positions with a hand-written backward pass, for every platform that XLA supports.

The forward pass stores the state before each chunk. The backward pass walks the chunks from the last to the first,
recomputes their states and propagates the gradients through them. No array of all states, (length, channels, states),
is ever allocated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from iumad_kernels.selective_scan import reference
from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences
from iumad_kernels.selective_scan.blocks import LANES, Block, Index, Layout, loop
from iumad_kernels.selective_scan.rules import differentiable
from iumad_kernels.selective_scan.softplus import softplus


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
    batch, _, channels = x.shape
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    layout = Layout.for_arrays(x, sequences.B)
    d = sequences.delta.astype(dtype)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(dtype)[None, None]
    if options.delta_softplus:
        d = softplus(d)
    h = jnp.zeros((batch, *parameters.A.shape), dtype) if h is None else h.astype(dtype)

    inputs = _split(layout, sequences, parameters, d)
    y, h, starts = _walk(layout, inputs, layout.split_state(h), options.reverse, with_starts=differentiated)
    y = layout.unpad_sequence(y, x.shape)
    residuals = {"d": d, "starts": starts, "scanned": None if z is None else y}
    if D is not None:
        y += D.astype(dtype)[None, None] * x
    if z is not None:
        y *= jax.nn.silu(z.astype(dtype))
    return (y.astype(x.dtype), layout.merge_state(h, channels)), residuals


def _backward(
    sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple, *, options: Options
) -> tuple[Sequences, Parameters]:
    x, z, D, d = sequences.x, sequences.z, parameters.D, residuals["d"]
    channels = x.shape[2]
    layout = Layout.for_arrays(x, sequences.B)
    dy, dh = (cotangent.astype(d.dtype) for cotangent in cotangents)

    dz = dD = None
    if z is not None:
        skipped = 0 if D is None else D.astype(d.dtype)[None, None] * x
        gate, gate_backward = jax.vjp(jax.nn.silu, z.astype(d.dtype))
        (dz,) = gate_backward(dy * (residuals["scanned"] + skipped))
        dy = dy * gate
    inputs = _split(layout, sequences, parameters, d)
    gradients = _walk_back(
        layout, inputs, residuals["starts"], layout.pad_sequence(dy), layout.split_state(dh), options.reverse
    )
    dx, dd, dB, dC, dh, dA = gradients
    dx, dd = (layout.unpad_sequence(array, x.shape) for array in (dx, dd))
    dB, dC = (array[:, : x.shape[1]] for array in (dB, dC))
    if D is not None:
        dD = (dy * x).sum(1)
        dx += D.astype(d.dtype)[None, None] * dy
    if options.delta_softplus:
        dd *= -jnp.expm1(-d)  # derivative of softplus (the sigmoid), computed from the value of softplus
    dh = None if sequences.initial_state is None else layout.merge_state(dh, channels)
    dbias = None if parameters.delta_bias is None else dd.sum(1)
    dsequences = jax.tree.map(
        lambda gradient, array: gradient.astype(array.dtype), Sequences(dx, dd, dB, dC, dz, dh), sequences
    )
    return dsequences, Parameters(layout.merge_state(dA, channels), dD, dbias)


def _split(layout: Layout, sequences: Sequences, parameters: Parameters, d: Array) -> tuple[Array, ...]:
    """Convert x, d, B, C and A to the layout of the blocks."""
    x, d = layout.pad_sequence(sequences.x.astype(d.dtype)), layout.pad_sequence(d)
    B, C = (layout.pad_positions(array.astype(d.dtype)) for array in (sequences.B, sequences.C))
    return x, d, B, C, layout.split_state(parameters.A.astype(d.dtype))


def _walk(
    layout: Layout, inputs: tuple[Array, ...], h: Array, reverse: bool, with_starts: bool
) -> tuple[Array, Array, Array | None]:
    """Compute y without skip connection and gate, the final state and, if requested, the state before each chunk."""
    x, d, B, C, A = inputs

    def walk_block(block: Block, carry: tuple) -> tuple:
        y, ends, starts = carry
        A_block = block.read_parameter(A)

        def walk_chunk(c: Array, carry: tuple) -> tuple:
            h, y, starts = carry
            c = layout.chunks - 1 - c if reverse else c
            if with_starts:
                starts = block.write_start(starts, h, c)

            def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                h, y = carry
                t = c * layout.positions + (layout.positions - 1 - i if reverse else i)
                d_t = block.read(d, t)
                h = _decay(d_t, A_block) * h + _outer(block.read(B, t), d_t * block.read(x, t))
                return h, block.write_positions(y, _sum_states(block.read(C, t)[..., None], h)[None], t)

            return *loop(layout.positions, step, (h, y)), starts

        end, y, starts = loop(layout.chunks, walk_chunk, (block.read_state(h), y, starts))
        return y, block.write_state(ends, end), starts

    starts = jnp.zeros((layout.batch, layout.chunks, *h.shape[1:]), h.dtype) if with_starts else None
    return layout.walk_sequences(walk_block, (jnp.zeros_like(x), jnp.zeros_like(h), starts))


def _walk_back(
    layout: Layout, inputs: tuple[Array, ...], starts: Array, dy: Array, dh: Array, reverse: bool
) -> tuple[Array, ...]:
    """Compute the gradients of x, d, B, C, the initial state and, for each sequence, A.

    The gradient of h_t is g_t = q_{t+1} + C_t dy_t, where q_t = exp(d_t A) g_t is what it contributes to the gradient
    of h_{t-1}. With u = d x, all gradients are sums of products with q and h:

        dB_t = sum_e u_t g_t      du_t = sum_n B_t g_t                                dx_t = d_t du_t
        dC_t = sum_e dy_t h_t     dd_t = x_t du_t + sum_n A q_t h_{t-1}               dA = sum_t d_t q_t h_{t-1}

    The loops compute the sums with q and h. The sums with C dy, which need no state, are added at the end.
    """
    x, d, B, C, A = inputs
    positions = layout.positions

    def walk_block(block: Block, carry: tuple) -> tuple:
        du, dd, dB, dC, dh, dA, *scratch = carry
        A_block = block.read_parameter(A)

        def walk_chunk(c: Array, carry: tuple) -> tuple:
            # hs and qs contain h before and q after the chunk, and those of its positions in between.
            du, dd, dB, dC, q, dA, hs, qs = carry
            c = c if reverse else layout.chunks - 1 - c
            t = c * positions
            x_c, d_c, B_c, C_c, dy_c = (block.read_positions(array, t, positions) for array in (x, d, B, C, dy))
            u_c, decays = d_c * x_c, _decay(d_c, A_block[None])
            h = block.read_start(starts, c)
            hs = _set(hs, h, np.uint32(positions if reverse else 0))
            qs = _set(qs, q, np.uint32(0 if reverse else positions))

            def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                h, hs = carry
                i = positions - 1 - i if reverse else i
                h = _at(decays, i) * h + _outer(_at(B_c, i), _at(u_c, i))
                return h, _set(hs, h, i if reverse else i + 1)

            def step_back(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                q, qs, dA = carry
                i = i if reverse else positions - 1 - i
                q = _at(decays, i) * (q + _outer(_at(C_c, i), _at(dy_c, i)))
                dA += _at(d_c, i)[..., None, :] * q * _at(hs, i + 1 if reverse else i)
                return q, _set(qs, q, i + 1 if reverse else i), dA

            _, hs = loop(positions, step, (h, hs))
            q, qs, dA = loop(positions, step_back, (q, qs, dA))
            before, after = (slice(1, None), slice(-1)) if reverse else (slice(-1), slice(1, None))
            dB_c, dC_c = _sum_channels(layout, u_c, qs[after]), _sum_channels(layout, dy_c, hs[after])
            dB = block.write_positions(dB, dB_c + block.read_positions(dB, t, positions), t)
            dC = block.write_positions(dC, dC_c + block.read_positions(dC, t, positions), t)
            du = block.write_positions(du, _sum_states(B_c[..., None], qs[after]), t)
            dd = block.write_positions(dd, _sum_states(A_block[None], qs[before], hs[before]), t)
            return du, dd, dB, dC, q, dA, hs, qs

        carry = (du, dd, dB, dC, block.read_state(dh), block.read_state(dA), *scratch)
        du, dd, dB, dC, q, dA_block, *scratch = loop(layout.chunks, walk_chunk, carry)
        return du, dd, dB, dC, block.write_state(dh, q), block.write_state(dA, dA_block), *scratch

    zeros = functools.partial(jnp.zeros, dtype=d.dtype)
    partial_sums = zeros((*B.shape, LANES if layout.on_cpu else 1))
    scratch = zeros((positions + 1, *((1, 1, 1) if layout.on_cpu else dh.shape[:3]), *dh.shape[3:]))
    carry = (zeros(x.shape), zeros(x.shape), partial_sums, partial_sums, dh, zeros(dh.shape), scratch, scratch)
    du, dd, dB, dC, dh, dA, *_ = layout.walk_parts(walk_block, carry)

    def by_group(array: Array) -> Array:
        return array.reshape(*array.shape[:2], layout.groups, -1)

    du += ((B * C).sum(-1, keepdims=True) * by_group(dy)).reshape(du.shape)
    dB = dB.sum(-1) + by_group(d * x * dy).sum(-1, keepdims=True) * C
    return du * d, dd + du * x, dB, dC.sum(-1), dh, dA


def _set(array: Array, value: Array, i: Index) -> Array:
    return lax.dynamic_update_index_in_dim(array, value, i, 0)


def _at(array: Array, i: Index) -> Array:
    return lax.dynamic_index_in_dim(array, i, keepdims=False)


def _outer(states: Array, channels: Array) -> Array:
    return states[..., None] * channels[..., None, :]


def _decay(d: Array, A: Array) -> Array:
    return jnp.exp(d[..., None, :] * A)


def _sum_states(*factors: Array) -> Array:
    """Sum the product of the factors over the states."""
    products = (
        functools.reduce(jnp.multiply, (factor[..., n, :] for factor in factors)) for n in range(factors[-1].shape[-2])
    )
    return _add(list(products))


def _sum_channels(layout: Layout, channels: Array, state: Array) -> Array:
    """Sum the product over the channels: into LANES partial sums on CPU, otherwise into one sum."""
    channels = channels[..., None, :]
    if not layout.on_cpu:
        return (channels * state).sum(-1, keepdims=True)
    return _add([channels[..., i : i + LANES] * state[..., i : i + LANES] for i in range(0, layout.width, LANES)])


def _add(terms: list[Array]) -> Array:
    """Add the terms in pairs. XLA vectorises neither a reduction nor a matrix product of these sizes well on CPU."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return _add(terms[:half]) + _add(terms[half:])
