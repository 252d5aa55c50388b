"""Ablations of IB-IUMAD remove their part and nothing else; activations for strategies."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from iumad_jax.config import paper
from iumad_jax.errors import UserError
from iumad_jax.methods.ib_iumad import ib_iumad
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch
from tests import sentences
from tests.methods.reference import grown_variables

pytestmark = pytest.mark.slow

OBJECTS, GRID, CHANNELS, WIDTH = 3, 4, 6, 8
BOTH = ("rgb", "depth")
TERMS = {"fusion", "kl", "ib_heads", "object_rgb", "object_depth"}


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compile without optimisation. Each function runs only once here, so this takes a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build(modalities=BOTH, **changes):
    model = paper("10-0").model
    model.update(width=WIDTH, heads=2, layers=1, hidden=12, patch_size=4, states=2, dropout=0.0, target="both")
    model.jitter.probability = 0.0
    model.update_from_flattened_dict(changes)
    return ib_iumad(model, modalities)


def random_batch(modalities=BOTH, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        {m: rng.normal(0, 2, (images, GRID**2, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.integers(0, 256, (images, 16, 16, 3)).astype(np.float32) for m in modalities},
        np.arange(images, dtype=np.int32) % OBJECTS,
    )


def variables_for(method, batch):
    return grown_variables(method, batch, OBJECTS)


def keys_for(batch):
    return jax.random.split(jax.random.key(0), len(batch.object_id))


def loss_of(method, batch, variables):
    return jax.jit(method.loss)(variables, batch, keys_for(batch))


def gradient(method, batch, variables, term):
    """Return the largest absolute derivative of a loss term with respect to each parameter."""
    slope = jax.jit(jax.grad(lambda p: method.loss(variables | {"params": p}, batch, keys_for(batch)).terms[term]))
    return {path: abs(d).max() for path, d in flatten_dict(slope(variables["params"]), sep="/").items()}


def part_names(variables):
    return set(variables["params"]), set(variables["params"]["fusion"])


FUSION = {"attention_0", "attention_0_norm", "attention_1", "attention_1_norm", "fuse"}
BOTTLENECK = {"squeeze", "expand", "fused_head", "compressed_head"}
BRANCHES = {"reconstruction_rgb", "reconstruction_depth", "fusion"}
MAMBA = {"mamba_rgb", "mamba_depth"}


def test_without_the_mamba_decoder():
    """Without it, nothing reads images or recognises objects, and the condition is 1."""
    method, batch = build(mamba=False), random_batch()
    variables = variables_for(method, batch)
    assert part_names(variables) == (BRANCHES, FUSION | BOTTLENECK)
    loss = loss_of(method, batch, variables)
    assert set(loss.terms) == TERMS - {"object_rgb", "object_depth"}
    predict = jax.jit(method.predict)
    prediction = predict(variables, batch)
    assert prediction.object_logits is None
    np.testing.assert_array_equal(
        predict(variables, batch._replace(images=random_batch(seed=1).images)).published, prediction.published
    )
    transformer = ReconstructionTransformer(GRID, WIDTH, heads=2, layers=1, hidden=12)
    for m in BOTH:
        outputs = transformer.apply(
            {"params": variables["params"][f"reconstruction_{m}"]}, batch.features[m][0], None, deterministic=True
        )
        np.testing.assert_allclose(loss.outputs[f"{m}_0"][0], np.mean(outputs[0], 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("modalities", [BOTH, ("depth",)], ids="+".join)
def test_without_the_bottleneck(modalities):
    """F_fu is the reconstruction with the target's width and starts at zero; KL term and heads are missing."""
    method, batch = build(modalities, bottleneck=False), random_batch(modalities)
    start = jax.jit(method.init)(jax.random.key(0), batch)["params"]["fusion"]
    assert set(start) == (FUSION if len(modalities) == 2 else {"fuse"})
    assert start["fuse"]["kernel"].shape == (len(modalities) * WIDTH, len(modalities) * CHANNELS)
    assert not np.asarray(start["fuse"]["kernel"]).any()
    variables = variables_for(method, batch)
    loss = jax.jit(method.loss)
    assert set(loss(variables, batch, keys_for(batch)).terms) == {"fusion"} | {f"object_{m}" for m in modalities}
    zeros = jax.tree.map(np.zeros_like, variables)
    target = np.mean([np.mean(batch.features[m] ** 2) for m in modalities])
    assert float(loss(zeros, batch, keys_for(batch)).terms["fusion"]) == pytest.approx(target, rel=1e-4)


def test_without_the_kl():
    """Both heads are still trained, including that of F_g, but not to agree."""
    method, batch = build(kl=False), random_batch()
    variables = variables_for(method, batch)
    assert part_names(variables) == (BRANCHES | MAMBA, FUSION | BOTTLENECK)
    loss, full_loss = loss_of(method, batch, variables), loss_of(build(), batch, variables)
    assert set(loss.terms) == TERMS - {"kl"}
    assert float(full_loss.total - loss.total) == pytest.approx(float(full_loss.terms["kl"]), rel=1e-3)
    assert float(full_loss.terms["kl"]) > 1e-3


def test_fusion_by_addition():
    """The result is symmetric in the two reconstructions."""
    method, batch = build(fusion="addition", target="rgb"), random_batch()
    variables = variables_for(method, batch)
    assert part_names(variables) == (BRANCHES | MAMBA, {"fuse"} | BOTTLENECK)
    assert variables["params"]["fusion"]["fuse"]["kernel"].shape == (WIDTH, CHANNELS)
    loss = jax.jit(method.loss)
    terms = loss(variables, batch, keys_for(batch)).terms
    assert set(terms) == TERMS
    sizes = gradient(method, batch, variables, "fusion")
    for m in BOTH:
        assert sizes[f"reconstruction_{m}/decoder_0_feed_forward/output/kernel"] > 1e-6
    swapped_params = variables["params"] | {
        f"{part}_{m}": variables["params"][f"{part}_{other}"]
        for part in ("mamba", "reconstruction")
        for m, other in (BOTH, BOTH[::-1])
    }
    swapped = batch._replace(
        features=dict(zip(BOTH, list(batch.features.values())[::-1], strict=True)),
        images=dict(zip(BOTH, list(batch.images.values())[::-1], strict=True)),
    )
    swapped_terms = loss(variables | {"params": swapped_params}, swapped, keys_for(batch)).terms
    assert float(swapped_terms["ib_heads"]) == pytest.approx(float(terms["ib_heads"]), rel=1e-3)


def test_unknown_fusion_is_refused():
    with pytest.raises(UserError, match=sentences.UNKNOWN_FUSION.format(found="sum", known="attention or addition")):
        build(fusion="sum")


def test_activations_are_the_token_means_of_every_feed_forward_output():
    """They have no randomness and the place of their layer; the loss outputs the first three decoder layers."""
    method, batch = build(mamba=False, layers=4, dropout=0.5, **{"jitter.probability": 1.0}), random_batch()
    variables = variables_for(method, batch)
    activations = flatten_dict(jax.jit(method.activations)(variables, batch))
    params = flatten_dict(variables["params"])
    assert len(activations) == 2 * (4 + 4)
    for (*layer, name), rows in activations.items():
        assert name == "mean"
        assert rows.shape == (2, WIDTH)
        assert params[*layer, "kernel"].shape == (12, WIDTH)
        assert params[*layer, "bias"].shape == (WIDTH,)
    m = "rgb"
    feed_forward = variables["params"][f"reconstruction_{m}"]["decoder_0_feed_forward"]["output"]
    shifted = jax.tree.map(np.copy, variables)
    shifted["params"][f"reconstruction_{m}"]["decoder_0_feed_forward"]["output"]["bias"] = feed_forward["bias"] + 1
    shifted_activations = flatten_dict(jax.jit(method.activations)(shifted, batch))
    path = (f"reconstruction_{m}", "decoder_0_feed_forward", "output", "mean")
    np.testing.assert_allclose(shifted_activations[path], activations[path] + 1, rtol=1e-4)
    loss = jax.jit(method.loss)(variables, batch, jax.random.split(jax.random.key(0), 2))
    assert {name: rows.shape for name, rows in loss.outputs.items()} == {
        f"{m}_{i}": (2, WIDTH) for m in BOTH for i in range(3)
    }
