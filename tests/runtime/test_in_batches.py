"""Predictions in batches for any number of images."""

import jax
import numpy as np
import pytest

from iumad_jax.methods.method import Method
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import Batch, Prediction

TRACED = []


def brightness(variables, batch):
    """Predict a one-pixel map, the first feature times the weight, and the image's mean as the score."""
    TRACED.append(batch.object_id.shape)
    first = batch.features["rgb"][:, :1, :1] * variables["params"]["weight"]
    logits = batch.object_id[:, None] == np.arange(3)[None]
    return Prediction(first, batch.images["rgb"].mean((1, 2, 3)), logits.astype(np.float32))


def images(folder, count):
    """Memory-mapped arrays in the types that are stored."""
    rng = np.random.default_rng(count)
    np.save(folder / "features.npy", rng.normal(size=(count, 4, 2)).astype(np.float32))
    np.save(folder / "images.npy", rng.integers(0, 256, (count, 5, 5, 3)).astype(np.uint8))
    features, pictures = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "images"))
    return Batch({"rgb": features}, {"rgb": pictures}, np.arange(count, dtype=np.int32) % 3)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
def test_predictions_keep_the_order_of_images(tmp_path, count):
    prediction = predict_in_batches(brightness, {"params": {"weight": np.float32(2)}}, data := images(tmp_path, count))
    np.testing.assert_array_equal(prediction.map[:, 0, 0], data.features["rgb"][:, 0, 0] * 2)
    np.testing.assert_allclose(prediction.score, data.images["rgb"].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(prediction.object_logits.argmax(1), data.object_id)
    assert all(isinstance(array, np.ndarray) and len(array) == count for array in prediction)


def test_the_function_is_compiled_once(tmp_path):
    """Objects have different numbers of images, and weights come from training or from a snapshot."""
    method = Method(init=lambda key, batch: {}, predict=lambda variables, batch: brightness(variables, batch))
    TRACED.clear()
    for count, weight in [(3, np.float32(2)), (8, np.float32(3)), (19, jax.numpy.float32(4))]:
        predict_in_batches(method.predict, {"params": {"weight": weight}}, images(tmp_path, count))
    assert TRACED == [(8,)]
