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
# # Speed of the selective scan on this machine
#
# ![time over length of three scans](pictures/kernels.jpg)
#
# `iumad_kernels.selective_scan` is the recurrence of Mamba, h(t) = exp(delta A) h(t-1) + delta B x, y = C h + D x, with
# a hand-written gradient. It runs on any device, on Hopper and newer GPUs with special kernels. This notebook compares
# its speed with JAX's own functions for recurrences.
#
# On Colab, upload or clone the repository, open this notebook in it, and choose a runtime. The next cell installs JAX
# for a GPU if there is one. For a TPU, run `pip install "jax[tpu]"` first, which was not tried.

# %% tags=["install"]
# Installs the package if it is missing: from this notebook's repository, else by its name.
import importlib.util
import pathlib
import shutil
import subprocess
import sys

if importlib.util.find_spec("iumad_kernels") is None:
    source = ".." if pathlib.Path("../pyproject.toml").exists() else "iumad-jax"
    extra = "[cuda12]" if shutil.which("nvidia-smi") else ""
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", source + extra])

# %% tags=["parameters"]
batch, channels, states = 2, 256, 16
lengths = [64, 256, 1024]
rounds = 5

# %% [markdown]
# ## The implementations
#
# `jax.lax.scan` processes one position after the other. `jax.lax.associative_scan` processes them in parallel, but
# needs memory for the states of all positions.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from iumad_kernels.selective_scan import selective_scan


def sequential_scan(x, delta, A, B, C):
    """Compute the recurrence position by position."""

    def step(state, position):
        x, delta, B, C = position
        decay = jnp.exp(delta[..., None] * A[None])
        state = decay * state + (delta * x)[..., None] * B[:, None]
        return state, (state * C[:, None]).sum(-1)

    start = jnp.zeros((x.shape[0], *A.shape))
    _, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(array, 1, 0) for array in (x, delta, B[:, :, 0], C[:, :, 0])))
    return jnp.moveaxis(y, 0, 1)


def parallel_scan(x, delta, A, B, C):
    """Compute the recurrence as a parallel prefix sum."""
    decay = jnp.exp(delta[..., None] * A[None, None])
    increment = (delta * x)[..., None] * B

    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, states = jax.lax.associative_scan(compose, (decay, increment), axis=1)
    return (states * C).sum(-1)


implementations = {
    "selective_scan": lambda **inputs: selective_scan(**inputs, delta_softplus=False),
    "lax.scan": sequential_scan,
    "associative_scan": parallel_scan,
}


def inputs(length):
    """Draw random inputs; A has Mamba's initial decay rates."""
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((batch, length, channels), np.float32)),
        "delta": jnp.asarray(rng.uniform(1e-3, 1e-1, (batch, length, channels)), jnp.float32),
        "A": -jnp.tile(jnp.arange(1.0, states + 1), (channels, 1)),
        "B": jnp.asarray(rng.standard_normal((batch, length, 1, states), np.float32)),
        "C": jnp.asarray(rng.standard_normal((batch, length, 1, states), np.float32)),
    }


# %% [markdown]
# ## Agreement
#
# Largest difference of the output and of the gradients of all inputs from `lax.scan`, relative to the largest value.


# %%
def with_gradients(scan):
    """Return a function that computes the output and the gradients of its sum of squares."""

    def run(inputs):
        y, vjp = jax.vjp(lambda inputs: scan(**inputs), inputs)
        return y, vjp(2 * y)[0]

    return jax.jit(run)


example = inputs(lengths[0])
expected = with_gradients(sequential_scan)(example)
for name, scan in implementations.items():
    results = with_gradients(scan)(example)
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), results, expected)
    largest = max(jax.tree.leaves(differences))
    print(f"{name:18} differs by {largest:.1e}")
    assert largest < 1e-4

# %% [markdown]
# ## Time of the output and the gradients
#
# The times are medians over several rounds. Every round times all implementations, so that other load on the machine
# affects them alike. The repository's `kernels/benchmarks/` times more shapes more carefully.

# %%
import statistics
import time

times = {}
for length in lengths:
    example = inputs(length)
    compiled = {name: with_gradients(scan).lower(example).compile() for name, scan in implementations.items()}
    for round_ in range(rounds + 1):  # the first round warms up
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(example))
            if round_:
                times.setdefault((name, length), []).append(1e3 * (time.perf_counter() - start))
medians = {key: statistics.median(values) for key, values in times.items()}

print(jax.devices()[0].device_kind, "· jax", jax.__version__)
for length in lengths:
    print(f"{length:6} positions:", ", ".join(f"{name} {medians[name, length]:.2f} ms" for name in implementations))

# %%
import matplotlib.pyplot as plt

for name in implementations:
    plt.loglog(lengths, [medians[name, length] for length in lengths], "o-", base=2, label=name)
plt.yscale("log")
plt.xlabel("positions")
plt.ylabel("forward + gradients, ms")
plt.legend()
plt.show()
