"""Object recognition by distances, compared with hand computation and scikit-learn."""

import jax
import numpy as np
import pytest
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from iumad_jax.inference import recognition
from iumad_jax.inference.thresholds import describe, nearest_distances
from iumad_jax.shapes import Batch, Calibration

OBJECTS, CHANNELS = 3, 4


def images_of(object_, count, seed):
    """Make tokens of both modalities about the object's mean, with noise that is correlated between channels."""
    rng = np.random.default_rng([object_, seed])
    mean = np.random.default_rng(object_).normal(size=2 * CHANNELS)
    noise = rng.normal(size=(count, 1, 2 * CHANNELS)) @ np.random.default_rng(9).normal(size=(2 * CHANNELS,) * 2) / 3
    x = (mean + noise + 0.1 * rng.normal(size=(count, 5, 2 * CHANNELS))).astype(np.float32)
    return Batch({"rgb": x[..., :CHANNELS], "depth": x[..., CHANNELS:]}, {}, np.full(count, object_))


def learn(shifts):
    statistics = recognition.empty_statistics(images_of(0, 1, 0))
    for object_ in range(OBJECTS):
        statistics = recognition.add_object(statistics, images_of(object_, 12 + object_, seed=1), shifts(object_))
    return statistics


@pytest.fixture(scope="module")
def learned():
    return learn(shifts_of)


def shifts_of(object_):
    """Draw the shifts of the mean tokens of five degraded images of the object, by modality."""
    rng = np.random.default_rng([object_, 8])
    return {"rgb": rng.normal(0, 0.3, (5, CHANNELS)), "depth": rng.normal(0, 0.2, (5, CHANNELS))}


def descriptors(batch):
    return np.concatenate([batch.features["depth"], batch.features["rgb"]], -1).mean(1).astype(np.float64)


def by_hand(x):
    """Compute Mahalanobis distances for the covariance of training images about their objects' means, with shifts.

    Every image adds 60 shifts in depth and 60 in RGB, cycling through the object's five.
    """
    training = [descriptors(images_of(object_, 12 + object_, seed=1)) for object_ in range(OBJECTS)]
    scatter = 0
    for object_, tokens in enumerate(training):
        for row in tokens - tokens.mean(0):
            scatter = scatter + np.outer(row, row)
            for number in range(60):
                shifts = shifts_of(object_)
                depth = np.concatenate([shifts["depth"][number % 5], np.zeros(CHANNELS)])
                rgb = np.concatenate([np.zeros(CHANNELS), shifts["rgb"][number % 5]])
                scatter = scatter + (np.outer(depth, depth) + np.outer(rgb, rgb)) / 60
    count = sum(map(len, training))
    inverse = np.linalg.inv(recognition.oas(scatter / count, count))
    means = [tokens.mean(0) for tokens in training]
    return np.array([[np.sqrt((d := row - mean) @ inverse @ d / len(d)) for mean in means] for row in x])


def test_distances_are_mahalanobis_distances(learned):
    test = images_of(1, 6, seed=2)
    distances = recognition.distances(recognition.fit(learned), test.features)
    np.testing.assert_allclose(distances, by_hand(descriptors(test)), rtol=1e-4)


def test_distances_are_the_same_within_jit(learned):
    """Within jit, the keys of dictionaries are sorted."""
    test, recogniser = images_of(2, 3, seed=2), recognition.fit(learned)
    within = jax.jit(recognition.distances)(recogniser, test.features)
    np.testing.assert_allclose(within, recognition.distances(recogniser, test.features), rtol=1e-5)


def test_objects_are_recognised_as_by_discriminant_analysis():
    x = [descriptors(images_of(object_, 12 + object_, seed=1)) for object_ in range(OBJECTS)]
    labels = np.repeat(range(OBJECTS), [len(tokens) for tokens in x])
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / OBJECTS] * OBJECTS).fit(np.concatenate(x), labels)
    test = [images_of(object_, 20, seed=3) for object_ in range(OBJECTS)]
    recogniser = recognition.fit(learn(lambda _: {m: np.zeros((1, CHANNELS)) for m in ("rgb", "depth")}))
    ours = np.concatenate([recognition.distances(recogniser, batch.features).argmin(1) for batch in test])
    truth = np.repeat(range(OBJECTS), 20)
    theirs = reference.predict(np.concatenate([descriptors(batch) for batch in test]))
    assert (ours == truth).mean() >= (theirs == truth).mean() - 0.05
    assert (ours == truth).mean() > 0.8


def test_probabilities_are_those_of_normal_distributions(learned):
    distance = by_hand(descriptors(images_of(0, 4, seed=2)))
    density = np.exp(-0.5 * (2 * CHANNELS) * (distance / 1.7) ** 2)
    probabilities = recognition.probabilities(distance.astype(np.float32), 2 * CHANNELS, np.float32(1.7))
    np.testing.assert_allclose(probabilities, density / density.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("count", [2, 5, 50])
def test_shrinkage_is_oas(count):
    x = np.random.default_rng(count).normal(size=(count, 6)) * [1, 2, 3, 1, 1, 5]
    ours = recognition.oas(x.T @ x / count, count)
    np.testing.assert_allclose(ours, OAS(assume_centered=True).fit(x).covariance_, rtol=1e-9, atol=1e-12)


def test_constant_features_have_finite_distances():
    statistics = recognition.empty_statistics(Batch({"rgb": np.zeros((1, 2, 3))}, {}, None))
    for value in (0, 1):
        batch = Batch({"rgb": np.full((4, 2, 3), value, np.float32)}, {}, np.full(4, value))
        statistics = recognition.add_object(statistics, batch, {"rgb": np.zeros((2, 3))})
    distances = recognition.distances(recognition.fit(statistics), {"rgb": np.ones((1, 2, 3), np.float32)})
    assert distances[0, 1] == pytest.approx(0, abs=1e-3)
    assert distances[0, 0] > 100


@pytest.mark.parametrize("number", range(OBJECTS))
def test_further_images_equal_all_images_at_once(learned, number):
    """The shifts of both sets of images are weighted by the number of images."""
    further, shifts = images_of(number, 12 + number, seed=4), shifts_of(number + 10)
    merged = recognition.add_object(learned, further, shifts)
    at_once = recognition.empty_statistics(further)
    for object_ in range(OBJECTS):
        batch, its_shifts = images_of(object_, 12 + object_, seed=1), shifts_of(object_)
        if object_ == number:
            batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), batch, further)
            its_shifts = jax.tree.map(lambda *arrays: np.concatenate(arrays), its_shifts, shifts)
        at_once = recognition.add_object(at_once, batch, its_shifts)
    jax.tree.map(lambda *arrays: np.testing.assert_allclose(*arrays, rtol=1e-5, atol=1e-5), merged, at_once)
    assert all(merged[name].dtype == np.float32 for name in merged)


@pytest.mark.parametrize("count", [1, 100])
def test_further_images_far_from_the_earlier_ones_widen_the_scatter(learned, count):
    """An update under another lamp moves the mean; the scatter is about the mean of all images."""
    further = images_of(1, count, seed=4)
    further = further._replace(features={m: x + 2 for m, x in further.features.items()})
    merged = recognition.add_object(learned, further, {m: np.zeros((1, CHANNELS)) for m in ("rgb", "depth")})
    both = np.concatenate([descriptors(images_of(1, 13, seed=1)), descriptors(further)])
    before = descriptors(images_of(1, 13, seed=1))
    gained = len(both) * np.cov(both.T, bias=True) - 13 * np.cov(before.T, bias=True)
    np.testing.assert_allclose(merged["scatter"] - learned["scatter"], gained, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(merged["mean"], [learned["mean"][0], both.mean(0), learned["mean"][2]], rtol=1e-5)


@pytest.mark.parametrize("retired", [[0], [1, 2]])
@pytest.mark.parametrize("rms_distance", [1e-6, 1.0])
def test_no_image_is_recognised_as_a_retired_object(learned, retired, rms_distance):
    everything, remaining = (recognition.fit(learned, numbers) for numbers in ((), retired))
    kept = [number for number in range(OBJECTS) if number not in retired]

    @jax.jit
    def recognise(recogniser, features):
        distance = recognition.distances(recogniser, features)
        probabilities = recognition.probabilities(distance, 2 * CHANNELS, np.float32(rms_distance))
        return distance, recognition.recognise(distance), probabilities

    for object_ in range(OBJECTS):
        features = images_of(object_, 10, seed=2).features
        distance, recognised, probabilities = recognise(remaining, features)
        np.testing.assert_array_equal(distance[:, kept], recognise(everything, features)[0][:, kept])
        assert set(np.unique(recognised)) <= set(kept)
        assert np.isfinite(distance).all()
        np.testing.assert_allclose(probabilities[:, kept].sum(1), 1, rtol=1e-5)
        assert not probabilities[:, retired].any()


def test_calibration_ignores_retired_objects(learned):
    """With the others retired, the second nearest object is infinitely far, as after learning a single object."""
    features = images_of(0, 10, seed=2).features
    distances = {
        retired: np.asarray(recognition.distances(recognition.fit(learned, retired), features))
        for retired in [(), (1,), (1, 2)]
    }
    np.testing.assert_array_equal(nearest_distances(distances[1,], 0), nearest_distances(distances[()][:, [0, 2]], 0))
    alone = nearest_distances(distances[1, 2], 0)
    np.testing.assert_array_equal(alone, nearest_distances(distances[()][:, [0]], 0))
    one, two = (Calibration(np.zeros(10), np.zeros(10), alone, retired=retired) for retired in (False, True))
    record = describe({"a": one, "b": two}, 0.9)["unknown"]
    assert record["others"] is None
    assert record["threshold"] == pytest.approx(2 * record["good"]["threshold"])
