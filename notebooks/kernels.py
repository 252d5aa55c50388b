# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast the selective scan is here
#
# `iumad_kernels.selective_scan` is the recurrence of Mamba, h(t) = exp(delta A) h(t-1) + delta B x, y = C h + D x, with
# a hand-written gradient. It runs on any device; on Hopper GPUs there is a kernel of its own. This notebook times it
# against what JAX has for recurrences.

# %% tags=["install"]
# The package, where it is not installed yet: from the repository this notebook lies in, or by its name.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("iumad_kernels") is None:
    source = ".." if pathlib.Path("../pyproject.toml").exists() else "iumad-jax"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", source])

# %% tags=["parameters"]
batch, channels, states = 2, 256, 16
lengths = [64, 256, 1024]
turns = 5

# %% [markdown]
# ## The contestants
#
# `jax.lax.scan` takes one position after the other. `jax.lax.associative_scan` takes them in parallel, but needs all
# states of all positions at once.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan import selective_scan


def one_after_the_other(x, delta, A, B, C):
    """The recurrence as it is written."""

    def step(state, now):
        x, delta, B, C = now
        decay = jnp.exp(delta[..., None] * A[None])
        state = decay * state + (delta * x)[..., None] * B[:, None]
        return state, (state * C[:, None]).sum(-1)

    start = jnp.zeros((x.shape[0], *A.shape))
    _, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(array, 1, 0) for array in (x, delta, B[:, :, 0], C[:, :, 0])))
    return jnp.moveaxis(y, 0, 1)


def all_at_once(x, delta, A, B, C):
    """The recurrence as a parallel prefix."""
    decay = jnp.exp(delta[..., None] * A[None, None])
    entering = (delta * x)[..., None] * B

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, states = jax.lax.associative_scan(after, (decay, entering), axis=1)
    return (states * C).sum(-1)


contestants = {
    "selective_scan": lambda **inputs: selective_scan(**inputs, delta_softplus=False),
    "lax.scan": one_after_the_other,
    "associative_scan": all_at_once,
}


def inputs(length):
    """At random; the rates of decay are those Mamba starts with."""
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((batch, length, channels), np.float32)),
        "delta": jnp.asarray(rng.uniform(1e-3, 1e-1, (batch, length, channels)), jnp.float32),
        "A": -jnp.tile(jnp.arange(1.0, states + 1), (channels, 1)),
        "B": jnp.asarray(rng.standard_normal((batch, length, 1, states), np.float32)),
        "C": jnp.asarray(rng.standard_normal((batch, length, 1, states), np.float32)),
    }


# %% [markdown]
# ## They agree
#
# Forward, and the gradient of every input, relative to the largest value.


# %%
def with_gradients(scan):
    """The output, and the gradients of the sum of its squares."""

    def run(inputs):
        y, vjp = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return y, vjp(2 * y)[0]

    return jax.jit(run)


given = inputs(lengths[0])
expected = with_gradients(one_after_the_other)(given)
for name, scan in contestants.items():
    found = with_gradients(scan)(given)
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, expected)
    largest = max(jax.tree.leaves(differences))
    print(f"{name:18} differs by {largest:.1e}")
    assert largest < 1e-4

# %% [markdown]
# ## Forward and gradients, timed
#
# The median of some turns; the contestants take turns, so that whatever else the machine does hits all of them. The
# repository's `kernels/benchmarks/` times more shapes more carefully.

# %%
import statistics
import time

times = {}
for length in lengths:
    given = inputs(length)
    compiled = {name: with_gradients(scan).lower(given).compile() for name, scan in contestants.items()}
    for turn in range(turns + 1):  # the first warms up
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(given))
            if turn:
                times.setdefault((name, length), []).append(1e3 * (time.perf_counter() - start))
medians = {key: statistics.median(values) for key, values in times.items()}

print(jax.devices()[0].device_kind, "· jax", jax.__version__)
for length in lengths:
    print(f"{length:6} positions:", ", ".join(f"{name} {medians[name, length]:.2f} ms" for name in contestants))

# %%
import matplotlib.pyplot as plt

for name in contestants:
    plt.loglog(lengths, [medians[name, length] for length in lengths], "o-", base=2, label=name)
plt.yscale("log")
plt.xlabel("positions")
plt.ylabel("forward + gradients, ms")
plt.legend()
plt.show()
