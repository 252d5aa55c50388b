"""The fusion and its bottleneck compared with NumPy in float64, written from the paper's text."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from iumad_jax.models.fusion import Fused, InformationBottleneckFusion

OBJECTS = 3
STATISTICS = {head: {"objects": OBJECTS} for head in ("fused_head", "compressed_head")}


def fuse(naive, p, reconstructions):
    if len(reconstructions) == 2:
        r, d = reconstructions
        a_r = naive.layer_norm(p["attention_0_norm"], r + naive.attention(p["attention_0"], r, d, d))
        a_d = naive.layer_norm(p["attention_1_norm"], d + naive.attention(p["attention_1"], d, r, r))
        reconstructions = [a_r, a_d]
    fused = naive.dense(p["fuse"], np.concatenate(reconstructions, axis=1))
    compressed = naive.dense(p["expand"], np.maximum(naive.dense(p["squeeze"], fused), 0))
    return Fused(
        fused,
        compressed,
        naive.dense(p["fused_head"], fused.mean(0)),
        naive.dense(p["compressed_head"], compressed.mean(0)),
    )


@pytest.mark.parametrize("modalities", [1, 2])
def test_fusion(naive, modalities):
    rng = np.random.default_rng(0)
    reconstructions = list(rng.standard_normal((modalities, 6, 8)).astype(np.float32))
    network = InformationBottleneckFusion(features=9, heads=2)
    params, exact = naive.parameters(network, *reconstructions, deterministic=True)
    variables = {"params": params, "statistics": STATISTICS}
    fused = jax.jit(lambda v: network.apply(v, *reconstructions, deterministic=True))(variables)
    expected = fuse(naive, exact, [r.astype(np.float64) for r in reconstructions])
    for name in ("fused", "compressed"):
        np.testing.assert_allclose(getattr(fused, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
        logits, reference = (getattr(output, f"{name}_logits") for output in (fused, expected))
        np.testing.assert_allclose(logits[:OBJECTS], reference[:OBJECTS], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(nn.softmax(logits)[OBJECTS:], 0)
    assert exact["squeeze"]["kernel"].shape == (9, 6)  # two thirds


def test_bottleneck_is_dropped_out(naive):
    """With dropout 1, F_g is the bias of the last layer, and F_fu does not change."""
    reconstruction = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    network = InformationBottleneckFusion(features=9, dropout=1.0)
    params, exact = naive.parameters(network, reconstruction, deterministic=True)
    variables, rngs = {"params": params, "statistics": STATISTICS}, {"dropout": jax.random.key(0)}
    fused = network.apply(variables, reconstruction, deterministic=False, rngs=rngs)
    np.testing.assert_allclose(fused.fused, naive.dense(exact["fuse"], reconstruction), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fused.compressed, np.broadcast_to(exact["expand"]["bias"], (6, 9)), rtol=1e-6)
