"""Anomaly maps and scores, compared with results by hand and by loops."""

import jax.numpy as jnp
import numpy as np

from iumad_jax.inference.anomaly_map import combine, predictor
from iumad_jax.methods.method import Method
from iumad_jax.shapes import ErrorMaps


def test_maps_are_added_and_the_score_is_the_largest_window_mean():
    rng = np.random.default_rng(0)
    rgb, depth = rng.random((2, 3, 224, 224), np.float32)
    logits = np.ones((3, 5), np.float32)
    prediction = combine(ErrorMaps({"rgb": jnp.asarray(rgb), "depth": jnp.asarray(depth)}, logits))
    np.testing.assert_allclose(prediction.map, rgb + depth, rtol=1e-6)
    for image in range(3):
        windows = np.lib.stride_tricks.sliding_window_view((rgb + depth)[image].astype(np.float64), (16, 16))
        np.testing.assert_allclose(prediction.score[image], windows.mean((2, 3)).max(), rtol=1e-5)
    assert prediction.object_logits is logits


def test_a_method_has_one_predictor():
    """A new function for every call would be compiled again."""
    method = Method(init=lambda key, batch: {}, predict=lambda variables, batch: ErrorMaps({}, None))
    assert predictor(method) is predictor(method)
