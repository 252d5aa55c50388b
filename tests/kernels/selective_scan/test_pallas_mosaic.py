"""The Mosaic kernels on CPU: in the interpreter, which also looks for races, against loops in numpy, float64; and
lowered for CUDA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import pallas_mosaic, selective_scan
from jax.experimental.pallas import mosaic_gpu as plgpu

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@pytest.fixture
def interpreted(monkeypatch, capfd):
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the Mosaic interpreter, InterpretGPUParams")
    monkeypatch.setattr(pallas_mosaic, "interpret", plgpu.InterpretGPUParams(detect_races=True))
    yield
    assert "RACE" not in capfd.readouterr().out.upper()  # the interpreter prints what it finds


def scan(delta_softplus=True, reverse=False, **args):
    return pallas_mosaic.selective_scan(**args, delta_softplus=delta_softplus, reverse=reverse)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "groups", "without", "delta_softplus", "reverse"),
    [
        (2, 17, 14, 3, 2, (), True, False),
        (1, 16, 130, 16, 1, ("z",), True, True),
        (1, 1, 1, 1, 1, OPTIONAL, True, False),
        (2, 3, 66, 17, 1, ("D", "initial_state"), False, True),
        (1, 9, 34, 64, 1, ("delta_bias",), True, False),
        (1, 2, 3, 128, 3, OPTIONAL, False, False),
    ],
)
def test_any_shape(exact, batch, length, channels, states, groups, without, delta_softplus, reverse):
    args = exact.arguments(batch, length, channels, states, groups, dtype=np.float32, without=without)
    exact.check(scan, args, delta_softplus=delta_softplus, reverse=reverse)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(exact, dtype):
    exact.check(scan, exact.arguments(1, 9, 12, 4, 2, dtype=dtype), forward=2e-2, backward=2e-2)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("level", [-100.0, -20.0, 1000.0])
def test_extreme_step_sizes(exact, level):
    args = exact.arguments(1, 10, 4, 4, dtype=np.float32)
    args["delta"] = (args["delta"] + level).astype(np.float32)
    exact.check(scan, args)


@pytest.mark.usefixtures("interpreted")
def test_vmap_joins_the_batch(exact):
    """As a model does that is written for one image and made one for many by vmap."""
    args = exact.arguments(3, 9, 4, 3, dtype=np.float32, without=("z", "initial_state"))
    args = {name: jnp.asarray(value) for name, value in args.items()}
    of_sequences = {name: args.pop(name) for name in ("x", "delta", "B", "C")}

    def one_by_one(of_sequences, parameters):
        return jax.vmap(lambda one: scan(**{n: a[None] for n, a in one.items()}, **parameters)[0][0])(of_sequences)

    def batched(of_sequences, parameters):
        return scan(**of_sequences, **parameters)[0]

    (y, vjp), (expected, expected_vjp) = (jax.vjp(f, of_sequences, args) for f in (one_by_one, batched))
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), vjp(y), expected_vjp(y))


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "groups", "dtype"),
    [
        (24, 49, 2048, 16, 4, jnp.float32),
        (24, 196, 2048, 16, 4, jnp.bfloat16),
        (1, 1, 3, 1, 1, jnp.float32),
        (2, 100, 200, 64, 2, jnp.float16),
    ],
)
def test_forward_and_backward_lower_for_cuda(exact, batch, length, channels, states, groups, dtype):
    args = exact.arguments(1, 1, channels, states, groups)
    args = {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in args.items()}
    args["initial_state"] = jax.ShapeDtypeStruct((batch, channels, states), dtype)
    for name in ("x", "delta", "z", "B", "C"):
        args[name] = jax.ShapeDtypeStruct((batch, length, *args[name].shape[2:]), dtype)
    lowered = jax.jit(jax.grad(lambda args: scan(**args)[0].astype(jnp.float32).sum())).trace(args)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2


def test_a_vmapped_scan_is_still_one_kernel_forward_and_one_backward(exact):
    shapes = exact.arguments(24, 49, 64, 16, 4, dtype=np.float32, without=("z", "initial_state"))
    parameters = {name: shapes.pop(name) for name in ("A", "D", "delta_bias")}

    def loss(parameters):
        return jax.vmap(lambda one: scan(**{n: a[None] for n, a in one.items()}, **parameters)[0])(shapes).sum()

    text = jax.jit(jax.grad(loss)).trace(parameters).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2


def test_says_why_it_cannot_run_here(exact):
    args = exact.arguments(1, 2, 2, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^implementation \"mosaic\" cannot run: it needs an NVIDIA GPU .* found cpu"):
        selective_scan(**args, implementation="mosaic")
