"""The feature-norm baseline against NumPy."""

import jax
import numpy as np

from iumad_jax.inference.anomaly_map import predictor
from iumad_jax.methods.feature_norm import feature_norm
from iumad_jax.shapes import Batch
from tests.methods.reference import prediction_from


def random_batch(seed, images=5, modalities=("rgb",)):
    rng = np.random.default_rng(seed)
    features = {
        m: rng.normal(3 + i, 2 + seed, (images, 16, 3 + i)).astype(np.float32) for i, m in enumerate(modalities)
    }
    return Batch(features, {}, np.zeros(images, np.int32))


def z_norm(training, features):
    rows = np.concatenate(training).reshape(-1, features.shape[-1]).astype(np.float64)
    return np.sqrt((((features - rows.mean(0)) / rows.std(0)) ** 2).sum(-1))


def test_error_is_the_norm_of_z_scores_over_all_learned_objects():
    method = feature_norm()
    first, second, test = (random_batch(seed) for seed in range(3))
    variables = method.init(jax.random.key(0), first)
    for step, batch in enumerate([first, second]):
        variables = method.observe(variables, batch, step)
    expected = z_norm([first.features["rgb"], second.features["rgb"]], test.features["rgb"])
    actual, expected = predictor(method)(variables, test), prediction_from(expected.astype(np.float32))
    np.testing.assert_allclose(actual.map, expected.map, rtol=1e-4)
    np.testing.assert_allclose(actual.score, expected.score, rtol=1e-4)


def test_modalities_are_summed():
    method = feature_norm()
    training, test = (random_batch(seed, modalities=("rgb", "depth")) for seed in range(2))
    variables = method.observe(method.init(jax.random.key(0), training), training, 0)
    expected = sum(z_norm([training.features[m]], test.features[m]) for m in ("rgb", "depth"))
    actual = predictor(method)(variables, test).map
    np.testing.assert_allclose(actual, prediction_from(expected.astype(np.float32)).map, rtol=1e-4)
