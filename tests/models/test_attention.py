"""Attention and its gradients against Flax's own; its dropout."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from iumad_jax.models.layers import Attention

HEADS, WIDTH = 3, 12


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 3, 7, WIDTH)])
@pytest.mark.parametrize("scale", [1, 30])  # 30 makes similarities of several hundred
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_are_those_of_flax(shape, scale, masked):
    q, k, v, g = random(4, *shape)
    mask = np.tril(np.ones((7, 7), bool)) if masked else None
    flax = nn.MultiHeadDotProductAttention(HEADS, deterministic=True)
    params = flax.init(jax.random.key(0), q)["params"]
    params = {name: jax.tree.map(lambda leaf: scale * leaf, params[name]) for name in ("query", "key")} | {
        name: params[name] for name in ("value", "out")
    }

    def ours(params, q, k, v):
        return (g * Attention(HEADS, 0.0, mask).apply({"params": params}, q, k, v, deterministic=True)).sum()

    def theirs(params, q, k, v):
        return (g * flax.apply({"params": params}, q, k, v, mask=mask)).sum()

    actual, expected = (jax.value_and_grad(f, range(4))(params, q, k, v) for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale), actual, expected)


def equal_weights(heads, tokens, width):
    """Return parameters with which all weights are equal and every head sees the first width / heads channels."""
    shape = width, heads, width // heads
    zeros = {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(shape[1:], np.float32)}
    first = np.broadcast_to(np.eye(width, width // heads, dtype=np.float32)[:, None], shape)
    out = np.eye(width, dtype=np.float32).reshape(heads, width // heads, width)
    return {
        "query": zeros,
        "key": zeros,
        "value": zeros | {"kernel": first},
        "out": {"kernel": out, "bias": np.zeros(width, np.float32)},
    }


def test_heads_share_the_dropout_of_weights():
    """With identity matrices as values, the output equals the weights after dropout, once for each head."""
    tokens, width = 64, 128
    values = np.eye(tokens, width, dtype=np.float32)
    weights = tokens * Attention(heads=2, dropout=0.1).apply(
        {"params": equal_weights(2, tokens, width)},
        *(values,) * 3,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
    )
    np.testing.assert_array_equal(weights[:, :64], weights[:, 64:])
    kept = np.asarray(weights) > 0.5
    np.testing.assert_allclose(weights[kept], 1 / 0.9, rtol=1e-5)
    np.testing.assert_allclose(weights[~kept], 0, atol=1e-6)
    assert abs((~kept).mean() - 0.1) < 0.02


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="got 5 heads and width 12"):
        Attention(5, 0.0).init(jax.random.key(0), *random(3, 7, WIDTH), deterministic=True)
