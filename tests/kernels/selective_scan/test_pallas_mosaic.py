"""Mosaic kernels on CPU: compared with loops in numpy in an interpreter that detects races, and lowered for CUDA."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import pallas_mosaic, selective_scan
from iumad_kernels.selective_scan.arguments import Options, split_arguments
from jax.sharding import Mesh, PartitionSpec

from tests import sentences

OPTIONAL = ("D", "z", "delta_bias", "initial_state")
POSITIONS = ("x", "delta", "B", "C", "z")


def y_of(args):
    return pallas_mosaic.selective_scan(*split_arguments(args), Options())[0]


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
    exact.check(pallas_mosaic.selective_scan, args, Options(delta_softplus, reverse))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(exact, dtype):
    exact.check(pallas_mosaic.selective_scan, exact.arguments(1, 9, 12, 4, 2, dtype=dtype), forward=2e-2, backward=2e-2)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("level", [-100.0, -20.0, 1000.0])
def test_extreme_step_sizes(exact, level):
    args = exact.arguments(1, 10, 4, 4, dtype=np.float32)
    args["delta"] = (args["delta"] + level).astype(np.float32)
    exact.check(pallas_mosaic.selective_scan, args)


def vmapped_scan(sequences, parameters, options):
    """Scan like a model that is written for one sequence and batched with vmap."""

    def scan_sequence(sequence):
        batch = jax.tree.map(lambda array: array[None], sequence)
        y, final_state = pallas_mosaic.selective_scan(batch, parameters, options)
        return y[0], final_state[0]

    return jax.vmap(scan_sequence)(sequences)


@pytest.mark.usefixtures("interpreted")
def test_vmap_joins_the_batch(exact):
    exact.check(vmapped_scan, exact.arguments(3, 9, 4, 3, dtype=np.float32))


def shapes(exact, batch, length, channels, states, groups=1, dtype=jnp.float32, without=()):
    """Return the shapes and dtypes of the arguments."""
    args = exact.arguments(batch, 1, channels, states, groups, without=without)
    shapes = {n: (batch, length, *a.shape[2:]) if n in POSITIONS else a.shape for n, a in args.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def kernels(function, *args):
    """Lower a function for CUDA and return the shapes of each kernel's results, all in float32."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    results = re.findall(r"stablehlo.custom_call @mosaic_gpu.* -> \((.*)\)", text)
    return [[tuple(map(int, r.split("x"))) for r in re.findall(r"tensor<([\dx]+)xf32>", line)] for line in results]


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
    args = shapes(exact, batch, length, channels, states, groups, dtype)
    assert len(kernels(jax.grad(lambda args: y_of(args).astype(jnp.float32).sum()), args)) == 2


def squares(sequences, parameters):
    return (pallas_mosaic.selective_scan(sequences, parameters, Options())[0] ** 2).sum()


def gradients_on_a_device(sequences, parameters):
    dsequences, dparameters = jax.grad(squares, (0, 1))(sequences, parameters)
    return dsequences, jax.lax.psum(dparameters, "devices")


def test_under_pmap_each_device_runs_the_kernels_on_its_sequences(exact):
    sequences, parameters = split_arguments(shapes(exact, 6, 49, 64, 16, 4))
    per_device = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, 3, *a.shape[1:]), a.dtype), sequences)
    function = jax.pmap(gradients_on_a_device, "devices", in_axes=(0, None), out_axes=(0, None))
    assert [results[0][0] for results in kernels(function, per_device, parameters)] == [3, 3]


def test_under_shard_map_each_device_runs_the_kernels_on_its_sequences(exact):
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    specs = PartitionSpec("devices"), PartitionSpec()
    function = jax.shard_map(gradients_on_a_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    results = kernels(function, *split_arguments(shapes(exact, 6, 49, 64, 16, 4)))
    assert [shapes_of_kernel[0][0] for shapes_of_kernel in results] == [3, 3]


def test_a_vmapped_scan_takes_one_kernel_per_pass(exact):
    args = shapes(exact, 24, 256, 64, 16, 4)
    results = kernels(jax.grad(lambda args: vmapped_scan(*split_arguments(args), Options())[0].sum()), args)
    assert [shapes_of_kernel[0][0] for shapes_of_kernel in results] == [24, 24]


def test_few_sequences_are_cut_into_segments(exact):
    results = kernels(jax.grad(lambda args: y_of(args).sum()), shapes(exact, 2, 1024, 256, 16))
    assert [shapes_of_kernel[0][0] for shapes_of_kernel in results] == [32, 32, 32, 32]


@pytest.mark.parametrize("without", [(), ("z",)])
@pytest.mark.parametrize(("states", "width"), [(4, 32), (16, 32), (32, 16), (64, 8)])
def test_memory_of_the_gradient_follows_its_formula(exact, states, width, without):
    """The formula gives the memory besides y and the gradients of x and delta, in arrays like x."""
    batch, length, channels = 2, 64, 256
    args = shapes(exact, batch, length, channels, states, without=without)
    forward, backward = kernels(jax.grad(lambda args: y_of(args).sum()), args)
    # The final state and, for each sequence, the gradients of A, the initial state, D and delta_bias.
    small = batch * channels * (3 * states + 2)
    formula = 1 + states / 8 + 2 * states / width + ("z" in args)
    assert sum(map(math.prod, forward + backward)) - small == (3 + formula) * batch * length * channels


def test_the_reason_why_it_cannot_run_is_reported(exact):
    args = exact.arguments(1, 2, 2, 2, dtype=np.float32)
    with pytest.raises(ValueError, match=sentences.MOSAIC_CANNOT_RUN.format("cpu")):
        selective_scan(**args, implementation="mosaic")
