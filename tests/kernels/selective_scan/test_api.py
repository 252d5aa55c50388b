"""Public function: accepted arguments, errors for invalid arguments, and transformations by JAX."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan import selective_scan
from jax.sharding import Mesh, PartitionSpec

from tests import sentences

SEQUENCES = ("x", "delta", "B", "C", "z", "initial_state")


def split(args):
    """Split arguments into those with a batch axis and the others."""
    return {n: a for n, a in args.items() if n in SEQUENCES}, {n: a for n, a in args.items() if n not in SEQUENCES}


@pytest.fixture
def args(exact):
    return {n: jnp.asarray(a) for n, a in exact.arguments(4, 11, 6, 3, 2, dtype=np.float32).items()}


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_outputs(exact, args, implementation):
    dy, dh = exact.cotangents(args)
    y, final_state, _ = exact.scan(args, dy, dh)
    results = selective_scan(**args, return_final_state=True, implementation=implementation)
    assert exact.error(results[0], y) < 1e-5
    assert exact.error(results[1], final_state) < 1e-5
    np.testing.assert_array_equal(selective_scan(**args, implementation=implementation), results[0])


def test_one_group_needs_no_axis(exact):
    args = exact.arguments(2, 5, 4, 3, dtype=np.float32)
    without_axis = args | {"B": args["B"][:, :, 0], "C": args["C"][:, :, 0]}
    np.testing.assert_array_equal(selective_scan(**without_axis), selective_scan(**args))


def test_the_state_carries_on_from_one_call_to_the_next(args):
    first, second = (
        {n: a[:, part] if n in SEQUENCES[:5] else a for n, a in args.items()} for part in (slice(6), slice(6, None))
    )
    y, state = selective_scan(**first, return_final_state=True)
    second_y = selective_scan(**second | {"initial_state": state})
    np.testing.assert_allclose(jnp.concatenate([y, second_y], axis=1), selective_scan(**args), rtol=1e-5, atol=1e-5)


def test_example_of_the_readme():
    """With constant arguments, a state is a geometric series: d (1 + q + q^2 + ...), with q = exp(-d)."""
    page = (Path(__file__).parents[3] / "kernels" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], found := {})
    d = np.log1p(np.e)  # softplus(1)
    state = d * (1 - np.exp(-1000 * d)) / (1 - np.exp(-d))
    assert found["y"].shape == (2, 1000, 512)
    np.testing.assert_allclose(found["state"], np.full((2, 512, 16), state), rtol=1e-5)
    np.testing.assert_allclose(found["y"][:, -1], 16 * state, rtol=1e-5)  # without D
    np.testing.assert_allclose(found["gradient"][:, 0], 16 * state + 1, rtol=1e-5)  # an input reaches all later outputs


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 5, 0)])
def test_empty_arrays(exact, shape):
    args = exact.arguments(*shape, 3, dtype=np.float32)
    y, final_state = selective_scan(**args, return_final_state=True)
    assert y.shape == shape
    assert final_state.shape == (shape[0], shape[2], 3)
    assert jax.grad(lambda D: selective_scan(**args | {"D": D}).sum())(args["D"]).shape == (shape[2],)


def squares(sequences, parameters):
    return (selective_scan(**sequences, **parameters) ** 2).sum()


def gradients_of_squares(exact, args):
    """Compute the gradients of the sequences and of the parameters in numpy."""
    y, *_ = exact.scan(args, np.zeros(args["x"].shape), 0)
    _, _, grads = exact.scan(args, 2 * y, np.zeros(args["initial_state"].shape))
    return split(grads)


def check_equal(exact, gradients, expected):
    for name, gradient in gradients.items():
        assert exact.error(gradient, expected[name]) < 1e-5, name


@pytest.mark.slow
def test_vmap_over_sequences_gives_separate_gradients(exact, args):
    """This includes the gradients of parameters, which do not differ along the axis."""
    sequences, parameters = split(args)

    def loss(parameters, sequence):
        return squares({n: a[None] for n, a in sequence.items()}, parameters)

    results = exact.jit(jax.vmap(jax.grad(loss), (None, 0)))(parameters, sequences)
    for i in range(4):
        sequence = {n: a[i : i + 1] for n, a in sequences.items()}
        _, expected = gradients_of_squares(exact, sequence | parameters)
        check_equal(exact, {name: gradient[i] for name, gradient in results.items()}, expected)


def test_vmap_over_parameters(args):
    sequences, parameters = split(args)
    several = {n: jnp.stack([a, 0.5 * a]) for n, a in parameters.items()}
    results = jax.vmap(lambda parameters: selective_scan(**sequences, **parameters))(several)
    expected = [
        selective_scan(**sequences, **parameters),
        selective_scan(**sequences, **{n: a[1] for n, a in several.items()}),
    ]
    np.testing.assert_allclose(results, jnp.stack(expected), rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives(exact, args):
    """Products of the Hessian and a vector agree with the reference."""

    def product(implementation):
        def loss(args):
            y, h = selective_scan(**args, return_final_state=True, implementation=implementation)
            return (y**2).sum() + (h**2).sum()

        gradient = jax.grad(loss)
        return exact.jit(jax.grad(lambda args: sum(jnp.vdot(g, jnp.cos(g)) for g in gradient(args).values())))(args)

    results, expected = product("xla"), product("reference")
    for name in args:
        assert exact.error(results[name], expected[name]) < 1e-4, name


def test_forward_mode_raises_an_error(args):
    with pytest.raises(TypeError, match=sentences.NO_FORWARD_MODE):
        jax.jvp(lambda x: selective_scan(**args | {"x": x}), (args["x"],), (args["x"],))
    jax.jvp(lambda x: selective_scan(**args | {"x": x}, implementation="reference"), (args["x"],), (args["x"],))


def gradients_on_a_device(sequences, parameters):
    dsequences, dparameters = jax.grad(squares, (0, 1))(sequences, parameters)
    return dsequences, jax.lax.psum(dparameters, "devices")


@pytest.mark.slow
def test_pmap(exact, args):
    sequences, parameters = split(args)
    per_device = {n: a.reshape(2, 2, *a.shape[1:]) for n, a in sequences.items()}
    results = jax.pmap(gradients_on_a_device, "devices", in_axes=(0, None), out_axes=(0, None))(per_device, parameters)
    expected = gradients_of_squares(exact, args)
    check_equal(exact, {n: a.reshape(sequences[n].shape) for n, a in results[0].items()}, expected[0])
    check_equal(exact, results[1], expected[1])


@pytest.mark.slow
def test_shard_map(exact, args):
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    specs = PartitionSpec("devices"), PartitionSpec()
    function = jax.shard_map(gradients_on_a_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    results, expected = exact.jit(function)(*split(args)), gradients_of_squares(exact, args)
    check_equal(exact, results[0], expected[0])
    check_equal(exact, results[1], expected[1])


@pytest.mark.slow
def test_a_sequence_of_65536_positions_takes_bounded_memory():
    """An array like x takes 32 MiB, an array of all states would take 512 MiB."""
    length, channels, states = 65_536, 128, 16
    rng = np.random.default_rng(0)
    x, B = (rng.standard_normal((1, length, n)).astype(np.float32) for n in (channels, states))
    A = -np.exp(rng.standard_normal((channels, states))).astype(np.float32)

    def loss(x, A):
        return (selective_scan(x, x, A, B, B) ** 2).mean()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, A).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 350 * 2**20
    dx, dA = compiled(x, A)
    assert np.isfinite(dA).all()
    assert np.abs(dx[0, -1]).max() > 0


WRONG = {
    sentences.SCAN_OF_WRONG_SHAPE.format(name="x", expected="(batch, length, channels)", found="(2, 5)"): {
        "x": np.zeros((2, 5))
    },
    sentences.SCAN_NOT_FLOATING_POINT.format(name="x", found="int32"): {"x": np.zeros((2, 5, 4), np.int32)},
    sentences.SCAN_WITHOUT_POSITIONS.format(name="x", found="(2, 0, 4)"): {"x": np.zeros((2, 0, 4))},
    sentences.SCAN_OF_WRONG_STATES.format(expected="(4, states)", most=256, found="(4, 257)"): {
        "A": np.zeros((4, 257))
    },
    sentences.SCAN_OF_WRONG_GROUPS_SHAPE.format(expected="(2, 5, groups, 3)", other="(2, 5, 3)", found="(2, 5, 7)"): {
        "B": np.zeros((2, 5, 7))
    },
    sentences.SCAN_GROUPS_DO_NOT_DIVIDE.format(channels=4, found=3): {
        "B": np.zeros((2, 5, 3, 3)),
        "C": np.zeros((2, 5, 3, 3)),
    },
    sentences.SCAN_OF_WRONG_SHAPE.format(name="C", expected="(2, 5, 1, 3)", found="(2, 5, 3)"): {
        "C": np.zeros((2, 5, 3))
    },
    sentences.SCAN_OF_WRONG_SHAPE.format(name="D", expected="(4,)", found="(3,)"): {"D": np.zeros(3)},
    sentences.SCAN_OF_WRONG_SHAPE.format(name="z", expected="(2, 5, 4)", found="(2, 5, 3)"): {"z": np.zeros((2, 5, 3))},
    sentences.SCAN_OF_WRONG_SHAPE.format(name="delta", expected="(2, 5, 4)", found="(2, 1, 4)"): {
        "delta": np.zeros((2, 1, 4))
    },
    sentences.SCAN_OF_WRONG_SHAPE.format(name="delta_bias", expected="(4,)", found="(1, 4)"): {
        "delta_bias": np.zeros((1, 4))
    },
    sentences.SCAN_OF_WRONG_SHAPE.format(name="initial_state", expected="(2, 4, 3)", found="(2, 3, 4)"): {
        "initial_state": np.zeros((2, 3, 4))
    },
    sentences.SCAN_UNKNOWN_IMPLEMENTATION.format(known=["mosaic", "reference", "xla"], found="cuda"): {
        "implementation": "cuda"
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_arguments_are_explained(exact, message):
    wrong = {
        n: a.astype(np.float32) if getattr(a, "dtype", None) == np.float64 else a for n, a in WRONG[message].items()
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        selective_scan(**exact.arguments(2, 5, 4, 3, dtype=np.float32) | wrong)
    assert str(raised.value) == message
