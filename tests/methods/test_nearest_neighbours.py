"""The memory bank of training patches against brute force in NumPy."""

import jax
import numpy as np
import pytest

from iumad_jax.inference.anomaly_map import predictor
from iumad_jax.methods.nearest_neighbours import nearest_neighbours
from iumad_jax.shapes import Batch
from tests.methods.reference import prediction_from


def random_batch(seed, images=4, modalities=("rgb",)):
    rng = np.random.default_rng(seed)
    features = {
        m: rng.normal(3 * seed, 2 + i, (images, 16, 3 + i)).astype(np.float32) for i, m in enumerate(modalities)
    }
    return Batch(features, {}, np.zeros(images, np.int32))


def observed(method, *batches):
    variables = method.init(jax.random.key(0), batches[0])
    for step, batch in enumerate(batches):
        variables = method.observe(variables, batch, step)
    return variables


def rows(*batches, modality="rgb"):
    return np.concatenate(
        [batch.features[modality].reshape(-1, batch.features[modality].shape[-1]) for batch in batches]
    )


def nearest(x, memory_bank):
    """Compute the Euclidean distance of every patch to the nearest row."""
    return np.array([[np.sqrt(((patch - memory_bank) ** 2).sum(-1)).min() for patch in image] for image in x])


def test_error_is_the_distance_to_the_nearest_training_patch():
    first, second, test = (random_batch(seed) for seed in range(3))
    method = nearest_neighbours(patches_per_object=1000, seed=0)  # more than exist, so all are kept
    variables = observed(method, first, second)
    training = rows(first, second).astype(np.float64)
    mean, std = training.mean(0), training.std(0)
    expected = nearest((test.features["rgb"] - mean) / std, (training - mean) / std)
    scale = variables["statistics"]["rgb"]["scale"]
    actual = predictor(method)(variables, test).map
    np.testing.assert_allclose(actual, prediction_from((expected / scale).astype(np.float32)).map, rtol=1e-3)


def test_the_distance_of_a_training_patch_is_zero():
    batch = random_batch(0)
    method = nearest_neighbours(patches_per_object=1000, seed=0)
    assert float(predictor(method)(observed(method, batch), batch).map.max()) < 0.01


def test_identical_training_images_hide_no_defect():
    """Depth images of a flat part can be identical: their usual distance is 0, by which nothing can be divided."""
    image = random_batch(0, images=1).features["rgb"]
    identical = Batch({"rgb": np.repeat(image, 3, axis=0)}, {}, np.zeros(3, np.int32))
    changed = image.copy()
    changed[0, 5] += 4
    method = nearest_neighbours(patches_per_object=1000, seed=0)
    variables = observed(method, identical)
    good, defective = (
        predictor(method)(variables, Batch({"rgb": x}, {}, np.zeros(1, np.int32))) for x in (image, changed)
    )
    assert float(good.score[0]) < 0.1 < 0.5 < float(defective.score[0]) < 100


def test_memory_bank_grows_by_a_bounded_number_of_different_patches_per_object():
    batches = [random_batch(seed) for seed in range(3)]
    memory_bank = observed(nearest_neighbours(10, seed=0), *batches)["statistics"]["by_object"]
    assert [patches["rgb"].shape for patches in memory_bank] == [(10, 3)] * 3
    for batch, patches in zip(batches, memory_bank, strict=True):
        kept = {tuple(row) for row in patches["rgb"]}
        assert len(kept) == 10
        assert kept <= {tuple(row) for row in rows(batch)}


def test_memory_bank_is_a_function_of_the_seed():
    batch = random_batch(0)
    first, again, other = (
        observed(nearest_neighbours(10, seed), batch)["statistics"]["by_object"][0]["rgb"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_modalities_are_summed_each_in_units_of_its_usual_distance():
    training, test = (random_batch(seed, modalities=("rgb", "depth")) for seed in range(2))
    method = nearest_neighbours(1000, seed=0)
    both = predictor(method)(observed(method, training), test).map

    def only(batch, modality):
        return batch._replace(features={modality: batch.features[modality]})

    single = [predictor(method)(observed(method, only(training, m)), only(test, m)).map for m in ("rgb", "depth")]
    np.testing.assert_allclose(both, single[0] + single[1], rtol=1e-5)


def test_a_modality_counts_in_units_of_the_usual_distance_between_its_training_patches():
    """The patches are whole numbers, most with a neighbour at distance 1, which is 1 / std after z-scoring."""
    numbers = np.random.default_rng(0).permutation(4096).astype(np.float32).reshape(256, 16, 1)
    batch = Batch({"rgb": numbers}, {}, np.zeros(256, np.int32))
    statistics = observed(nearest_neighbours(4096, seed=0), batch)["statistics"]["rgb"]
    assert float(statistics["scale"]) == pytest.approx(1 / numbers.std(), rel=0.05)
