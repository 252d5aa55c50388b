"""Selective scan as two Pallas Mosaic GPU kernels, for NVIDIA Hopper and newer.

Each block of threads (one warpgroup) walks a sequence, or a segment of it, for 8 to 32 channels per warp. The state
stays in registers; TMA loads the next tile of positions while the current tile is processed. The forward kernel stores
the state before each tile. The backward kernel walks the tiles from the last to the first; in each tile it recomputes
the states into shared memory and then propagates the gradients. All sums over threads are shuffles within a warp: the
gradients of B and C leave the kernel as one partial sum per warp and are added up outside. Without atomics, the results
are deterministic.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from iumad_kernels.selective_scan import reference
from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences
from iumad_kernels.selective_scan.rules import differentiable
from iumad_kernels.selective_scan.segments import segmented_passes
from iumad_kernels.selective_scan.softplus import softplus
from iumad_kernels.selective_scan.tiling import TILE, WARPS, Tiling

MAX_STATES = 128
LOG2_E = math.log2(math.e)
PROCESSORS = 132  # number of processors of an H100 or H200; one block of threads occupies one of them
MIN_SEGMENT = 64  # smallest number of positions of a segment

interpret: Any = None  # plgpu.InterpretGPUParams to run the kernels on CPU in tests


def obstacle(dtype: Any, states: int) -> str | None:
    """Return why the kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and not device.compute_capability.startswith("gfx")  # AMD reports names
    on_hopper = nvidia and float(device.compute_capability) >= 9
    if interpret is None and not on_hopper:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer; found {device.device_kind}"
    if dtype == jnp.float64:
        return "it computes in float32; x is float64"
    if states > MAX_STATES:
        return f"it supports up to {MAX_STATES} states; got {states}"
    return None


def selective_scan(sequences: Sequences, parameters: Parameters, options: Options) -> tuple[Array, Array]:
    """Compute y and the final state of `iumad_kernels.selective_scan` by GPU kernels."""
    scan = differentiable(
        *segmented_passes(_forward, _backward, _number_of_segments, options),
        functools.partial(reference.selective_scan, options=options),
    )
    return scan(sequences, parameters)


def _number_of_segments(x: Array, B: Array) -> int:
    """Return the number of segments to scan in parallel, which is 1 if fewer than four fit on the processors."""
    batch, length, channels = x.shape
    tiling = Tiling(length, channels, *B.shape[2:])
    limit = PROCESSORS // (batch * tiling.groups * tiling.blocks_per_group)
    number = max((n for n in range(1, limit + 1) if length % (n * TILE) == 0 and length >= n * MIN_SEGMENT), default=1)
    return number if number >= 4 else 1


class Layouts:
    """Distribution over threads of a state, (WARPS, states, width), and of its rows along states and channels."""

    def __init__(self, tiling: Tiling, channels_of_thread: int):
        self.shape = (WARPS, tiling.padded_states, tiling.width)
        lanes = tiling.width // channels_of_thread
        lane_dims = (-2,) if lanes == 32 else (-3, -2)
        tile = (WARPS, 32 // lanes, tiling.width)
        self.state = plgpu.Layout.TILED(
            plgpu.Tiling((tile, (channels_of_thread,))), warp_dims=(-4,), lane_dims=lane_dims, vector_dim=-1
        )
        self.channels, self.states = self.state.reduce(1), self.state.reduce((0, 2))

    def row(self, values: Array) -> Array:
        """Distribute the channels of one position, (WARPS, width), and convert them to float32."""
        return plgpu.layout_cast(values, self.channels).astype(jnp.float32)

    def over_states(self, row: Array) -> Array:
        """Broadcast channels, (WARPS, width), over the states."""
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(row, self.shape, (0, 2)), self.state)

    def over_channels(self, values: Array) -> Array:
        """Broadcast states, (states,), over the channels."""
        values = plgpu.layout_cast(values, self.states)
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(values, self.shape, (1,)), self.state)

    def zeros(self) -> Array:
        """Return a state of zeros."""
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.state)


def _run(
    body: Callable[..., None], inputs: dict, outputs: dict, layouts: Layouts, *, states: int, **scratch: Any
) -> dict:
    """Run body(sequence, block, inputs, outputs, fetch, states, **scratch) for every sequence and block of channels.

    Args:
        body: Body of the kernel. `inputs` and `outputs` are references by name, `fetch(name, *index)` loads a state or
            a row of channels of an input, and `states` is shared memory for states.
        inputs: Arrays by name; None if absent.
        outputs: Shapes and dtypes by name.
        layouts: Distribution of the state over threads.
        states: Number of states that fit in the shared memory.
        scratch: Further shared memory, by name.

    Returns:
        Output arrays by name.
    """
    batch, _, blocks = inputs["x"].shape[:3]
    input_names = [name for name, array in inputs.items() if array is not None]

    def kernel_body(*refs: Any, row: Any, states: Any, barrier: Any, **scratch: Any) -> None:
        input_refs: dict[str, Any] = dict.fromkeys(inputs)
        input_refs |= dict(zip(input_names, refs, strict=False))
        output_refs = dict(zip(outputs, refs[len(input_names) :], strict=True))

        def fetch(name: str, *index: Array) -> Any:
            if input_refs[name] is None:
                return None
            buffer, layout = (states.at[0], layouts.state) if name in ("A", "h") else (row, layouts.channels)
            plgpu.copy_gmem_to_smem(input_refs[name].at[index], buffer, barrier)
            plgpu.barrier_wait(barrier)
            values = plgpu.layout_cast(buffer[...], layout)
            plgpu.commit_smem()  # all threads have read the buffer before it is filled again
            return values

        b, j = jax.lax.axis_index("sequence"), jax.lax.axis_index("block")
        body(b, j, input_refs, output_refs, fetch, states, **scratch)

    kernel = plgpu.kernel(
        kernel_body,
        out_type=tuple(outputs.values()),
        scratch_types={
            "row": plgpu.SMEM(layouts.shape[::2], jnp.float32),
            "states": plgpu.SMEM((states, *layouts.shape), jnp.float32),
            "barrier": plgpu.Barrier(),
            **scratch,
        },
        grid=(batch, blocks),
        grid_names=("sequence", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return dict(zip(outputs, kernel(*(inputs[name] for name in input_names)), strict=True))


def _forward(
    sequences: Sequences, parameters: Parameters, *, options: Options, differentiated: bool
) -> tuple[tuple, dict]:
    x, delta, B, C, z, h = sequences
    batch, length, channels = x.shape
    tiling = Tiling(length, channels, *B.shape[2:])
    layouts = Layouts(tiling, channels_of_thread=1)
    tiles = tiling.tiles
    inputs: dict[str, Any] = {
        "x": tiling.tile_sequence(x),
        "delta": tiling.tile_sequence(delta),
        "B": tiling.pad_projection(B),
        "C": tiling.pad_projection(C),
        "z": None if z is None else tiling.tile_sequence(z),
        "A": tiling.tile_state(parameters.A) * LOG2_E,
        "h": None if h is None else tiling.tile_state(h),
        "D": _tile_parameter(tiling, parameters.D),
        "bias": _tile_parameter(tiling, parameters.delta_bias),
    }
    blocks = inputs["x"].shape[2]
    sequence = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.float32)
    state = jax.ShapeDtypeStruct((batch, blocks, *layouts.shape), jnp.float32)
    outputs = {"y": sequence, "h": state}
    if differentiated:
        outputs |= {
            "d": sequence,
            "starts": jax.ShapeDtypeStruct((batch * tiles * blocks, *layouts.shape), jnp.float32),
        }
        outputs |= {} if z is None else {"scanned": sequence}

    def body(b: Array, j: Array, input_refs: dict, output_refs: dict, fetch: Callable, states: Any) -> None:
        A, D, bias, h = fetch("A", j), fetch("D", j), fetch("bias", j), fetch("h", b, j)

        def tile(index: tuple[Array], x_s: Any, delta_s: Any, B_s: Any, C_s: Any, *z_and_h: Any) -> Array:
            *z_s, h = z_and_h
            first = _ordered(index[0], tiles, options.reverse) * TILE
            if differentiated:
                output_refs["starts"][_start_index(index[0], b, j, tiles, blocks, options.reverse)] = h

            def position(t: Array, h: Array) -> Array:
                t = _ordered(t, TILE, options.reverse)
                output_index = b, first + t, j
                x, d = layouts.row(x_s[t]), layouts.row(delta_s[t])
                if bias is not None:
                    d += bias
                if options.delta_softplus:
                    d = softplus(d)
                if tiles * TILE > length:
                    d *= (first + t < length).astype(jnp.float32)  # step size 0 changes no state
                decay = jnp.exp2(layouts.over_states(d) * A)
                h = decay * h + layouts.over_states(d * x) * layouts.over_channels(B_s[t])
                y = (h * layouts.over_channels(C_s[t])).sum(1)
                if D is not None:
                    y += D * x
                if differentiated:
                    output_refs["d"][output_index] = d
                if z_s:
                    if differentiated:
                        output_refs["scanned"][output_index] = y
                    gate = layouts.row(z_s[0][t])
                    y *= gate / (1 + jnp.exp(-gate))
                output_refs["y"][output_index] = y
                return h

            h = jax.lax.fori_loop(0, TILE, position, h, unroll=2)
            plgpu.commit_smem()
            return h

        h = layouts.zeros() if h is None else h
        group = j // tiling.blocks_per_group
        streamed = [
            input_refs["x"].at[b, :, j],
            input_refs["delta"].at[b, :, j],
            input_refs["B"].at[b, :, group],
            input_refs["C"].at[b, :, group],
        ]
        if input_refs["z"] is not None:
            streamed.append(input_refs["z"].at[b, :, j])
        output_refs["h"][b, j] = plgpu.emit_pipeline(
            tile,
            grid=(tiles,),
            in_specs=[_tile_spec(ref, tiles, options.reverse) for ref in streamed],
            max_concurrent_steps=2,
            init_carry=h,
        )(*streamed)

    arrays = _run(body, inputs, outputs, layouts, states=1)
    y, h = tiling.untile_sequence(arrays.pop("y")).astype(x.dtype), tiling.untile_state(arrays.pop("h"))
    return (y, h), arrays


def _backward(
    sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple, *, options: Options
) -> tuple[Sequences, Parameters]:
    x, _, B, C, z, h = sequences
    batch, length, channels = x.shape
    tiling = Tiling(length, channels, *B.shape[2:])
    layouts = Layouts(tiling, channels_of_thread=tiling.width // 8)
    tiles = tiling.tiles
    dy, dh = cotangents
    dz = None
    if z is not None:
        gate, gate_backward = jax.vjp(jax.nn.silu, z.astype(jnp.float32))
        (dz,) = gate_backward(dy.astype(jnp.float32) * tiling.untile_sequence(residuals["scanned"]))
        dy = dy.astype(jnp.float32) * gate
    inputs: dict[str, Any] = {
        "x": tiling.tile_sequence(x),
        "d": residuals["d"],
        "dy": tiling.tile_sequence(dy),
        "B": tiling.pad_projection(B),
        "C": tiling.pad_projection(C),
        "starts": residuals["starts"],
        "A": tiling.tile_state(parameters.A),
        "h": tiling.tile_state(dh),
        "D": _tile_parameter(tiling, parameters.D),
    }
    blocks = inputs["x"].shape[2]
    sequence = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.float32)
    state = jax.ShapeDtypeStruct((batch, blocks, *layouts.shape), jnp.float32)
    channel_sums = jax.ShapeDtypeStruct((batch, *sequence.shape[2:]), jnp.float32)
    partial_sums = jax.ShapeDtypeStruct((*sequence.shape[:3], *layouts.shape[:2]), jnp.float32)
    outputs = {
        "x": sequence,
        "delta": sequence,
        "B": partial_sums,
        "C": partial_sums,
        "A": state,
        "h": state,
        "D": channel_sums,
        "bias": channel_sums,
    }

    def body(
        b: Array, j: Array, input_refs: dict, output_refs: dict, fetch: Callable, states: Any, dB_s: Any, dC_s: Any
    ) -> None:
        A, D, dh = fetch("A", j), fetch("D", j), fetch("h", b, j)

        def tile(
            index: tuple[Array], x_s: Any, d_s: Any, dy_s: Any, B_s: Any, C_s: Any, start_s: Any, carry: Any
        ) -> Any:
            first = _ordered(index[0], tiles, not options.reverse) * TILE

            def recompute(t: Array, h: Array) -> Array:
                t = _ordered(t, TILE, options.reverse)
                states[t] = h
                x, d, dy = layouts.row(x_s[t]), layouts.row(d_s[t]), layouts.row(dy_s[t])
                decay = jnp.exp2(layouts.over_states(d * LOG2_E) * A)
                h = decay * h + layouts.over_states(d * x) * layouts.over_channels(B_s[t])
                dC_s[t] = (h * layouts.over_states(dy)).sum(2)
                return h

            def propagate(t: Array, carry: Any) -> Any:
                dh, dA, dD, dbias = carry
                t = _ordered(t, TILE, not options.reverse)
                output_index = b, first + t, j
                x, d, dy = layouts.row(x_s[t]), layouts.row(d_s[t]), layouts.row(dy_s[t])
                dh += layouts.over_states(dy) * layouts.over_channels(C_s[t])
                dB_s[t] = (dh * layouts.over_states(d * x)).sum(2)
                du = (dh * layouts.over_channels(B_s[t])).sum(1)
                dh *= jnp.exp2(layouts.over_states(d * LOG2_E) * A)
                dexponent = dh * plgpu.layout_cast(states[t], layouts.state)
                dA += dexponent * layouts.over_states(d)
                dx, dd = du * d, du * x + (dexponent * A).sum(1)
                if D is not None:
                    dx += D * dy
                    dD += dy * x
                if options.delta_softplus:
                    dd *= _sigmoid(d)
                dbias += dd
                output_refs["x"][output_index], output_refs["delta"][output_index] = dx, dd
                return dh, dA, dD, dbias

            jax.lax.fori_loop(0, TILE, recompute, plgpu.layout_cast(start_s[0], layouts.state), unroll=2)
            carry = jax.lax.fori_loop(0, TILE, propagate, carry, unroll=2)
            plgpu.commit_smem()
            for name, sums in (("B", dB_s), ("C", dC_s)):
                plgpu.copy_smem_to_gmem(sums, output_refs[name].at[b, pl.ds(first, TILE), j])
            plgpu.wait_smem_to_gmem(0)
            return carry

        group = j // tiling.blocks_per_group
        streamed = [input_refs[name].at[b, :, j] for name in ("x", "d", "dy")]
        streamed += [input_refs[name].at[b, :, group] for name in ("B", "C")]
        row = plgpu.layout_cast(jnp.zeros((WARPS, tiling.width), jnp.float32), layouts.channels)
        dh, dA, dD, dbias = plgpu.emit_pipeline(
            tile,
            grid=(tiles,),
            in_specs=[
                *(_tile_spec(ref, tiles, not options.reverse) for ref in streamed),
                plgpu.BlockSpec(
                    (1, *layouts.shape),
                    lambda index: (_start_index(index, b, j, tiles, blocks, not options.reverse), 0, 0, 0),
                ),
            ],
            max_concurrent_steps=2,
            init_carry=(dh, layouts.zeros(), row, row),
        )(*streamed, input_refs["starts"])
        output_refs["A"][b, j], output_refs["h"][b, j] = dA, dh
        output_refs["D"][b, j], output_refs["bias"][b, j] = dD, dbias

    scratch = {
        "dB_s": plgpu.SMEM((TILE, *layouts.shape[:2]), jnp.float32),
        "dC_s": plgpu.SMEM((TILE, *layouts.shape[:2]), jnp.float32),
    }
    gradients = _run(body, inputs, outputs, layouts, states=TILE, **scratch)
    dsequences = Sequences(
        x=tiling.untile_sequence(gradients["x"]),
        delta=tiling.untile_sequence(gradients["delta"]),
        B=tiling.sum_projection(gradients["B"]),
        C=tiling.sum_projection(gradients["C"]),
        z=dz,
        initial_state=None if h is None else tiling.untile_state(gradients["h"]),
    )
    dparameters = Parameters(
        A=tiling.untile_state(gradients["A"]),
        D=None if parameters.D is None else tiling.merge_channels(gradients["D"]),
        delta_bias=None if parameters.delta_bias is None else tiling.merge_channels(gradients["bias"]),
    )
    return jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), dsequences, sequences), dparameters


def _sigmoid(d: Array) -> Array:
    """Compute the derivative of softplus from its value d, 1 - exp(-d), accurately for small d too."""
    return jnp.where(d < 0.03, d * (1 - d * (1 / 2 - d * (1 / 6 - d / 24))), 1 - jnp.exp(-d))


def _tile_parameter(tiling: Tiling, parameter: Array | None) -> Array | None:
    return None if parameter is None else tiling.split_channels(parameter.astype(jnp.float32))


def _ordered(index: Array, number: int, reverse: bool) -> Array:
    """Return index, or number - 1 - index if reverse."""
    return number - 1 - index if reverse else index


def _start_index(index: Array, b: Array, j: Array, tiles: int, blocks: int, reverse: bool) -> Array:
    """Return the index of the state before a tile among those of all sequences, tiles and blocks."""
    return (b * tiles + _ordered(index, tiles, reverse)) * blocks + j


def _tile_spec(ref: Any, tiles: int, reverse: bool) -> plgpu.BlockSpec:
    """Return the specification that streams an input tile by tile."""
    shape = (TILE, *ref.shape[1:])
    return plgpu.BlockSpec(shape, lambda index: (_ordered(index, tiles, reverse), *[0] * (len(shape) - 1)))
