"""UniAD and IUF put together, on every modality: their losses, maps and gradients from parts proven elsewhere."""

import jax
import numpy as np
import pytest

from iumad_jax.config import paper
from iumad_jax.inference.anomaly_map import predictor
from iumad_jax.methods.iuf import iuf, merge_colours
from iumad_jax.methods.uniad import uniad
from iumad_jax.models.class_network import ClassNetwork, identity_statistics
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch
from tests.methods.reference import prediction_of

pytestmark = pytest.mark.slow

OBJECTS, CHANNELS, WIDTH, SIDE = 3, 6, 8, 4
GRIDS = {"uniad": 8, "iuf": 4}
MODALITIES = [("rgb",), ("depth",), ("rgb", "depth")]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Everything here is compiled once for a few numbers, which takes a third of the time without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(**changes):
    model = paper("10-0").model
    model.update(width=WIDTH, heads=2, layers=1, hidden=12, class_grid=SIDE, dropout=0.0)
    model.jitter.probability = 0.0
    model.update_from_flattened_dict(changes)
    return model


def built(name, modalities, **changes):
    config = tiny(**changes)
    return uniad(config, modalities) if name == "uniad" else iuf(config, modalities, OBJECTS)


def random_batch(name, modalities, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        {m: rng.normal(0, 2, (images, GRIDS[name] ** 2, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.integers(0, 256, (images, 16, 16, 3)).astype(np.float32) for m in modalities},
        np.arange(images, dtype=np.int32) % OBJECTS,
    )


def variables_for(method, batch):
    """Random parameters, none of them 0 or 1 as biases and scales start; statistics of the batch."""
    rng = np.random.default_rng(0)
    variables = jax.jit(method.init)(jax.random.key(0), batch)
    params = jax.tree.map(lambda p: (0.4 * rng.standard_normal(p.shape)).astype(np.float32), variables["params"])
    return method.observe({"params": params, "statistics": variables["statistics"]}, batch, 0)


def keys_for(batch):
    return jax.random.split(jax.random.key(0), len(batch.object_id))


def branch(name, variables, m, tokens, image):
    """The rebuilt tokens of one modality of one image, and the object's logits."""
    params, condition, logits = variables["params"], None, None
    if name == "iuf":
        network = ClassNetwork(OBJECTS, GRIDS[name], WIDTH, blocks=1, side=SIDE)
        own = {"params": params[f"class_{m}"], "statistics": variables["statistics"][f"class_{m}"]}
        condition, logits = network.apply(own, image)
    transformer = ReconstructionTransformer(
        GRIDS[name], WIDTH, heads=2, layers=1, hidden=12, hide_neighbours=name == "uniad"
    )
    outputs = transformer.apply({"params": params[f"reconstruction_{m}"]}, tokens, condition, deterministic=True)
    project = params[f"project_{m}"]
    return outputs[-1] @ project["kernel"] + project["bias"][None], logits


@pytest.mark.parametrize("modalities", MODALITIES, ids="+".join)
@pytest.mark.parametrize("name", ["uniad", "iuf"])
def test_losses_and_maps(name, modalities):
    """Errors of two modalities are joined at each token: sqrt(|e_rgb|^2 + |e_depth|^2)."""
    method, batch = built(name, modalities, object_weight=3.0), random_batch(name, modalities)
    variables = variables_for(method, batch)
    compiled = jax.jit(lambda m, tokens, image: branch(name, variables, m, tokens, image), static_argnums=0)
    expected = {f"reconstruction_{m}": [] for m in modalities}
    if name == "iuf":
        expected |= {f"object_{m}": [] for m in modalities}
    squares, told = [], []
    for i, y in enumerate(batch.object_id):
        square, say = 0, 0
        for m in modalities:
            rebuilt, logits = compiled(m, batch.features[m][i], batch.images[m][i])
            error = np.asarray(rebuilt, np.float64) - batch.features[m][i]
            expected[f"reconstruction_{m}"].append((error**2).mean())
            square = square + (error**2).sum(1)
            if name == "iuf":
                log_p = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum())
                expected[f"object_{m}"].append(-3 * log_p[y])
                say = say + log_p
        squares.append(square)
        told.append(say)

    total, terms, *_ = jax.jit(method.loss)(variables, batch, keys_for(batch))
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: np.mean(values) for name, values in expected.items()}, rel=1e-3
    )
    assert float(total) == pytest.approx(sum(map(np.mean, expected.values())), rel=1e-3)
    prediction = jax.jit(predictor(method))(variables, batch)
    wanted = prediction_of(np.sqrt(squares).astype(np.float32))
    np.testing.assert_allclose(prediction.map, wanted.map, rtol=1e-3)
    np.testing.assert_allclose(prediction.score, wanted.score, rtol=1e-3)
    if name == "uniad":
        assert prediction.object_logits is None
    else:
        np.testing.assert_allclose(prediction.object_logits, told, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("detached", [True, False])
def test_iufs_class_network_learns_from_the_object_alone_unless_asked_otherwise(detached):
    method, batch = built("iuf", ("rgb",), detach_condition=detached), random_batch("iuf", ("rgb",))
    variables = variables_for(method, batch)

    @jax.jit
    def largest(params):
        jacobian = jax.jacrev(lambda p: method.loss(variables | {"params": p}, batch, keys_for(batch)).terms)(params)
        return jax.tree.map(lambda derivative: abs(derivative).max(), jacobian)

    sizes = jax.tree.map(float, largest(variables["params"]))
    of_class = sizes["reconstruction_rgb"]["class_rgb"]
    moved = [size for part, tree in of_class.items() if "head" not in part for size in jax.tree.leaves(tree)]
    assert max(moved) == 0 if detached else np.median(moved) > 1e-4
    assert np.median(jax.tree.leaves(sizes["object_rgb"]["class_rgb"])) > 1e-4
    assert not any(jax.tree.leaves(sizes["object_rgb"]["reconstruction_rgb"]))


def test_jitter_reaches_the_input_and_not_the_target():
    """A network of zeros rebuilds zeros; with another's weights jitter changes the loss."""
    method, batch = built("uniad", ("rgb",), **{"jitter.probability": 1.0}), random_batch("uniad", ("rgb",))
    variables = variables_for(method, batch)
    zeros = jax.tree.map(np.zeros_like, variables)
    loss = jax.jit(method.loss)
    assert float(loss(zeros, batch, keys_for(batch)).total) == pytest.approx(np.mean(batch.features["rgb"] ** 2))
    still = jax.jit(built("uniad", ("rgb",)).loss)(variables, batch, keys_for(batch)).total
    assert abs(float(loss(variables, batch, keys_for(batch)).total) - float(still)) > 1e-3


@pytest.mark.parametrize("name", ["uniad", "iuf"])
def test_standardise_uses_the_base_steps_statistics(name):
    method, plain = built(name, ("rgb",), standardise=True), built(name, ("rgb",))
    first, later = random_batch(name, ("rgb",)), random_batch(name, ("rgb",), seed=1)
    variables = variables_for(method, first)
    assert method.observe(variables, later, 1) == variables
    seen = first.features["rgb"]
    z_scored = later._replace(features={"rgb": (later.features["rgb"] - seen.mean((0, 1))) / seen.std((0, 1))})
    np.testing.assert_allclose(
        jax.jit(predictor(method))(variables, later).map, jax.jit(predictor(plain))(variables, z_scored).map, rtol=1e-3
    )


def test_colours_are_those_of_all_images_of_the_base_step():
    """Gathered object by object: mean and covariance of the pooled pixels, and later steps change nothing."""
    method = built("iuf", ("rgb",))
    first, second = (random_batch("iuf", ("rgb",), images=3, seed=seed) for seed in range(2))
    variables = jax.jit(method.init)(jax.random.key(0), first)
    for batch in (first, second):
        variables = method.observe(variables, batch, 0)
    images = np.concatenate([first.images["rgb"], second.images["rgb"]]).astype(np.float64)
    pixels = (images / 127.5 - 1).reshape(6, SIDE, 4, SIDE, 4, 3).mean((2, 4)).reshape(-1, 3)
    found = variables["statistics"]["class_rgb"]["stem"]["colours"]
    assert found["count"] == 6 * SIDE**2
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["covariance"], np.cov(pixels.T, bias=True), rtol=1e-3, atol=1e-6)
    assert method.observe(variables, second, 1) is variables
    half = merge_colours(identity_statistics(), images[:2], SIDE)
    np.testing.assert_allclose(merge_colours(half, images[2:], SIDE)["mean"], pixels.mean(0), rtol=1e-4, atol=1e-6)
