"""Replay: samples have the statistics of the training images, and no image is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax.config import paper
from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.replay import downsample, draw_sample, principal_components, replay
from iumad_jax.data.batches import single_update
from iumad_jax.runtime import devices
from iumad_jax.shapes import BY_OBJECT
from iumad_jax.training.optimization import make_optimizer
from iumad_jax.training.update import initial_state, make_update


def settings(**changes):
    config = paper("1-1").continual.replay
    config.update(rank=3, image_size=2)
    config.update(changes)
    return config


def low_rank(rng, count, shape, factors):
    return rng.normal(0, 3, shape) + np.tensordot(factors, rng.standard_normal((factors.shape[1], *shape)), 1)


def test_components_have_the_mean_and_covariance_of_low_rank_data():
    """The covariance is right also across parts, one of which is a thousand times larger in scale."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((40, 3))
    parts = {"a": low_rank(rng, 40, (2, 5), factors), "b": 1000 * low_rank(rng, 40, (4,), factors)}
    fitted = principal_components(parts, rank=3)
    assert {name: array.shape for name, array in fitted["directions"].items()} == {"a": (3, 2, 5), "b": (3, 4)}
    assert_mean_and_covariance(fitted, parts)


def assert_mean_and_covariance(fitted, parts, atol=5e-3):
    """Compare a Gaussian with the statistics of all images, relative to their spread."""
    rows = np.concatenate([part.reshape(len(part), -1) for part in parts.values()], axis=1)
    flat = [directions.reshape(len(directions), -1) for directions in fitted["directions"].values()]
    joint = np.concatenate(flat, axis=1).astype(np.float64)
    joint_mean = np.concatenate([fitted["mean"][name].ravel() for name in parts])
    scale = rows.std(0)
    np.testing.assert_allclose(joint_mean / scale, rows.mean(0) / scale, rtol=2e-3, atol=2e-3)
    expected = np.cov(rows.T, bias=True) / np.outer(scale, scale)
    np.testing.assert_allclose(joint.T @ joint / np.outer(scale, scale), expected, atol=atol)
    assert fitted["count"] == len(rows)


@pytest.mark.parametrize("first", [2, 25, 39])
def test_merging_further_images_equals_all_images_at_once(first):
    """With enough directions the covariance is that of all images, even if there are more directions than images."""
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((40, 3)) * np.where(np.arange(40) < first, 0.5, 2)[:, None]
    factors[first:] += 1
    parts = {"a": low_rank(rng, 40, (2, 5), factors), "b": 1000 * low_rank(rng, 40, (4,), factors)}
    earlier, further = ({name: part[rows] for name, part in parts.items()} for rows in np.split(np.arange(40), [first]))
    merged = principal_components(further, 5, principal_components(earlier, 5))
    assert_mean_and_covariance(merged, parts, atol=1e-2)


def test_further_images_of_an_object_are_merged_into_its_gaussian_alone(method, variables, images):
    """Also when the state is that within a step, which stacks the Gaussians of all objects."""
    strategy, between = replay(settings(rank=27), method), {}
    for object_ in (0, 1):
        between = strategy.finish(between, variables, images(25, object_), object_)
    more = images(15, 0, 1)
    merged, other = strategy.finish(between, variables, more, 0)[BY_OBJECT]
    assert other is between[BY_OBJECT][1]
    both = jax.tree.map(lambda *arrays: np.concatenate(arrays), images(25, 0), more)
    parts = {"features_rgb": both.features["rgb"], "image_rgb": downsample(both.images["rgb"], 2)}
    parts = {name: parts[name] for name in merged["directions"]}
    assert_mean_and_covariance(merged, parts, atol=1e-2)
    within = strategy.begin(between, variables, images(1), 2)
    jax.tree.map(np.testing.assert_array_equal, strategy.finish(within, variables, more, 0)[BY_OBJECT], (merged, other))


def test_components_are_the_strongest():
    """For a single part they equal those of the singular value decomposition."""
    rows = np.random.default_rng(1).standard_normal((30, 6)) * [9, 7, 5, 1, 0.5, 0.1]
    directions = principal_components({"a": rows}, rank=2)["directions"]
    values, v = np.linalg.svd(rows - rows.mean(0))[1:]
    for component, value, direction in zip(directions["a"].astype(np.float64), values, v, strict=False):
        assert np.linalg.norm(component) == pytest.approx(value / np.sqrt(30), rel=1e-2)
        assert abs(component @ direction) == pytest.approx(value / np.sqrt(30), rel=1e-2)


def test_every_part_has_equal_weight_whatever_its_scale():
    """A part that varies in one direction outweighs one that varies a thousand times as much, but in two."""
    factors = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 4)))[0]
    factors = factors - factors.mean(0)
    parts = {"a": factors[:, :1], "b": 1000 * factors[:, 1:3]}
    directions = principal_components(parts, rank=1)["directions"]
    assert abs(float(directions["a"][0, 0])) == pytest.approx(parts["a"].std(), rel=0.05)


def test_more_directions_than_images_are_zero():
    directions = principal_components({"a": np.random.default_rng(0).standard_normal((2, 5))}, rank=4)["directions"]
    strength = np.abs(directions["a"]).max(1)
    assert strength[0] > 0.1
    np.testing.assert_allclose(strength[1:], 0, atol=1e-3)


@pytest.fixture
def strategy_state(method, variables, images):
    """Return the state with the first two of three objects, within a step that learns the third."""
    strategy, strategy_state = replay(settings(), method), {}
    for object_ in (0, 1):
        strategy_state = strategy.finish(strategy_state, variables, images(25, object_), object_)
    return jax.tree.map(jnp.asarray, strategy.begin(strategy_state, variables, images(1, 2), 1))


def test_samples_have_the_statistics_of_learned_objects(strategy_state, images):
    parts, objects = jax.vmap(lambda key: draw_sample(strategy_state, key))(jax.random.split(jax.random.key(0), 2000))
    assert set(np.unique(objects)) == {0, 1}
    assert abs((objects == 0).mean() - 0.5) < 0.05
    for object_ in (0, 1):
        batch, drawn = images(25, object_), np.asarray(objects) == object_
        for samples, real in [
            (parts["features_rgb"][drawn], batch.features["rgb"]),
            (parts["image_rgb"][drawn], downsample(batch.images["rgb"], 2)),
        ]:
            spread = real.std(0)
            np.testing.assert_allclose(np.mean(samples, 0) / spread, real.mean(0) / spread, atol=0.15)
            assert 0.3 < (np.asarray(samples).std(0) / spread).mean() <= 1.05  # three of many directions


def test_residual_noise_gives_samples_the_variance_of_every_channel(strategy_state, images):
    keys = jax.random.split(jax.random.key(0), 2000)
    for with_residual, low, high in ((True, 0.9, 1.1), (False, 0, 0.85)):
        parts, objects = jax.vmap(lambda key: draw_sample(strategy_state, key, with_residual))(keys)  # noqa: B023
        for object_ in (0, 1):
            samples = np.asarray(parts["features_rgb"])[np.asarray(objects) == object_]
            real = images(25, object_).features["rgb"]
            share = samples.var(0).mean(0) / real.var(0).mean(0)
            assert low < share.min() <= share.max() < high


def test_residuals_of_further_images_are_merged():
    """With no directions all variance is residual, that of both sets of images and between their means."""
    first, further = (np.random.default_rng(seed).normal(mean, 2, (40, 6, 3)) for seed, mean in ((0, 0), (1, 0)))
    further = further - further.mean(0) + first.mean(0)
    merged = principal_components({"a": further}, 0, principal_components({"a": first}, 0))
    both = np.concatenate([first, further])
    np.testing.assert_allclose(merged["residual"]["a"], np.sqrt(both.var(0).mean(0)), rtol=2e-3)


def test_learned_objects_alone_are_drawn_and_a_program_serves_a_block_of_them(method, variables, images):
    strategy, between, programs = replay(settings(), method), {}, []
    draw, loss = jax.jit(jax.vmap(draw_sample, (None, 0))), jax.jit(strategy.loss)
    batch, keys = images(4, object_=9), jax.random.split(jax.random.key(0), 200)
    for object_ in range(9):
        between = strategy.finish(between, variables, images(5, object_), object_)
        within = strategy.begin(between, variables, batch, object_ + 1)
        _, drawn = draw(within, keys)
        assert set(np.unique(drawn)) == set(range(object_ + 1))
        loss(within, variables, batch, keys[:4])
        programs.append((draw._cache_size(), loss._cache_size()))
    assert programs == [(1, 1)] * 8 + [(2, 2)]


def test_the_state_does_not_grow_with_images(method, variables, images):
    strategy = replay(settings(), method)
    few, many = (strategy.finish({}, variables, images(count), 0) for count in (5, 50))
    assert jax.tree.map(np.shape, few) == jax.tree.map(np.shape, many)
    arrays = (1 + 3) * (3 * 5 + 2 * 2 * 3) + 5 + 3  # (mean and directions) x (features and image), residuals
    per_object = 4 + 2 * arrays  # count, bytes x arrays
    assert sum(a.nbytes for a in jax.tree.leaves(many)) == per_object


def test_a_sample_is_added_for_every_image(method, variables, images, strategy_state):
    """The loss is the mean over both; samples have the right objects and images of the right size."""
    shapes = []

    def recording(variables, batch, keys):
        shapes.append(jax.tree.map(np.shape, batch))
        return method.loss(variables, batch, keys)

    strategy = replay(settings(), method.__class__(method.init, None, recording))
    batch, keys = images(4, object_=2), jax.random.split(jax.random.key(0), 4)
    (total, *_), after = strategy.loss(strategy_state, variables, batch, keys)
    assert shapes[-1].features["rgb"] == (8, 3, 5)
    assert shapes[-1].images["rgb"] == (8, 8, 8, 3)
    jax.tree.map(np.testing.assert_array_equal, after, strategy_state)
    (base_total, *_), _ = strategy.loss({}, variables, batch, keys)
    assert shapes[-1].object_id == (4,)  # the base step has no samples
    assert abs(float(total) - float(base_total)) > 0.01


def test_drawn_images_tell_where_defects_may_lie(method, variables, images):
    """Two objects whose foreground is always the upper or the lower half."""
    rows = np.arange(224)[:, None] < 112
    halves = [np.broadcast_to(half, (6, 224, 224)) for half in (rows, ~rows)]
    seen, between = [], {}

    def recording(variables, batch, keys):
        seen.append(batch)
        return method.loss(variables, batch, keys)

    strategy = replay(settings(), method.__class__(method.init, None, recording))
    for object_, half in enumerate(halves):
        between = strategy.finish(between, variables, images(6, object_)._replace(foreground=half), object_)
    new = images(6, 2)._replace(foreground=np.zeros((6, 224, 224), bool))
    strategy_state = jax.tree.map(jax.numpy.asarray, strategy.begin(between, variables, new, 2))
    strategy.loss(strategy_state, variables, new, jax.random.split(jax.random.key(0), 6))
    (batch,) = seen
    assert not batch.foreground[:6].any()
    for mask, object_ in zip(batch.foreground[6:], batch.object_id[6:], strict=True):
        np.testing.assert_array_equal(mask > 0.5, halves[int(object_)][0])


@pytest.mark.slow
def test_replay_prevents_the_forgetting_of_finetuning(method, variables, images):
    """A linear model with too few dimensions for both objects learns the second one, with and without replay."""
    config = paper("1-1")
    old, new = images(40, 0), images(40, 1)
    optimizer = make_optimizer(config.train)

    def error(variables, batch):
        return float(method.loss(variables, batch, jax.random.split(jax.random.key(9), 40)).total)

    def trained(strategy, variables, batch, strategy_state):
        update = make_update(method, optimizer, strategy)
        state = devices.replicate(initial_state(variables, optimizer, 0, [], strategy_state))
        for _ in range(150):
            state, _ = update(state, single_update(batch), jax.random.key(0), np.float32([0.02]))
        return devices.unreplicate(state).variables

    strategy = replay(settings(rank=8), method)
    base = trained(strategy, variables, old, {})
    strategy_state = strategy.begin(strategy.finish({}, base, old, 0), base, new, 1)
    replayed = trained(strategy, base, new, strategy_state)
    finetuned = trained(finetune(method), base, new, {})
    assert error(replayed, old) - error(base, old) < 0.5 * (error(finetuned, old) - error(base, old))
    assert error(replayed, new) < 1.5 * error(finetuned, new)
