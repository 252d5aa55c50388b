"""Mahalanobis distances against SciPy, of features and of residuals of networks."""

import jax
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from iumad_jax.config import paper
from iumad_jax.methods import mahalanobis
from iumad_jax.methods.gaussian import gaussian
from iumad_jax.methods.uniad import uniad
from iumad_jax.shapes import BY_OBJECT, Batch
from tests.methods.reference import map_from


def correlated(seed, images=70, tokens=16, channels=5):
    """Return features with correlated channels of different scales."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(0, 1, (channels, channels)) * np.geomspace(0.01, 100, channels)
    return (rng.normal(seed, 1, (images, tokens, channels)) @ mixing).astype(np.float32)


def expected_distances(training, test):
    """Compare z-scores by their correlation matrix plus 0.03 times the identity, in float64."""
    rows, points = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (training, test))
    z, z_test = ((x - rows.mean(0)) / rows.std(0) for x in (rows, points))
    inverse = np.linalg.inv(np.corrcoef(z.T) + 0.03 * np.eye(z.shape[1]))
    return cdist(z_test, np.zeros((1, z.shape[1])), "mahalanobis", VI=inverse).reshape(test.shape[:-1])


def distances(features, fitted):
    return jax.vmap(lambda x: mahalanobis.distances(x, fitted))(features)


def test_distance_is_that_of_scipy_however_the_images_are_divided():
    training, test = correlated(0), correlated(1, images=3)
    whole, parted = (mahalanobis.fit(parts)["rgb"] for parts in ([{"rgb": training}], parts_of(training)))
    for fitted in whole, parted:
        np.testing.assert_allclose(distances(test, fitted), expected_distances(training, test), rtol=1e-4)


def parts_of(features):
    return list(mahalanobis.in_parts({"rgb": features}))


def test_parts_hold_every_image_once():
    parts = parts_of(correlated(0, images=130))
    assert [len(part["rgb"]) for part in parts] == [64, 64, 2]
    np.testing.assert_array_equal(np.concatenate([part["rgb"] for part in parts]), correlated(0, images=130))


def test_constant_channels_are_left_out():
    training, test = correlated(0), correlated(1, images=2)
    constant = [np.concatenate([x, np.full_like(x[..., :1], 3 + i)], -1) for i, x in enumerate((training, test))]
    fitted = mahalanobis.fit([{"rgb": constant[0]}])["rgb"]
    np.testing.assert_allclose(distances(constant[1], fitted), expected_distances(training, test), rtol=1e-4)


@pytest.mark.parametrize("first", [1, 35, 69])
@pytest.mark.parametrize("varies", ["always", "later", "earlier", "never"])
def test_merging_with_an_earlier_gaussian_equals_fitting_all_images(first, varies):
    """Also if a channel is constant in the earlier images, in the later ones, or in all."""
    images, test = correlated(0), correlated(1, images=2)
    images[:first] = (images[:first] - 2) * 1.5  # both sets differ in mean and spread
    images[: first if varies == "later" else 0, :, 2] = 0.1
    images[first if varies == "earlier" else len(images) :, :, 2] = 0.1
    images[slice(None) if varies == "never" else slice(0), :, 2] = 0.1
    merged = mahalanobis.fit(parts_of(images[first:]), mahalanobis.fit(parts_of(images[:first])))["rgb"]
    whole = mahalanobis.fit(parts_of(images))["rgb"]
    spread = images.std((0, 1), dtype=np.float64) + 1e-6
    assert merged["count"] == 70 * 16
    np.testing.assert_allclose(merged["mean"] / spread, whole["mean"] / spread, rtol=1e-6, atol=1e-5)
    scale = np.outer(spread, spread)
    precisions = [fitted["whitening"] @ fitted["whitening"].T * scale for fitted in (merged, whole)]
    np.testing.assert_allclose(*precisions, rtol=1e-4, atol=1e-4)
    kept = np.delete(np.arange(5), 2) if varies == "never" else np.arange(5)
    np.testing.assert_allclose(
        distances(test, merged), expected_distances(images[..., kept], test[..., kept]), rtol=1e-4
    )


def test_gaussian_uses_the_recognised_objects_features():
    method, objects, test = gaussian(), [correlated(seed) for seed in range(3)], correlated(3, images=2)
    batches = [Batch({"depth": x}, {}, np.full(len(x), i, np.int32)) for i, x in enumerate(objects)]
    variables = method.init(jax.random.key(0), batches[0])
    for batch in batches:
        variables = method.observe(variables, batch, 0)
    for number in range(3):
        batch = Batch({"depth": test}, {}, np.full(2, number, np.int32))
        actual = jax.jit(method.predict)(method.arrange(variables), batch).maps["depth"]
        expected = map_from(expected_distances(objects[number], test).astype(np.float32))
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def network():
    """Return UniAD with random parameters, and the same without projection, which shows the features' sign."""
    config = paper("10-0").model
    config.update(width=8, heads=2, layers=1, hidden=12, dropout=0.0)
    method = uniad(config, ("rgb", "depth"))
    variables = jax.jit(method.init)(jax.random.key(0), batch_of(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.4 * rng.standard_normal(p.shape)).astype(np.float32), variables["params"])
    return method, variables | {"params": params}


def batch_of(seed, images=3, object_id=0):
    """Return features for a grid of 8 x 8 tokens."""
    features = {m: correlated(seed + i, images, 64, 6) for i, m in enumerate(("rgb", "depth"))}
    return Batch(features, {}, np.full(images, object_id, np.int32))


def norms(method, variables, batch):
    """Return the error maps of residuals that no Gaussian is fitted to."""
    return jax.jit(method.predict)(variables | {BY_OBJECT: ()}, batch)


def test_errors_of_a_network_without_training_images_are_norms(network):
    method, variables = network
    zero = variables | {"params": jax.tree.map(np.zeros_like, variables["params"])}
    expected = map_from(np.linalg.norm(batch_of(1).features["rgb"], axis=-1))
    np.testing.assert_allclose(norms(method, zero, batch_of(1)).maps["rgb"], expected, rtol=1e-5)


def test_errors_of_a_network_are_distances_of_residuals(network):
    """With parameters of zero, residuals are the negated features."""
    method, variables = network
    zero = variables | {"params": jax.tree.map(np.zeros_like, variables["params"])}
    training = [batch_of(1, images=70), batch_of(2, images=5, object_id=1)]
    for number, batch in enumerate(training):
        zero = method.fit(zero, batch, number, False)
    for number, batch in enumerate(training):
        test = batch_of(5, object_id=number)
        predicted = jax.jit(method.predict)(method.arrange(zero), test)
        for m in ("rgb", "depth"):
            expected = map_from(expected_distances(batch.features[m], test.features[m]).astype(np.float32))
            np.testing.assert_allclose(predicted.maps[m], expected, rtol=1e-3)
        both = np.linalg.norm(np.concatenate([test.features[m] for m in ("rgb", "depth")], axis=-1), axis=-1)
        np.testing.assert_allclose(predicted.published, map_from(both), rtol=1e-6)


def test_fitting_an_object_again_replaces_its_gaussian_alone(network):
    method, variables = network
    first = method.fit(method.fit(variables, batch_of(1), 0, False), batch_of(2, object_id=1), 1, False)
    again = method.fit(first, batch_of(3), 0, False)
    alone = method.fit(variables, batch_of(3), 0, False)
    assert again[BY_OBJECT][1] is first[BY_OBJECT][1]
    jax.tree.map(np.testing.assert_array_equal, again[BY_OBJECT][0], alone[BY_OBJECT][0])
    assert len(again[BY_OBJECT]) == 2


def test_further_images_of_an_object_are_merged_into_its_gaussian_alone(network):
    method, variables = network
    first = method.fit(method.fit(variables, batch_of(1), 0, False), batch_of(2, object_id=1), 1, False)
    merged = method.fit(first, batch_of(3, images=5), 0, True)
    both = jax.tree.map(lambda *arrays: np.concatenate(arrays), batch_of(1), batch_of(3, images=5))
    at_once = method.fit(first, both, 0, False)
    assert merged[BY_OBJECT][1] is first[BY_OBJECT][1]
    maps = [jax.jit(method.predict)(method.arrange(fitted), batch_of(5)).maps for fitted in (merged, at_once)]
    jax.tree.map(lambda *arrays: np.testing.assert_allclose(*arrays, rtol=1e-3), *maps)
