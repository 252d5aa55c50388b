"""Reference implementations of the basic layers in NumPy float64, written from their definitions."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest


def parameters(module, *inputs, **options):
    """Draw random parameters in float32 and float64; unlike the initial 0 and 1, every bias and scale has an effect."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **options), jax.random.key(0))["params"]
    params = jax.tree.map(lambda p: (0.5 * rng.standard_normal(p.shape)).astype(np.float32), shapes)
    return params, jax.tree.map(lambda p: p.astype(np.float64), params)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(p, q, k, v, allowed=None):
    """Compute multi-head attention, one head and one query token at a time."""
    out = np.zeros((len(q), p["out"]["bias"].size)) + p["out"]["bias"]
    for head in range(p["query"]["kernel"].shape[1]):
        head_q, head_k, head_v = (
            x @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name, x in {"query": q, "key": k, "value": v}.items()
        )
        for i in range(len(q)):
            keys = range(len(k)) if allowed is None else np.flatnonzero(allowed[i])
            weights = softmax(np.array([head_q[i] @ head_k[j] for j in keys]) / np.sqrt(head_q.shape[1]))
            mixed = sum(w * head_v[j] for w, j in zip(weights, keys, strict=True))
            out[i] += mixed @ p["out"]["kernel"][head]
    return out


@pytest.fixture(scope="session")
def naive():
    return SimpleNamespace(parameters=parameters, dense=dense, layer_norm=layer_norm, attention=attention)
