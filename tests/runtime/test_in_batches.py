"""Predictions for any number of images in batches of equal size."""

import jax
import numpy as np
import pytest

from iumad_jax.methods.method import Method
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import Batch, Prediction

TRACED = []


def brightness(variables, batch):
    """Predict the first feature times the weight as the map and the mean of the image as the score."""
    TRACED.append(batch.object_id.shape)
    first = batch.features["rgb"][:, :1, :1] * variables["params"]["weight"]
    logits = batch.object_id[:, None] == np.arange(3)[None]
    return Prediction(first, batch.images["rgb"].mean((1, 2, 3)), logits.astype(np.float32))


def images(folder, count):
    """Create memory-mapped arrays in their stored types."""
    rng = np.random.default_rng(count)
    np.save(folder / "features.npy", rng.normal(size=(count, 4, 2)).astype(np.float32))
    np.save(folder / "images.npy", rng.integers(0, 256, (count, 5, 5, 3)).astype(np.uint8))
    features, pictures = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "images"))
    return Batch({"rgb": features}, {"rgb": pictures}, np.arange(count, dtype=np.int32) % 3)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
def test_every_image_is_predicted_in_its_place(tmp_path, count):
    weight = {"params": {"weight": np.float32(2)}}
    predictions = predict_in_batches(jax.jit(brightness), weight, data := images(tmp_path, count))
    np.testing.assert_array_equal(predictions.map[:, 0, 0], data.features["rgb"][:, 0, 0] * 2)
    np.testing.assert_allclose(predictions.score, data.images["rgb"].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(predictions.object_logits.argmax(1), data.object_id)
    assert all(isinstance(array, np.ndarray) and len(array) == count for array in predictions)


def test_objects_and_steps_of_any_size_compile_once(tmp_path):
    """Evaluation predicts each object separately, with weights from training or a snapshot."""
    method = Method(init=lambda key, batch: {}, predict=lambda variables, batch: brightness(variables, batch))
    TRACED.clear()
    for count, weight in [(3, np.float32(2)), (8, np.float32(3)), (19, jax.numpy.float32(4))]:
        predict_in_batches(jax.jit(method.predict), {"params": {"weight": weight}}, images(tmp_path, count))
    assert TRACED == [(8,)]
