"""The chunked scan against loops in numpy, float64; its memory against its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iumad_kernels.selective_scan import blocks, xla

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@functools.partial(jax.jit, static_argnames=("delta_softplus", "reverse"))
def scan(delta_softplus, reverse, **args):
    return xla.selective_scan(**args, delta_softplus=delta_softplus, reverse=reverse)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    width=st.integers(1, 9),
    groups=st.integers(1, 3),
    states=st.integers(1, 6),
    without=st.sets(st.sampled_from(OPTIONAL)),
    delta_softplus=st.booleans(),
    reverse=st.booleans(),
)
def test_any_shape(exact, batch, length, width, groups, states, without, delta_softplus, reverse):
    args = exact.arguments(batch, length, width * groups, states, groups, dtype=np.float32, without=without)
    exact.check(scan, args, delta_softplus=delta_softplus, reverse=reverse)


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "groups"),
    [(1, 9, 2 * blocks.CACHED // 16 + 2, 16, 2), (3, 17, 300, 64, 1), (2, 5, 5, 200, 1), (1, 1, 1, 1, 1)],
)
def test_blocks_of_channels_and_many_states(exact, batch, length, channels, states, groups):
    exact.check(scan, exact.arguments(batch, length, channels, states, groups, dtype=np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(exact, dtype):
    exact.check(scan, exact.arguments(2, 21, 12, 4, 2, dtype=dtype), forward=2e-2, backward=2e-2)


@pytest.mark.parametrize("level", [-100.0, -20.0, 30.0, 1000.0])
def test_extreme_step_sizes(exact, level):
    """Neither softplus' tail is lost, nor does anything overflow."""
    args = exact.arguments(2, 20, 8, 4, dtype=np.float32)
    args["delta"] = (args["delta"] + level).astype(np.float32)
    exact.check(scan, args)


def test_a_scan_in_float64(exact):
    args = exact.arguments(2, 19, 6, 3, 2)
    dy, dh = exact.cotangents(args)
    with jax.enable_x64(True):
        y, final_state, grads = exact.found(scan, args, dy, dh, delta_softplus=True, reverse=False)
    expected = exact.scan(args, dy, dh)
    assert y.dtype == final_state.dtype == jnp.float64
    assert max(exact.error(y, expected[0]), exact.error(final_state, expected[1])) < 1e-13
    assert max(exact.error(grads[name], expected[2][name]) for name in grads) < 1e-12


def temporary_memory(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def gradients(length, channels, states, batch=2):
    """The function and the shapes of x, delta, A, B, C and dy."""

    def function(x, delta, A, B, C, dy):
        y, vjp = jax.vjp(
            lambda *args: scan(True, False, **dict(zip(["x", "delta", "A", "B", "C"], args, strict=True)))[0],
            x,
            delta,
            A,
            B,
            C,
        )
        return y, vjp(dy)

    sequence, projection = (batch, length, channels), (batch, length, 1, states)
    return function, (sequence, sequence, (channels, states), projection, projection, sequence)


@pytest.mark.parametrize(("length", "channels", "states"), [(512, 512, 16), (2048, 128, 16), (512, 256, 4)])
def test_memory_follows_its_formula(length, channels, states):
    """At most 8 arrays like x and twice one state a chunk; nothing of (length, channels, states)."""
    function, shapes = gradients(length, channels, states)
    sequences, starts = 2 * length * channels * 4, 2 * length / blocks.CHUNK * channels * states * 4
    measured = temporary_memory(function, *shapes)
    assert starts < measured < 8 * sequences + 2 * starts + 4 * 2**20


def test_on_accelerators_all_channels_at_once(exact, monkeypatch):
    """What a TPU or a GPU older than Hopper gets: found right on CPU, and lowered for them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = exact.arguments(3, 19, 8, 3, 2, dtype=np.float32)
    assert blocks.Blocks.of(args["x"], args["B"]).number(3) == 1
    exact.check(xla.selective_scan, args)

    def loss(args):
        return xla.selective_scan(**args, delta_softplus=True, reverse=False)[0].sum()

    traced = jax.jit(jax.grad(loss)).trace(args)
    for target in ("cuda", "tpu"):
        assert "stablehlo.while" in traced.lower(lowering_platforms=(target,)).as_text()
