"""Reference implementation: outputs and gradients against loops in numpy, derivatives against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import reference
from iumad_kernels.selective_scan.arguments import Options, split_arguments
from jax.test_util import check_grads


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("delta_softplus", [False, True])
@pytest.mark.parametrize(
    ("shape", "without"),
    [((2, 7, 6, 3, 2), ()), ((1, 1, 1, 1, 1), ()), ((2, 5, 4, 2, 1), ("D", "z", "delta_bias", "initial_state"))],
)
def test_outputs_and_gradients_in_float64(exact, shape, without, delta_softplus, reverse):
    args = exact.arguments(*shape, without=without)
    options = Options(delta_softplus, reverse)
    dy, dh = exact.cotangents(args)
    with jax.enable_x64(True):
        y, final_state, grads = exact.run(reference.selective_scan, args, dy, dh, options)
    expected_y, expected_state, expected_grads = exact.scan(args, dy, dh, *options)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected_y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(final_state, expected_state, rtol=1e-11, atol=1e-12)
    for name, gradient in grads.items():
        np.testing.assert_allclose(gradient, expected_grads[name], rtol=1e-10, atol=1e-11, err_msg=name)


@pytest.mark.slow
def test_derivatives_of_both_modes_and_orders(exact):
    args = exact.arguments(1, 3, 2, 2)
    function = jax.jit(lambda args: reference.selective_scan(*split_arguments(args), Options()))
    with jax.enable_x64(True):
        check_grads(function, (args,), order=1, modes=["fwd"], rtol=1e-4, atol=1e-4)
        check_grads(function, (args,), order=2, modes=["rev"], rtol=1e-4, atol=1e-4)
