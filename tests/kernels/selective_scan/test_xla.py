"""Chunked scan against loops in numpy in float64, and its memory against the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from iumad_kernels.selective_scan import blocks, xla
from iumad_kernels.selective_scan.arguments import Options, split_arguments

pytestmark = pytest.mark.slow

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking would compile for minutes
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 14),
    width=st.integers(1, 9),
    groups=st.integers(1, 3),
    states=st.integers(1, 6),
    without=st.sets(st.sampled_from(OPTIONAL)),
    delta_softplus=st.booleans(),
    reverse=st.booleans(),
    sequences=st.integers(1, 3),
)
def test_any_shape(exact, batch, length, width, groups, states, without, delta_softplus, reverse, sequences):
    """The chunks and blocks are smaller than usual, so that a small sequence has several of them."""
    scan = functools.partial(xla.selective_scan)  # new function, as the usual one is compiled for usual sizes
    args = exact.arguments(batch, length, width * groups, states, groups, dtype=np.float32, without=without)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CHUNK", 6)
        patch.setattr(blocks, "LANES", 2)
        patch.setattr(xla, "LANES", 2)
        patch.setattr(blocks, "CACHED_ELEMENTS", 4 * states)
        patch.setattr(blocks, "SHARED_ELEMENTS", sequences * groups * states * (width + 3))
        exact.check(scan, args, Options(delta_softplus, reverse))


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "groups"),
    [(1, 9, 2 * blocks.CACHED_ELEMENTS // 16 + 2, 16, 2), (1, 2, 300, 64, 1), (2, 2, 5, 256, 1), (1, 1, 1, 1, 1)],
)
def test_blocks_of_channels_and_many_states(exact, batch, length, channels, states, groups):
    exact.check(xla.selective_scan, exact.arguments(batch, length, channels, states, groups, dtype=np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(exact, dtype):
    exact.check(xla.selective_scan, exact.arguments(2, 9, 12, 4, 2, dtype=dtype), forward=2e-2, backward=2e-2)


@pytest.mark.parametrize("level", [-100.0, -20.0, 30.0, 1000.0])
def test_extreme_step_sizes(exact, level):
    """The tail of softplus is preserved, and nothing overflows."""
    args = exact.arguments(2, 10, 8, 4, dtype=np.float32)
    args["delta"] = (args["delta"] + level).astype(np.float32)
    exact.check(xla.selective_scan, args)


def test_a_scan_in_float64(exact):
    args = exact.arguments(2, 9, 6, 3, 2)
    dy, dh = exact.cotangents(args)
    with jax.enable_x64(True):
        y, final_state, grads = exact.run(xla.selective_scan, args, dy, dh)
    expected = exact.scan(args, dy, dh)
    assert y.dtype == final_state.dtype == jnp.float64
    assert max(exact.error(y, expected[0]), exact.error(final_state, expected[1])) < 1e-13
    assert max(exact.error(grads[name], expected[2][name]) for name in grads) < 1e-12


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "without"),
    [(2, 1024, 256, 16, ("z",)), (1, 2048, 128, 4, ())],
)
def test_memory_of_the_gradient_follows_its_formula(exact, batch, length, channels, states, without):
    """The memory is at most 4 arrays like x (5 with z), a state per chunk and the partial sums of dB and dC."""
    args = exact.arguments(batch, length, channels, states, dtype=np.float32, without=without)
    gradient = jax.jit(exact.run.__wrapped__, static_argnames="implementation")
    lowered = gradient.lower(xla.selective_scan, args, *exact.cotangents(args))
    start_bytes = args["x"].nbytes * states / blocks.CHUNK
    partial_sums = 2 * blocks.LANES * args["B"].nbytes
    measured = lowered.compile().memory_analysis().temp_size_in_bytes
    most = args["x"].nbytes * (4 + ("z" in args)) + start_bytes + partial_sums
    assert start_bytes < measured < most + 2**20


def test_accelerators_process_all_channels_together(exact, monkeypatch):
    """The variant for TPUs and GPUs older than Hopper is correct on CPU and lowers for both."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = exact.arguments(3, 9, 8, 3, 2, dtype=np.float32)
    layout = blocks.Layout.for_arrays(args["x"], args["B"])
    assert (layout.sequences, layout.parts) == (3, 1)
    exact.check(xla.selective_scan, args)

    def loss(args):
        return xla.selective_scan(*split_arguments(args), Options())[0].sum()

    traced = jax.jit(jax.grad(loss)).trace(args)
    for target in ("cuda", "tpu"):
        assert "stablehlo.while" in traced.lower(lowering_platforms=(target,)).as_text()
