"""IUF's class network compared with NumPy in float64, written from its description."""

import math

import jax
import numpy as np
import pytest

from iumad_jax.models.class_network import ClassNetwork, Stem

SIDE, GRID, WIDTH = 8, 4, 6


def colours(rng):
    mixing = rng.normal(size=(3, 3))
    return {"count": np.float32(9), "mean": rng.normal(size=3), "covariance": mixing @ mixing.T}


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def block(naive, p, x):
    """Apply attention within each row, then the feed-forward part."""
    normed = naive.layer_norm(p["norm_1"], x)
    x = x + np.stack([naive.attention(p["attention"], row, row, row) for row in normed])
    normed = naive.layer_norm(p["norm_2"], x)
    return x + naive.dense(p["output"], gelu(naive.dense(p["hidden"], normed)))


def network_outputs(naive, p, statistics, image):
    pooled = (image / 127.5 - 1).reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3))
    stem = p["stem"]
    x = (pooled - statistics["mean"]) @ stem["kernel"]
    x = x / np.sqrt(np.diag(stem["kernel"].T @ statistics["covariance"] @ stem["kernel"]) + 1e-5)
    x = np.maximum(x * stem["scale"] + stem["bias"], 0)
    condition = []
    for i in range(2):
        x = block(naive, p[f"block_{i}"], x)
        condition.append(x.reshape(GRID, 2, GRID, 2, WIDTH).mean((1, 3)).reshape(GRID**2, WIDTH))
    hidden = np.maximum(naive.dense(p["head_hidden"], x.mean((0, 1))), 0)
    return condition, naive.dense(p["head"], hidden)


def test_class_network(naive):
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 255, (2 * SIDE, 2 * SIDE, 3)).astype(np.float32)
    network = ClassNetwork(grid=GRID, width=WIDTH, blocks=2, side=SIDE, heads=2, hidden=5)
    params, exact = naive.parameters(network, image)
    colour_statistics = colours(rng)
    statistics = {"stem": {"colours": jax.tree.map(np.float32, colour_statistics)}, "head": {"objects": 3}}
    condition, logits = jax.jit(network.apply)({"params": params, "statistics": statistics}, image)
    expected, expected_logits = network_outputs(naive, exact, colour_statistics, image.astype(np.float64))
    for actual, reference in zip(condition, expected, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(logits[:3], expected_logits[:3], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(jax.nn.softmax(logits)[3:], 0)


@pytest.mark.parametrize("seed", range(3))
def test_stem_is_batch_norm_over_all_pixels(seed):
    """Outputs for the pixels of the statistics have mean 0 and variance 1 before scale and bias."""
    rng = np.random.default_rng(seed)
    pixels = (rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + rng.normal(size=3)).astype(np.float32)
    colour_statistics = {"count": np.float32(500), "mean": pixels.mean(0), "covariance": np.cov(pixels.T, bias=True)}
    params = {
        "kernel": rng.normal(size=(3, 7)).astype(np.float32),
        "scale": np.full(7, 0.5, np.float32),
        "bias": np.full(7, 20, np.float32),  # keeps all outputs positive, so that ReLU has no effect
    }
    statistics = {"colours": jax.tree.map(np.float32, colour_statistics)}
    out = np.asarray(Stem(7).apply({"params": params, "statistics": statistics}, pixels), np.float64)
    np.testing.assert_allclose(out.mean(0), 20, atol=1e-3)
    np.testing.assert_allclose(out.std(0), 0.5, rtol=1e-3)
