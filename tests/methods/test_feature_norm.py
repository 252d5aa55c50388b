"""The feature-norm baseline against NumPy."""

import jax
import numpy as np

from iumad_jax.methods.feature_norm import feature_norm
from iumad_jax.shapes import Batch
from tests.methods.reference import map_from


def random_batch(seed, images=5):
    features = np.random.default_rng(seed).normal(3, 2 + seed, (images, 16, 3)).astype(np.float32)
    return Batch({"rgb": features}, {}, np.zeros(images, np.int32))


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
    actual = method.predict(variables, test).maps["rgb"]
    np.testing.assert_allclose(actual, map_from(expected.astype(np.float32)), rtol=1e-4)
