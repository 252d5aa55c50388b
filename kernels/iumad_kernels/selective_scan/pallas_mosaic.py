"""The selective scan as two Pallas Mosaic GPU kernels, for NVIDIA Hopper and newer.

A block of threads, one warpgroup, walks a sequence, or a segment of it, for 8 to 32 channels a warp. Its state stays in
registers; a tile of positions at a time comes in by TMA while the tile before is worked on. The forward kernel saves
the state before each tile; the backward kernel walks the tiles from the last to the first, and in each of them first
recomputes the states, into shared memory, then propagates the gradients. All sums over threads are shuffles within a
warp: gradients of B and C leave the kernel as one partial sum per warp and are added up outside, so that no atomics
are needed and results are the same every time.
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
from iumad_kernels.selective_scan.segments import in_segments
from iumad_kernels.selective_scan.softplus import softplus
from iumad_kernels.selective_scan.tiling import TILE, WARPS, Tiling

MAX_STATES = 128
LOG2_E = math.log2(math.e)
PROCESSORS = 132  # of an H100 or H200; a block of threads keeps one busy
SHORTEST = 64  # positions of a segment

interpret: Any = None  # plgpu.InterpretGPUParams, for the kernels to run on CPU in tests


def obstacle(dtype: Any, states: int) -> str | None:
    """What keeps the kernels from running on the default device, if anything does."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and not device.compute_capability.startswith("gfx")  # AMD's are names
    on_hopper = nvidia and float(device.compute_capability) >= 9
    if interpret is None and not on_hopper:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer; found {device.device_kind}"
    if dtype == jnp.float64:
        return "it computes in float32; x is float64"
    if states > MAX_STATES:
        return f"it takes up to {MAX_STATES} states; got {states}"
    return None


def selective_scan(sequences: Sequences, parameters: Parameters, options: Options) -> tuple[Array, Array]:
    """See `iumad_kernels.selective_scan`."""
    scan = differentiable(
        *in_segments(_forward, _backward, _segments, options),
        functools.partial(reference.selective_scan, options=options),
    )
    return scan(sequences, parameters)


def _segments(x: Array, B: Array) -> int:
    """How many segments of a sequence are walked at the same time: one, unless four or more find idle processors."""
    batch, length, channels = x.shape
    tiling = Tiling(length, channels, *B.shape[2:])
    idle = PROCESSORS // (batch * tiling.groups * tiling.blocks_of_group)
    number = max((n for n in range(1, idle + 1) if length % (n * TILE) == 0 and length >= n * SHORTEST), default=1)
    return number if number >= 4 else 1


class Layouts:
    """Which thread holds what of a state, (WARPS, states, width), and of its rows along states and along channels."""

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
        """One position's (WARPS, width), in float32."""
        return plgpu.layout_cast(values, self.channels).astype(jnp.float32)

    def over_states(self, row: Array) -> Array:
        """(WARPS, width) for every state."""
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(row, self.shape, (0, 2)), self.state)

    def over_channels(self, values: Array) -> Array:
        """(states,) for every channel."""
        values = plgpu.layout_cast(values, self.states)
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(values, self.shape, (1,)), self.state)

    def zeros(self) -> Array:
        """A state of zeros."""
        return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.state)


def _run(
    body: Callable[..., None], inputs: dict, outputs: dict, layouts: Layouts, *, states: int, **scratch: Any
) -> dict:
    """Runs body(sequence, block, inputs, outputs, fetched, states, **scratch) for every sequence and block of channels.

    fetched(name, *at) is what an input has at that place: a state, or a row of channels. states is room in shared
    memory for so many states.
    """
    batch, _, blocks = inputs["x"].shape[:3]
    given_names = [name for name, array in inputs.items() if array is not None]

    def with_names(*refs: Any, row: Any, states: Any, barrier: Any, **scratch: Any) -> None:
        given: dict[str, Any] = dict.fromkeys(inputs)
        given |= dict(zip(given_names, refs, strict=False))
        made = dict(zip(outputs, refs[len(given_names) :], strict=True))

        def fetched(name: str, *at: Array) -> Any:
            if given[name] is None:
                return None
            place, layout = (states.at[0], layouts.state) if name in ("A", "h") else (row, layouts.channels)
            plgpu.copy_gmem_to_smem(given[name].at[at], place, barrier)
            plgpu.barrier_wait(barrier)
            values = plgpu.layout_cast(place[...], layout)
            plgpu.commit_smem()  # all have read before the next one comes
            return values

        b, j = jax.lax.axis_index("sequence"), jax.lax.axis_index("block")
        body(b, j, given, made, fetched, states, **scratch)

    kernel = plgpu.kernel(
        with_names,
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
    return dict(zip(outputs, kernel(*(inputs[name] for name in given_names)), strict=True))


def _forward(
    sequences: Sequences, parameters: Parameters, *, options: Options, differentiated: bool
) -> tuple[tuple, dict]:
    x, delta, B, C, z, h = sequences
    batch, length, channels = x.shape
    tiling = Tiling(length, channels, *B.shape[2:])
    layouts = Layouts(tiling, channels_of_thread=1)
    tiles = tiling.tiles
    inputs: dict[str, Any] = {
        "x": tiling.of_sequence(x),
        "delta": tiling.of_sequence(delta),
        "B": tiling.of_projection(B),
        "C": tiling.of_projection(C),
        "z": None if z is None else tiling.of_sequence(z),
        "A": tiling.of_state(parameters.A) * LOG2_E,
        "h": None if h is None else tiling.of_state(h),
        "D": _of_parameter(tiling, parameters.D),
        "bias": _of_parameter(tiling, parameters.delta_bias),
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

    def body(b: Array, j: Array, given: dict, made: dict, fetched: Callable, states: Any) -> None:
        A, D, bias, h = fetched("A", j), fetched("D", j), fetched("bias", j), fetched("h", b, j)

        def tile(index: tuple[Array], x_s: Any, delta_s: Any, B_s: Any, C_s: Any, *rest: Any) -> Array:
            *z_s, h = rest
            first = _in_order(index[0], tiles, options.reverse) * TILE
            if differentiated:
                made["starts"][_start(index[0], b, j, tiles, blocks, options.reverse)] = h

            def position(t: Array, h: Array) -> Array:
                t = _in_order(t, TILE, options.reverse)
                at = b, first + t, j
                x, d = layouts.row(x_s[t]), layouts.row(delta_s[t])
                if bias is not None:
                    d += bias
                if options.delta_softplus:
                    d = softplus(d)
                if tiles * TILE > length:
                    d *= (first + t < length).astype(jnp.float32)  # a step of size 0 changes nothing
                decay = jnp.exp2(layouts.over_states(d) * A)
                h = decay * h + layouts.over_states(d * x) * layouts.over_channels(B_s[t])
                y = (h * layouts.over_channels(C_s[t])).sum(1)
                if D is not None:
                    y += D * x
                if differentiated:
                    made["d"][at] = d
                if z_s:
                    if differentiated:
                        made["scanned"][at] = y
                    gate = layouts.row(z_s[0][t])
                    y *= gate / (1 + jnp.exp(-gate))
                made["y"][at] = y
                return h

            h = jax.lax.fori_loop(0, TILE, position, h, unroll=2)
            plgpu.commit_smem()
            return h

        h = layouts.zeros() if h is None else h
        group = j // tiling.blocks_of_group
        moving = [
            given["x"].at[b, :, j],
            given["delta"].at[b, :, j],
            given["B"].at[b, :, group],
            given["C"].at[b, :, group],
        ]
        if given["z"] is not None:
            moving.append(given["z"].at[b, :, j])
        made["h"][b, j] = plgpu.emit_pipeline(
            tile,
            grid=(tiles,),
            in_specs=[_tiles_of(ref, tiles, options.reverse) for ref in moving],
            max_concurrent_steps=2,
            init_carry=h,
        )(*moving)

    made = _run(body, inputs, outputs, layouts, states=1)
    y, h = tiling.to_sequence(made.pop("y")).astype(x.dtype), tiling.to_state(made.pop("h"))
    return (y, h), made


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
        (dz,) = gate_backward(dy.astype(jnp.float32) * tiling.to_sequence(residuals["scanned"]))
        dy = dy.astype(jnp.float32) * gate
    inputs: dict[str, Any] = {
        "x": tiling.of_sequence(x),
        "d": residuals["d"],
        "dy": tiling.of_sequence(dy),
        "B": tiling.of_projection(B),
        "C": tiling.of_projection(C),
        "starts": residuals["starts"],
        "A": tiling.of_state(parameters.A),
        "h": tiling.of_state(dh),
        "D": _of_parameter(tiling, parameters.D),
    }
    blocks = inputs["x"].shape[2]
    sequence = jax.ShapeDtypeStruct(inputs["x"].shape, jnp.float32)
    state = jax.ShapeDtypeStruct((batch, blocks, *layouts.shape), jnp.float32)
    of_channels = jax.ShapeDtypeStruct((batch, *sequence.shape[2:]), jnp.float32)
    partial_sums = jax.ShapeDtypeStruct((*sequence.shape[:3], *layouts.shape[:2]), jnp.float32)
    outputs = {
        "x": sequence,
        "delta": sequence,
        "B": partial_sums,
        "C": partial_sums,
        "A": state,
        "h": state,
        "D": of_channels,
        "bias": of_channels,
    }

    def body(b: Array, j: Array, given: dict, made: dict, fetched: Callable, states: Any, dB_s: Any, dC_s: Any) -> None:
        A, D, dh = fetched("A", j), fetched("D", j), fetched("h", b, j)

        def tile(
            index: tuple[Array], x_s: Any, d_s: Any, dy_s: Any, B_s: Any, C_s: Any, start_s: Any, carry: Any
        ) -> Any:
            first = _in_order(index[0], tiles, not options.reverse) * TILE

            def recompute(t: Array, h: Array) -> Array:
                t = _in_order(t, TILE, options.reverse)
                states[t] = h
                x, d, dy = layouts.row(x_s[t]), layouts.row(d_s[t]), layouts.row(dy_s[t])
                decay = jnp.exp2(layouts.over_states(d * LOG2_E) * A)
                h = decay * h + layouts.over_states(d * x) * layouts.over_channels(B_s[t])
                dC_s[t] = (h * layouts.over_states(dy)).sum(2)
                return h

            def propagate(t: Array, carry: Any) -> Any:
                dh, dA, dD, dbias = carry
                t = _in_order(t, TILE, not options.reverse)
                at = b, first + t, j
                x, d, dy = layouts.row(x_s[t]), layouts.row(d_s[t]), layouts.row(dy_s[t])
                dh += layouts.over_states(dy) * layouts.over_channels(C_s[t])
                dB_s[t] = (dh * layouts.over_states(d * x)).sum(2)
                du = (dh * layouts.over_channels(B_s[t])).sum(1)
                dh *= jnp.exp2(layouts.over_states(d * LOG2_E) * A)
                of_exponent = dh * plgpu.layout_cast(states[t], layouts.state)
                dA += of_exponent * layouts.over_states(d)
                dx, dd = du * d, du * x + (of_exponent * A).sum(1)
                if D is not None:
                    dx += D * dy
                    dD += dy * x
                if options.delta_softplus:
                    dd *= _sigmoid(d)
                dbias += dd
                made["x"][at], made["delta"][at] = dx, dd
                return dh, dA, dD, dbias

            jax.lax.fori_loop(0, TILE, recompute, plgpu.layout_cast(start_s[0], layouts.state), unroll=2)
            carry = jax.lax.fori_loop(0, TILE, propagate, carry, unroll=2)
            plgpu.commit_smem()
            for name, sums in (("B", dB_s), ("C", dC_s)):
                plgpu.copy_smem_to_gmem(sums, made[name].at[b, pl.ds(first, TILE), j])
            plgpu.wait_smem_to_gmem(0)
            return carry

        group = j // tiling.blocks_of_group
        moving = [given[name].at[b, :, j] for name in ("x", "d", "dy")]
        moving += [given[name].at[b, :, group] for name in ("B", "C")]
        row = plgpu.layout_cast(jnp.zeros((WARPS, tiling.width), jnp.float32), layouts.channels)
        dh, dA, dD, dbias = plgpu.emit_pipeline(
            tile,
            grid=(tiles,),
            in_specs=[
                *(_tiles_of(ref, tiles, not options.reverse) for ref in moving),
                plgpu.BlockSpec(
                    (1, *layouts.shape),
                    lambda index: (_start(index, b, j, tiles, blocks, not options.reverse), 0, 0, 0),
                ),
            ],
            max_concurrent_steps=2,
            init_carry=(dh, layouts.zeros(), row, row),
        )(*moving, given["starts"])
        made["A"][b, j], made["h"][b, j], made["D"][b, j], made["bias"][b, j] = dA, dh, dD, dbias

    scratch = {
        "dB_s": plgpu.SMEM((TILE, *layouts.shape[:2]), jnp.float32),
        "dC_s": plgpu.SMEM((TILE, *layouts.shape[:2]), jnp.float32),
    }
    made = _run(body, inputs, outputs, layouts, states=TILE, **scratch)
    of_sequences = Sequences(
        x=tiling.to_sequence(made["x"]),
        delta=tiling.to_sequence(made["delta"]),
        B=tiling.to_projection(made["B"]),
        C=tiling.to_projection(made["C"]),
        z=dz,
        initial_state=None if h is None else tiling.to_state(made["h"]),
    )
    of_parameters = Parameters(
        A=tiling.to_state(made["A"]),
        D=None if parameters.D is None else tiling.to_channels(made["D"]),
        delta_bias=None if parameters.delta_bias is None else tiling.to_channels(made["bias"]),
    )
    return jax.tree.map(lambda gradient, of: gradient.astype(of.dtype), of_sequences, sequences), of_parameters


def _sigmoid(d: Array) -> Array:
    """The derivative of softplus from its value d, 1 - exp(-d), also where d is small."""
    return jnp.where(d < 0.03, d * (1 - d * (1 / 2 - d * (1 / 6 - d / 24))), 1 - jnp.exp(-d))


def _of_parameter(tiling: Tiling, parameter: Array | None) -> Array | None:
    return None if parameter is None else tiling.of_channels(parameter.astype(jnp.float32))


def _in_order(index: Array, number: int, reverse: bool) -> Array:
    return number - 1 - index if reverse else index


def _start(index: Array, b: Array, j: Array, tiles: int, blocks: int, reverse: bool) -> Array:
    return (b * tiles + _in_order(index, tiles, reverse)) * blocks + j


def _tiles_of(ref: Any, tiles: int, reverse: bool) -> plgpu.BlockSpec:
    shape = (TILE, *ref.shape[1:])
    return plgpu.BlockSpec(shape, lambda index: (_in_order(index, tiles, reverse), *[0] * (len(shape) - 1)))
