"""Each part of IUF's strategy against its definition; a part without effect fails."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.config import paper
from iumad_jax.continual.iuf import QUEUE_ROWS, anchor, compression_loss, iuf, project, projection_matrix
from iumad_jax.data.batches import single_update
from iumad_jax.runtime import devices
from iumad_jax.training.optimization import make_optimizer
from iumad_jax.training.update import initial_state, make_update


def settings_with(**changes):
    config = paper("1-1").continual
    config.update(changes)
    return config


def shares_below(rows):
    """Compute the compression loss by its definition in float64."""
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    shares = values / values.sum()
    return shares[shares < 0.1 / rows.shape[1]].sum()


# --- Compression ----------------------------------------------------------------------------------------------------


def test_compression_by_hand():
    """Singular values 96, 3, 0.9, 0.1 of a rotated diagonal: those below 2.5 % of their sum are 0.9 and 0.1 %."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 4)))[0] for n in (9, 4))
    rows = ((left * [96, 3, 0.9, 0.1]) @ right.T).astype(np.float32)
    assert float(compression_loss(rows)) == pytest.approx(0.01, rel=1e-3)
    assert float(compression_loss(np.concatenate([np.zeros((20, 4), np.float32), rows]))) == pytest.approx(
        0.01, rel=1e-3
    )
    assert float(compression_loss(np.zeros((5, 4), np.float32))) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(3, 6), (8, 6), (30, 5)]), st.floats(0.5, 4))
def test_compression_equals_numpys(seed, shape, decay):
    rows = np.random.default_rng(seed).standard_normal(shape) * np.exp(-decay * np.arange(shape[1]))
    assert float(compression_loss(rows.astype(np.float32))) == pytest.approx(shares_below(rows), rel=1e-2, abs=1e-5)


def test_the_gradient_of_compression_comes_from_the_current_batch_alone(method, variables, skewed_images):
    """On four devices it equals finite differences in float64 with a constant queue."""
    strategy = iuf(settings_with(compression=10.0), method)
    batch, key = skewed_images(8), jax.random.key(1)
    queue = 0.1 * np.random.default_rng(1).standard_normal((QUEUE_ROWS, 4)).astype(np.float32)
    queue[:-5] = 0
    strategy_state = strategy.begin({}, variables, batch, 0)
    assert jax.tree.map(np.shape, strategy_state) == {"queues": {"hidden": (QUEUE_ROWS, 4)}}
    strategy_state = {"queues": {"hidden": queue}}

    def gradient(state, batch, key):
        def value(params):
            keys = devices.image_keys(key, len(batch.object_id))
            (total, terms, *_), after = strategy.loss(state["strategy_state"], {"params": params}, batch, keys)
            return terms["compression"], (total - terms["error"] - terms["compression"], after)

        (value, (remainder, after)), slope = jax.value_and_grad(value, has_aux=True)(state["params"])
        return devices.mean_over_devices((value, slope, remainder)), after

    state = devices.replicate({"params": variables["params"], "strategy_state": strategy_state})
    (value, slope, remainder), after = devices.unreplicate(
        devices.data_parallel(gradient)(state, single_update(batch).images, key)
    )
    assert remainder == pytest.approx(0, abs=1e-3)

    keys = jax.random.split(key, 8)
    new_rows = np.asarray(method.loss(variables, batch, keys).outputs["hidden"], np.float64)
    np.testing.assert_allclose(after["queues"]["hidden"], np.concatenate([queue[8:], new_rows]), rtol=1e-4, atol=1e-4)
    assert value == pytest.approx(10 * shares_below(np.concatenate([queue, new_rows])), rel=1e-2)

    noise = np.stack([jax.random.normal(k, batch.features["rgb"].shape[1:]) for k in keys])
    mean = (batch.features["rgb"] + 0.1 * noise).astype(np.float64).mean(1)
    kernel = np.asarray(variables["params"]["down"]["kernel"], np.float64)
    expected = np.zeros_like(kernel)
    for index in np.ndindex(kernel.shape):
        ends = []
        for step in (1e-5, -1e-5):
            moved = kernel.copy()
            moved[index] += step
            ends.append(10 * shares_below(np.concatenate([queue, mean @ moved])))
        expected[index] = (ends[0] - ends[1]) / 2e-5
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(slope["down"]["kernel"], expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
    np.testing.assert_array_equal(slope["up"]["kernel"], 0)


# --- Projection -----------------------------------------------------------------------------------------------------


def test_projection_by_hand():
    """In four dimensions, the factors of the directions are ln 1, ln 2, ln 3 and ln 4, divided by ln 4."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    matrix = projection_matrix((rotation * [100, 9, 4, 1]) @ rotation.T)
    for direction, factor in zip(rotation.T, [0, 0.5, 0.792481, 1], strict=True):
        np.testing.assert_allclose(direction @ matrix, factor * direction, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_projection_damps_the_singular_vectors_of_all_rows(count):
    """With fewer rows than dimensions, unused directions are damped without mixing with used ones."""
    rows = np.random.default_rng(count).standard_normal((count, 6)) * [5, 4, 3, 2, 1, 0.5]
    matrix = projection_matrix(rows.T @ rows)
    weights = np.log(np.arange(1, 7)) / np.log(6)
    v = np.linalg.svd(rows)[2].T
    used, free = v[:, :count], v[:, count:]
    np.testing.assert_allclose(matrix @ used, used * weights[:count], atol=1e-6)
    np.testing.assert_allclose(used.T @ matrix @ free, 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(free.T @ matrix @ free), weights[count:], atol=1e-6)


def test_project_changes_kernel_and_bias_of_the_named_layers_alone():
    rng = np.random.default_rng(0)
    updates = {
        "a": {"b": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}},
        "c": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
    }
    matrix = np.array([[0.0, 0.0], [0.0, 1.0]])
    strategy_state = {"projections": {"a": {"b": {"mean": matrix}}}}
    after, _ = project().update(updates, optax.EmptyState(), strategy_state=strategy_state)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(after["a"]["b"][name][..., 0], 0)
        np.testing.assert_array_equal(after["a"]["b"][name][..., 1], updates["a"]["b"][name][..., 1])
        np.testing.assert_array_equal(after["c"][name], updates["c"][name])
    untouched, _ = project().update(updates, optax.EmptyState(), strategy_state={})
    jax.tree.map(np.testing.assert_array_equal, untouched, updates)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_does_not_change_the_strongest_direction(method, variables, images, optimizer):
    """This holds despite AdamW's element-wise scaling and weight decay."""
    config = paper("1-1")
    config.train.optimizer, config.train.weight_decay = optimizer, 0.1
    old = images(20, object_=1)
    rows = np.asarray(method.activations(variables, old)["down"]["mean"], np.float64)
    strongest = np.linalg.svd(rows)[2][0]

    def moved(**changes):
        strategy = iuf(settings_with(compression=0.0, **changes), method)
        strategy_state = strategy.finish({}, variables, old, 1)
        strategy_state = strategy.begin(strategy_state, variables, images(1), 1)
        transformation = make_optimizer(config.train)
        update = make_update(method, transformation, strategy)
        state = devices.replicate(initial_state(variables, transformation, 0, [], strategy_state))
        for _ in range(5):
            state, _ = update(state, single_update(images(8)), jax.random.key(0), np.float32([0.1]))
        after = devices.unreplicate(state).variables["params"]["down"]
        return {name: after[name] - variables["params"]["down"][name] for name in after}

    free = moved(projection=False, anchor=0.0)
    for projected in (moved(projection=True, anchor=0.0), moved(projection=True, anchor=0.05)):
        for name in ("kernel", "bias"):
            assert np.abs(free[name] @ strongest).max() > 1e-4
            np.testing.assert_allclose(projected[name] @ strongest, 0, atol=1e-6)
            assert np.abs(projected[name]).max() > 1e-4


def test_the_state_does_not_grow_with_images(method, variables, images):
    """It holds only the second moments of the rows of all images and objects."""
    strategy = iuf(settings_with(), method)
    first, second = images(19, object_=0), images(30, object_=1)
    begun = strategy.begin({}, variables, images(1), 0)
    after_first = strategy.finish(begun, variables, first, 0)
    both = strategy.finish(after_first, variables, second, 1)
    assert (
        jax.tree.map(np.shape, after_first) == jax.tree.map(np.shape, both) == {"moments": {"down": {"mean": (4, 4)}}}
    )
    down = variables["params"]["down"]
    tokens = np.concatenate([batch.features["rgb"] for batch in (first, second)]).astype(np.float64)
    rows = (tokens @ down["kernel"] + down["bias"]).mean(1)
    np.testing.assert_allclose(both["moments"]["down"]["mean"], rows.T @ rows, rtol=1e-4)


# --- Anchor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "step"), [(0.05, 0.0), (0.05, 0.3), (0.5, -0.3), (1.0, 0.3), (0.0, 0.3)])
def test_anchor_bounds_the_drift(beta, step):
    """W_t - W0 = (1 - beta)^t (W_1 - W0) + step (1 - (1 - beta)^t) / beta, whose last term is below step / beta."""
    old, weights = {"w": np.array([1.0, -2.0])}, {"w": np.array([2.0, -2.5])}
    start = weights["w"] - old["w"]
    for t in range(1, 101):
        updates = {"w": np.full(2, step)}
        changes, _ = anchor(beta).update(updates, optax.EmptyState(), weights, strategy_state={"old": old})
        weights = optax.apply_updates(weights, changes)
        decay = (1 - beta) ** t
        drift = step * (1 - decay) / beta if beta else step * t
        np.testing.assert_allclose(weights["w"] - old["w"], decay * start + drift, rtol=1e-4, atol=1e-5)


def test_anchor_without_old_weights_does_nothing():
    updates = {"w": np.ones(2)}
    changes, _ = anchor(0.5).update(updates, optax.EmptyState(), {"w": np.zeros(2)}, strategy_state={})
    np.testing.assert_array_equal(changes["w"], 1)


# --- All together ---------------------------------------------------------------------------------------------------


def test_each_part_can_be_switched_off_alone(method, variables, images):
    def parts(**changes):
        strategy = iuf(settings_with(**changes), method)
        base = strategy.begin({}, variables, images(1), 0)
        between = strategy.finish(base, variables, images(6), 0)
        later = strategy.begin(between, variables, images(1), 1)
        assert strategy.finish(later, variables, images(6), 1).keys() == between.keys()
        return [set(strategy_state) for strategy_state in ({k: v for k, v in base.items() if v}, between, later)]

    moments = {"moments"}
    assert parts() == [{"queues"}, moments, {"moments", "projections", "old"}]
    assert parts(anchor=0.0) == [{"queues"}, moments, {"moments", "projections"}]
    assert parts(projection=False) == [{"queues"}, set(), {"old"}]
    assert parts(compression=0.0) == [set(), moments, {"moments", "projections", "old"}]


def test_old_weights_are_those_before_the_step(method, variables, images):
    strategy = iuf(settings_with(), method)
    between = strategy.finish(strategy.begin({}, variables, images(1), 0), variables, images(6), 0)
    trained = jax.tree.map(lambda x: x + 1, variables)
    jax.tree.map(
        np.testing.assert_array_equal, strategy.begin(between, trained, images(1), 1)["old"], trained["params"]
    )
