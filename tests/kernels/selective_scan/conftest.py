"""Selective scan and its gradients in numpy, in float64, position by position, to compare implementations with."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from iumad_kernels.selective_scan.arguments import Options, split_arguments

# Tests spend most of their time on compiling.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DEFAULT_OPTIONS = Options()


def arguments(batch, length, channels, states, groups=1, seed=0, dtype=np.float64, without=()):
    """Make random values of every argument of the scan."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (batch, length, channels),
        "delta": (batch, length, channels),
        "A": (channels, states),
        "B": (batch, length, groups, states),
        "C": (batch, length, groups, states),
        "D": (channels,),
        "z": (batch, length, channels),
        "delta_bias": (channels,),
        "initial_state": (batch, channels, states),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["A"] = -np.exp(arrays["A"])
    return {name: value.astype(dtype) for name, value in arrays.items() if name not in without}


def cotangents(args, seed=1):
    """Make random cotangents of y and the final state."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal(args["x"].shape)
    return y, rng.standard_normal((len(y), *args["A"].shape))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def scan(args, dy, dh, delta_softplus=True, reverse=False):
    """Compute y, the final state and the gradients of <dy, y> + <dh, final state> in numpy."""
    a = {name: np.asarray(value, np.float64) for name, value in args.items()}
    x, A = a["x"], a["A"]
    batch, length, channels = x.shape
    groups, states = a["B"].shape[2:]
    B, C = (np.repeat(a[name], channels // groups, axis=2) for name in ("B", "C"))
    D, bias = (a.get(name, np.zeros(channels)) for name in ("D", "delta_bias"))
    raw = a["delta"] + bias
    d = np.logaddexp(raw, 0) if delta_softplus else raw
    order = range(length)[::-1] if reverse else range(length)

    h = a.get("initial_state", np.zeros((batch, channels, states)))
    before, y = {}, np.empty_like(x)
    for t in order:
        before[t] = h
        h = np.exp(d[:, t, :, None] * A) * h + (d[:, t] * x[:, t])[..., None] * B[:, t]
        y[:, t] = (C[:, t] * h).sum(-1) + D * x[:, t]
    final_state = h

    grads = {name: np.zeros_like(value) for name, value in a.items()}
    if "z" in a:
        s = sigmoid(a["z"])
        grads["z"] = dy * y * (s + a["z"] * s * (1 - s))
        dy, y = dy * a["z"] * s, y * a["z"] * s
    dB, dC, dd = np.zeros_like(B), np.zeros_like(C), np.zeros_like(d)
    for t in list(order)[::-1]:
        decay = np.exp(d[:, t, :, None] * A)
        dC[:, t] = dy[:, t, :, None] * h
        dh = dh + dy[:, t, :, None] * C[:, t]
        dB[:, t] = dh * (d[:, t] * x[:, t])[..., None]
        du = (dh * B[:, t]).sum(-1)
        dh = dh * decay
        grads["x"][:, t] = du * d[:, t] + D * dy[:, t]
        dd[:, t] = du * x[:, t] + (dh * before[t] * A).sum(-1)
        grads["A"] += (dh * before[t] * d[:, t, :, None]).sum(0)
        h = before[t]
    grads["delta"] = dd * sigmoid(raw) if delta_softplus else dd
    for name, value in (("B", dB), ("C", dC)):
        grads[name] = value.reshape(batch, length, groups, -1, states).sum(3)
    other_gradients = {"D": (dy * x).sum((0, 1)), "delta_bias": grads["delta"].sum((0, 1)), "initial_state": dh}
    return y, final_state, grads | {name: value for name, value in other_gradients.items() if name in a}


@functools.partial(jit, static_argnames=("implementation", "options"))
def run(implementation, args, dy, dh, options=DEFAULT_OPTIONS):
    """Compute y, the final state and the gradients with an implementation."""
    (y, final_state), vjp = jax.vjp(lambda args: implementation(*split_arguments(args), options), args)
    (grads,) = vjp((jnp.asarray(dy, y.dtype), jnp.asarray(dh, final_state.dtype)))
    return y, final_state, grads


def error(value, exact):
    """Return the largest error, relative to the largest value."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact)
    assert value.shape == exact.shape
    return np.abs(value - exact).max(initial=0) / max(np.abs(exact).max(initial=0), 1e-30)


def check(implementation, args, options=DEFAULT_OPTIONS, forward=1e-5, backward=1e-4):
    """Check that an implementation agrees with the loops in numpy."""
    dtype = args["x"].dtype
    if not options.delta_softplus:  # negative step sizes would make the states grow
        args = args | {name: np.abs(args[name]) for name in ("delta", "delta_bias") if name in args}
    dy, dh = (cotangent.astype(dtype).astype(np.float64) for cotangent in cotangents(args))
    exact = scan(args, dy, dh, *options)
    y, final_state, grads = run(implementation, jax.tree.map(jnp.asarray, args), dy, dh, options)
    assert y.dtype == dtype
    assert final_state.dtype == jnp.float32
    assert error(y, exact[0]) <= forward
    assert error(final_state, exact[1]) <= forward
    for name, gradient in grads.items():
        assert gradient.dtype == args[name].dtype
        assert error(gradient, exact[2][name]) <= backward, name


@pytest.fixture(scope="session")
def exact():
    """Return the functions of this file."""
    return SimpleNamespace(
        jit=jit, arguments=arguments, cotangents=cotangents, scan=scan, run=run, error=error, check=check
    )
