"""Heads grow by the objects that a run learns: what is added, what stays, and what has no effect."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.methods.ib_iumad import bottleneck_loss
from iumad_jax.models.fusion import Fused
from iumad_jax.models.object_head import ObjectHead, grow_heads

WIDTH = 50
X = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)


class Heads(nn.Module):
    """Two heads, one of them within another module."""

    @nn.compact
    def __call__(self, x):
        return ObjectHead(name="fused")(x), nn.Sequential([ObjectHead()])(x)


INITIAL = Heads().init(jax.random.key(0), X)


def grown(*numbers, key=0, variables=INITIAL):
    for objects in numbers:
        variables = grow_heads(variables, objects, jax.random.key(key))
    return variables


def trained(variables):
    """Change all parameters."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), variables["params"])
    return variables | {"params": params}


def kernels(variables):
    return [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, unique=True).map(sorted))
def test_objects_learned_one_by_one_equal_those_learned_at_once(numbers):
    at_once = grown(numbers[-1])
    jax.tree.map(np.testing.assert_array_equal, grown(*numbers), at_once)
    for small, large in zip(kernels(grown(numbers[0])), kernels(at_once), strict=True):
        np.testing.assert_array_equal(small[:, : numbers[0]], large[:, : numbers[0]])


def test_weights_differ_between_objects_heads_and_keys():
    """They are normal with variance 1 / d, as those of other layers, and the weights of objects to come are 0."""
    columns = np.concatenate([kernel[:, :17] for key in (0, 1) for kernel in kernels(grown(17, key=key))], axis=1)
    correlation = np.corrcoef(columns.T)
    assert columns.shape == (WIDTH, 2 * 2 * 17)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.7
    assert columns.var() == pytest.approx(1 / WIDTH, rel=0.1)
    for kernel in kernels(grown(17)):
        assert kernel.shape == (WIDTH, 24)
        assert not kernel[:, 17:].any()


@pytest.mark.parametrize(("before", "after", "tolerance"), [(3, 8, 0), (8, 9, 1e-6), (2, 30, 1e-6)])
def test_trained_objects_stay_as_they_are(before, after, tolerance):
    """Their weights are equal bit for bit, and so are their logits unless a new block changes the program."""
    small = trained(grown(before))
    large = grown(after, variables=small)
    for old, new in zip(*(jax.tree.leaves(variables["params"]) for variables in (small, large)), strict=True):
        np.testing.assert_array_equal(old[..., :before], new[..., :before])
    apply = jax.jit(Heads().apply)
    for old, new in zip(apply(small, X), apply(large, X), strict=True):
        np.testing.assert_allclose(old[:before], new[:before], rtol=tolerance, atol=tolerance)
        assert (np.asarray(new[:after]) > -100).all()


def losses(fused_logits, compressed_logits):
    fused = Fused(np.zeros((1, 1)), np.zeros((1, 1)), fused_logits, compressed_logits)
    return bottleneck_loss(fused, 1, 2.0)


def test_objects_to_come_have_no_effect():
    """Probabilities and losses are those of the learned objects alone; derivatives of the others' weights are 0."""
    variables = trained(grown(3))

    @jax.jit
    def losses_of(params):
        return losses(*Heads().apply(variables | {"params": params}, X))

    logits = Heads().apply(variables, X)
    for head_logits in logits:
        probabilities = np.asarray(nn.softmax(head_logits))
        np.testing.assert_array_equal(probabilities[3:], 0)
        np.testing.assert_allclose(probabilities[:3], nn.softmax(head_logits[:3]), rtol=1e-6)
    values, slopes = losses_of(variables["params"]), jax.jit(jax.jacrev(losses_of))(variables["params"])
    for name, expected in losses(*(head_logits[:3] for head_logits in logits)).items():
        assert float(values[name]) == pytest.approx(float(expected), rel=1e-5)
        assert float(expected) > 0.01
        derivatives = [np.asarray(leaf) for leaf in jax.tree.leaves(slopes[name])]
        assert all(np.isfinite(derivative).all() for derivative in derivatives)
        assert any(derivative[..., :3].any() for derivative in derivatives)
        assert not any(derivative[..., 3:].any() for derivative in derivatives)


def test_a_program_serves_all_numbers_of_objects_within_a_block():
    predict = jax.jit(lambda variables, x: [nn.log_softmax(logits) for logits in Heads().apply(variables, x)])
    variables, programs = INITIAL, []
    for objects in range(1, 18):
        variables = grown(objects, variables=variables)
        for log_probabilities in predict(variables, X):
            assert (np.exp(log_probabilities) > 0).sum() == objects
        programs.append(predict._cache_size())
    assert programs == [1] * 8 + [2] * 8 + [3]
