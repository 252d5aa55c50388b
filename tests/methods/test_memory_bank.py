"""Memory banks against brute force in NumPy."""

import importlib
import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.memory_bank import average_neighbours, k_centres, memory_bank
from iumad_jax.shapes import BY_OBJECT, Batch
from tests import sentences
from tests.methods.reference import map_from

SIDE = 4


CONFIG = ConfigDict({"megabytes": 1.0, "neighbourhood": 1, "place": 0.0})


def build(**changes):
    return memory_bank(ConfigDict(CONFIG.to_dict() | changes))


def random_batch(seed, object_id=0, images=4, modalities=("rgb",)):
    """Return features whose mean and spread depend on the seed, rounded to what float16 holds."""
    rng = np.random.default_rng(seed)
    features = {m: rng.normal(3 * seed, 2 + i, (images, SIDE**2, 3 + i)) for i, m in enumerate(modalities)}
    return Batch(
        {m: x.astype(np.float16).astype(np.float32) for m, x in features.items()},
        {},
        np.full(images, object_id, np.int32),
    )


def learned(method, *batches):
    variables = method.init(jax.random.key(0), batches[0])
    for step, batch in enumerate(batches):
        variables = method.observe(variables, batch, step)
    return variables


def banks_of(variables):
    return variables[BY_OBJECT]


def predict(method, variables, batch):
    return jax.jit(method.predict)(method.arrange(variables), batch)


def nearest(images, patches):
    """Compute the Euclidean distance of every token (n, p, f) to the nearest patch, in float64."""
    return np.array([[np.sqrt(((x - patches) ** 2).sum(-1)).min() for x in image] for image in images], np.float64)


def expected_errors(training, test):
    """Z-score by the training features, shape (n, p, f), and compare."""
    mean, std = (f(training.astype(np.float64), axis=(0, 1)) for f in (np.mean, np.std))
    return nearest((test - mean) / std, ((training - mean) / std).reshape(-1, training.shape[-1]))


def test_error_is_the_distance_to_the_nearest_patch_of_the_recognised_object():
    modalities = ("rgb", "depth")
    first, second = (random_batch(i, i, images=3 + i, modalities=modalities) for i in range(2))
    test = random_batch(2, modalities=modalities)._replace(object_id=np.array([1, 0, 1, 0], np.int32))
    method = build()
    actual = predict(method, learned(method, first, second), test)
    for m in modalities:
        errors = np.stack(
            [
                expected_errors((first, second)[object_id].features[m], test.features[m][[i]])[0]
                for i, object_id in enumerate(test.object_id)
            ]
        )
        np.testing.assert_allclose(actual.maps[m], map_from(errors.astype(np.float32)), rtol=5e-3)
    largest = sum(np.max(error_map, axis=(1, 2)) for error_map in actual.maps.values())
    np.testing.assert_allclose(actual.score, largest, rtol=1e-2)  # of tokens, of which most maps show some exactly


def test_held_out_images_are_evenly_spaced_with_all_their_tiles():
    """Of 199 images with 16 tiles each, every 199th row would always be the same tile."""
    evenly_spaced = importlib.import_module("iumad_jax.methods.memory_bank")._evenly_spaced
    rows = evenly_spaced(199 * 16, 200, 16)
    assert np.bincount(rows % 16).tolist() == [13] * 16
    assert np.unique(rows // 16).tolist() == np.linspace(0, 198, 13).astype(int).tolist()
    assert evenly_spaced(5, 200, 1).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(32, 0, 16).tolist() == []


def test_all_tiles_of_an_image_are_held_out_together():
    """Tiles of an image resemble each other, and would hide how far a new image is from the bank."""
    batch = random_batch(0, images=6)
    held_out = memory_bank(CONFIG, tiles=2).held_out(learned(memory_bank(CONFIG, tiles=2), batch), 0)
    features = batch.features["rgb"]
    mean, std = (f(features.astype(np.float64), axis=(0, 1)) for f in (np.mean, np.std))
    z_scores = (features - mean) / std
    others = [np.delete(z_scores, [row // 2 * 2, row // 2 * 2 + 1], axis=0).reshape(-1, 3) for row in range(6)]
    errors = np.concatenate([nearest(z_scores[[row]], others[row]) for row in range(6)])
    np.testing.assert_allclose(held_out.maps["rgb"], map_from(errors.astype(np.float32)), rtol=1e-2)


def test_learning_an_object_changes_no_other():
    first, second = random_batch(0), random_batch(1, object_id=1, images=9)
    method = build()
    alone, both = learned(method, first), learned(method, first, second)
    for before, after in zip(*map(jax.tree.leaves, (banks_of(alone)[0], banks_of(both)[0])), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(*(predict(method, v, first).maps["rgb"] for v in (alone, both)))


def test_held_out_errors_are_those_of_a_bank_without_the_image():
    batch = random_batch(0, images=5)
    method = build()
    actual = method.held_out(learned(method, batch), 0).maps["rgb"]
    features = batch.features["rgb"].astype(np.float64)
    z_scores = (features - features.mean((0, 1))) / features.std((0, 1))
    expected = [nearest(z_scores[[i]], np.delete(z_scores, i, 0).reshape(-1, 3))[0] for i in range(5)]
    np.testing.assert_allclose(actual, map_from(np.array(expected, np.float32)), rtol=5e-3)
    largest = np.sort(np.array(expected), axis=1)[:, -1]
    np.testing.assert_allclose(method.held_out(learned(method, batch), 0).score, largest, rtol=5e-3)
    assert method.held_out(learned(method, random_batch(0, images=1)), 0) is None


def test_identical_training_images_have_no_errors_and_hide_no_defect():
    """Depth images of a flat part can be identical; then all patches of a small bank may come from one image."""
    image = random_batch(0, images=1).features["rgb"]
    identical = Batch({"rgb": np.repeat(image, 3, axis=0)}, {}, np.zeros(3, np.int32))
    for megabytes in (1.0, 5 * 2 * 5 / 2**20):
        method = build(megabytes=megabytes)
        variables = learned(method, identical)
        held_out = method.held_out(variables, 0)
        assert np.isfinite(held_out.maps["rgb"]).all()
        if megabytes == 1:
            assert float(held_out.maps["rgb"].max()) == 0
            changed = identical._replace(features={"rgb": identical.features["rgb"] + np.eye(16, 3)[None] * 4})
            assert float(predict(method, variables, changed).maps["rgb"].max()) > 0.5


def test_held_out_errors_of_all_modalities_are_of_the_same_images():
    """Also if one modality is the same in all images, so that its whole bank is of one image."""
    batch = random_batch(0, images=4, modalities=("rgb", "depth"))
    batch.features["depth"][:] = batch.features["depth"][:1]
    method = build(megabytes=2 * 40 * 6 * 2 / 2**20)  # 40 patches of depth, of which 16 differ
    held_out = method.held_out(learned(method, batch), 0)
    assert [len(held_out.maps[m]) for m in ("rgb", "depth")] == [4, 4]
    assert float(held_out.maps["depth"].max()) == 0 < float(held_out.maps["rgb"].min(axis=(1, 2)).max())


def test_a_bank_must_hold_a_patch():
    with pytest.raises(UserError, match=sentences.BANK_TOO_SMALL.format(0.000001)):
        learned(build(megabytes=0.000001), random_batch(0))


def test_a_bank_is_bounded_in_bytes_over_all_modalities():
    method = build(megabytes=0.001)
    (banks,) = banks_of(learned(method, random_batch(0, images=40, modalities=("rgb", "depth"))))
    sizes = [bank["patches"].nbytes for bank in banks.values()]
    assert [len(set(map(tuple, bank["patches"]))) for bank in banks.values()] == [52, 43]  # 2 bytes x (3 or 4, + 2)
    assert sum(sizes) <= 0.001 * 2**20 < 1.05 * sum(sizes)


@pytest.mark.parametrize("count", [1, 30, 300])
def test_centres_are_those_of_the_greedy_algorithm(count):
    """Also where a round of 64 centres would exhaust the patches that are farthest when it begins."""
    rng = np.random.default_rng(count)
    clusters = rng.normal(size=(20, 1, 4)) * 3
    patches = (clusters + rng.normal(size=(20, 100, 4)) * 0.3).reshape(-1, 4).astype(np.float16)
    exact = patches.astype(np.float64)
    centres = np.asarray(k_centres(patches, count))
    assert len(set(centres)) == count
    assert centres[0] == np.linalg.norm(exact, axis=1).argmax()
    distance = np.full(2000, np.inf)
    for centre, following in itertools.pairwise(centres):
        distance = np.minimum(distance, np.linalg.norm(exact - exact[centre], axis=1))
        assert distance[following] >= distance.max() - 1e-3  # the farthest, up to rounding


def test_neighbours_are_averaged_with_a_repeated_border():
    tokens = np.random.default_rng(0).normal(size=(SIDE**2, 3)).astype(np.float32)
    grid = np.pad(tokens.reshape(SIDE, SIDE, 3).astype(np.float64), ((1, 1), (1, 1), (0, 0)), "edge")
    means = np.lib.stride_tricks.sliding_window_view(grid, (3, 3), (0, 1)).mean((-2, -1)).reshape(-1, 3)
    np.testing.assert_allclose(average_neighbours(tokens, 3), means, rtol=1e-5, atol=1e-6)
    method, batch, test = build(neighbourhood=3), random_batch(0), random_batch(1)
    averaged = [np.stack([average_neighbours(x, 3) for x in b.features["rgb"]]) for b in (batch, test)]
    actual = predict(method, learned(method, batch), test).maps["rgb"]
    np.testing.assert_allclose(actual, map_from(expected_errors(*averaged).astype(np.float32)), rtol=1e-2)


def test_places_weigh_by_their_distance_in_the_image():
    """A single good image whose tokens all differ, shifted by one row: the nearest patch is one row away."""
    image = random_batch(0, images=1).features["rgb"]
    image = image + 100 * np.arange(SIDE**2, dtype=np.float32)[None, :, None]
    batch = Batch({"rgb": image}, {}, np.zeros(1, np.int32))
    shifted = batch._replace(features={"rgb": np.roll(image, SIDE, axis=1)})
    method = build(place=2.0)
    errors = predict(method, learned(method, batch), shifted).maps["rgb"]
    np.testing.assert_allclose(errors[0, -1, :], 2 / SIDE, atol=0.02)  # all but the first row came from the row above
    np.testing.assert_allclose(errors[0, 0, :], 2 * (SIDE - 1) / SIDE, rtol=0.2)
