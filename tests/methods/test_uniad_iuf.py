"""Losses, maps and gradients of UniAD and IUF as a whole; tests/models tests their parts."""

import jax
import numpy as np
import pytest

from iumad_jax.config import paper
from iumad_jax.methods.iuf import iuf, merge_colours
from iumad_jax.methods.uniad import uniad
from iumad_jax.models.class_network import ClassNetwork, identity_statistics
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch
from tests.methods.reference import grown_variables, map_from

pytestmark = pytest.mark.slow

OBJECTS, CHANNELS, WIDTH, SIDE = 3, 6, 8, 4
GRIDS = {"uniad": 8, "iuf": 4}
MODALITIES = [("rgb",), ("depth",), ("rgb", "depth")]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compile without optimisation. Each function runs only once here, so this takes a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny(**changes):
    model = paper("10-0").model
    model.update(width=WIDTH, heads=2, layers=1, hidden=12, class_grid=SIDE, dropout=0.0)
    model.jitter.probability = 0.0
    model.update_from_flattened_dict(changes)
    return model


def build(name, modalities, **changes):
    config = tiny(**changes)
    return uniad(config, modalities) if name == "uniad" else iuf(config, modalities)


def random_batch(name, modalities, images=2, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(
        {m: rng.normal(0, 2, (images, GRIDS[name] ** 2, CHANNELS)).astype(np.float32) for m in modalities},
        {m: rng.integers(0, 256, (images, 16, 16, 3)).astype(np.float32) for m in modalities},
        np.arange(images, dtype=np.int32) % OBJECTS,
    )


def variables_for(method, batch):
    """Return random parameters, also for biases and scales, and statistics of the batch."""
    return method.observe(grown_variables(method, batch, OBJECTS), batch, 0)


def keys_for(batch):
    return jax.random.split(jax.random.key(0), len(batch.object_id))


def branch(name, variables, m, tokens, image):
    """Return the rebuilt tokens of one modality of one image, and the logits of the learned objects."""
    params, condition, logits = variables["params"], None, None
    if name == "iuf":
        network = ClassNetwork(GRIDS[name], WIDTH, blocks=1, side=SIDE)
        class_variables = {"params": params[f"class_{m}"], "statistics": variables["statistics"][f"class_{m}"]}
        condition, logits = network.apply(class_variables, image)
        logits = logits[:OBJECTS]
    transformer = ReconstructionTransformer(
        GRIDS[name], WIDTH, heads=2, layers=1, hidden=12, hide_neighbours=name == "uniad"
    )
    outputs = transformer.apply({"params": params[f"reconstruction_{m}"]}, tokens, condition, deterministic=True)
    project = params[f"project_{m}"]
    return outputs[-1] @ project["kernel"] + project["bias"][None], logits


@pytest.mark.parametrize("modalities", MODALITIES, ids="+".join)
@pytest.mark.parametrize("name", ["uniad", "iuf"])
def test_losses_and_maps(name, modalities):
    """Errors of two modalities are combined at each token: sqrt(|e_rgb|^2 + |e_depth|^2)."""
    method, batch = build(name, modalities, object_weight=3.0), random_batch(name, modalities)
    variables = variables_for(method, batch)
    compiled = jax.jit(lambda m, tokens, image: branch(name, variables, m, tokens, image), static_argnums=0)
    expected = {f"reconstruction_{m}": [] for m in modalities}
    if name == "iuf":
        expected |= {f"object_{m}": [] for m in modalities}
    squares, object_logits = [], []
    for i, y in enumerate(batch.object_id):
        square, logits_sum = 0, 0
        for m in modalities:
            rebuilt, logits = compiled(m, batch.features[m][i], batch.images[m][i])
            error = np.asarray(rebuilt, np.float64) - batch.features[m][i]
            expected[f"reconstruction_{m}"].append((error**2).mean())
            square = square + (error**2).sum(1)
            if name == "iuf":
                log_p = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum())
                expected[f"object_{m}"].append(-3 * log_p[y])
                logits_sum = logits_sum + log_p
        squares.append(square)
        object_logits.append(logits_sum)

    total, terms, *_ = jax.jit(method.loss)(variables, batch, keys_for(batch))
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: np.mean(values) for name, values in expected.items()}, rel=1e-3
    )
    assert float(total) == pytest.approx(sum(map(np.mean, expected.values())), rel=1e-3)
    prediction = jax.jit(method.predict)(variables, batch)
    np.testing.assert_allclose(prediction.published, map_from(np.sqrt(squares).astype(np.float32)), rtol=1e-3)
    squares_of_maps = sum(np.square(error_map) for error_map in prediction.maps.values())
    corners = np.ix_(range(len(squares)), [0, -1], [0, -1])  # which are tokens
    np.testing.assert_allclose(np.sqrt(squares_of_maps)[corners], np.array(prediction.published)[corners], rtol=1e-3)
    if name == "uniad":
        assert prediction.object_logits is None
    else:
        np.testing.assert_allclose(prediction.object_logits[:, :OBJECTS], object_logits, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.exp(prediction.object_logits[:, OBJECTS:]), 0)


@pytest.mark.parametrize("detached", [True, False])
def test_iufs_class_network_learns_from_the_object_alone_if_the_condition_is_detached(detached):
    method, batch = build("iuf", ("rgb",), detach_condition=detached), random_batch("iuf", ("rgb",))
    variables = variables_for(method, batch)

    @jax.jit
    def largest(params):
        jacobian = jax.jacrev(lambda p: method.loss(variables | {"params": p}, batch, keys_for(batch)).terms)(params)
        return jax.tree.map(lambda derivative: abs(derivative).max(), jacobian)

    sizes = jax.tree.map(float, largest(variables["params"]))
    class_sizes = sizes["reconstruction_rgb"]["class_rgb"]
    moved = [size for part, tree in class_sizes.items() if "head" not in part for size in jax.tree.leaves(tree)]
    assert max(moved) == 0 if detached else np.median(moved) > 1e-4
    assert np.median(jax.tree.leaves(sizes["object_rgb"]["class_rgb"])) > 1e-4
    assert not any(jax.tree.leaves(sizes["object_rgb"]["reconstruction_rgb"]))


def test_jitter_reaches_the_input_and_not_the_target():
    """The loss of a network of zeros is the mean square of the target; jitter changes the loss of other networks."""
    method, batch = build("uniad", ("rgb",), **{"jitter.probability": 1.0}), random_batch("uniad", ("rgb",))
    variables = variables_for(method, batch)
    zeros = jax.tree.map(np.zeros_like, variables)
    loss = jax.jit(method.loss)
    assert float(loss(zeros, batch, keys_for(batch)).total) == pytest.approx(np.mean(batch.features["rgb"] ** 2))
    without_jitter = jax.jit(build("uniad", ("rgb",)).loss)(variables, batch, keys_for(batch)).total
    assert abs(float(loss(variables, batch, keys_for(batch)).total) - float(without_jitter)) > 1e-3


@pytest.mark.parametrize("name", ["uniad", "iuf"])
def test_standardise_uses_the_base_steps_statistics(name):
    method, plain = build(name, ("rgb",), standardise=True), build(name, ("rgb",))
    first, later = random_batch(name, ("rgb",)), random_batch(name, ("rgb",), seed=1)
    variables = variables_for(method, first)
    assert method.observe(variables, later, 1) == variables
    base = first.features["rgb"]
    z_scored = later._replace(features={"rgb": (later.features["rgb"] - base.mean((0, 1))) / base.std((0, 1))})
    np.testing.assert_allclose(
        *(jax.jit(m.predict)(variables, x).maps["rgb"] for m, x in ((method, later), (plain, z_scored))), rtol=1e-3
    )


def test_colours_are_those_of_all_images_of_the_base_step():
    """Mean and covariance of the pooled pixels are updated object by object; later steps change nothing."""
    method = build("iuf", ("rgb",))
    first, second = (random_batch("iuf", ("rgb",), images=3, seed=seed) for seed in range(2))
    variables = jax.jit(method.init)(jax.random.key(0), first)
    for batch in (first, second):
        variables = method.observe(variables, batch, 0)
    images = np.concatenate([first.images["rgb"], second.images["rgb"]]).astype(np.float64)
    pixels = (images / 127.5 - 1).reshape(6, SIDE, 4, SIDE, 4, 3).mean((2, 4)).reshape(-1, 3)
    colours = variables["statistics"]["class_rgb"]["stem"]["colours"]
    assert colours["count"] == 6 * SIDE**2
    np.testing.assert_allclose(colours["mean"], pixels.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(colours["covariance"], np.cov(pixels.T, bias=True), rtol=1e-3, atol=1e-6)
    assert method.observe(variables, second, 1) is variables
    half = merge_colours(identity_statistics(), images[:2], SIDE)
    np.testing.assert_allclose(merge_colours(half, images[2:], SIDE)["mean"], pixels.mean(0), rtol=1e-4, atol=1e-6)
