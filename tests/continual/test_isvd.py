"""The incremental SVD against second moments in float64, and what its projection keeps and leaves free."""

import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from iumad_jax.config import paper
from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.isvd import add_directions, add_rows, isvd
from iumad_jax.data.batches import single_update
from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method
from iumad_jax.runtime import devices
from iumad_jax.training.optimization import make_optimizer
from iumad_jax.training.update import initial_state, make_update
from tests import sentences
from tests.continual.conftest import CHANNELS, WIDTH


def settings_with(**changes):
    config = paper("1-1").continual.isvd
    config.update(every=1, **changes)
    return config


def rows_of_rank(rng, count, width, rank, size=1.0):
    """Draw rows whose energy is in `rank` directions, but for a thousandth of their size."""
    mixing = rng.standard_normal((rank, width))
    return size * (rng.standard_normal((count, rank)) @ mixing + 1e-3 * rng.standard_normal((count, width)))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.sampled_from([3, 20, 60]),
    count=st.sampled_from([1, 7, 40]),
    large=st.sampled_from([None, 0, 2]),
)
def test_directions_have_the_moments_of_all_rows(seed, width, count, large):
    """Also if the chunk that comes first, or last, has rows a thousand times as large."""
    rng = np.random.default_rng(seed)
    chunks = [rng.standard_normal((count, width)) * (1e3 if chunk == large else 1) for chunk in range(3)]
    directions = np.zeros((width, 0))
    for chunk in chunks:
        directions = add_rows(directions, chunk)
    moments = sum(chunk.T @ chunk for chunk in chunks)
    assert np.linalg.norm(directions @ directions.T - moments, 2) <= 0.01 * np.trace(moments)
    assert directions.shape[1] <= min(width, 3 * count)
    gram = directions.T @ directions
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-6 * np.trace(gram))


def test_the_basis_contains_every_object():
    """Without a limit, at most 1 % of the energy of each object is outside, whatever came later."""
    rng = np.random.default_rng(0)
    basis, objects = np.zeros((200, 200), np.float32), []
    for rank, size in ((10, 30.0), (20, 0.01), (15, 1.0)):
        objects.append(rows_of_rank(rng, 300, 200, rank, size))
        basis, left_out = add_directions(basis, add_rows(np.zeros((200, 0)), objects[-1]), gamma=0.99)
        assert left_out == 0
    used = int(np.any(basis, 0).sum())
    assert used <= 45  # and not the noise of all objects
    np.testing.assert_allclose(basis.T @ basis, np.diag(np.arange(200) < used), atol=1e-5)
    for rows in objects:
        outside = rows - rows @ basis @ basis.T
        assert np.square(outside).sum() <= 0.015 * np.square(rows).sum()


def test_what_finds_no_room_is_told():
    """Energies 4, 3, 2 and 1: with room for two of four directions, 3 of 10 are left out; then there is no room."""
    directions = np.diag(np.sqrt([4.0, 3, 2, 1]))
    basis, left_out = add_directions(np.zeros((4, 2), np.float32), directions, gamma=1.0)
    assert left_out == pytest.approx(0.3)
    np.testing.assert_allclose(np.abs(basis), np.eye(4)[:, :2], atol=1e-6)
    again, left_out = add_directions(basis, np.eye(4)[:, 3:], gamma=0.9)
    assert left_out == pytest.approx(1.0)
    np.testing.assert_allclose(again @ again.T, basis @ basis.T, atol=1e-6)
    full, left_out = add_directions(np.zeros((4, 4), np.float32), directions, gamma=0.6)
    assert (left_out, int(np.any(full, 0).sum())) == (0, 2)  # 4 + 3 are more than 6 of 10


def trained(method, variables, strategy_state, strategy, batch, decay=0.5):
    """Train three updates of AdamW, with decay, of a later step."""
    config = paper("1-1").train
    config.update(weight_decay=decay)
    optimizer = make_optimizer(config)
    update = make_update(method, optimizer, strategy)
    state = devices.replicate(initial_state(variables, optimizer, 0, [], strategy_state))
    for _ in range(3):
        state, _ = update(state, single_update(batch), jax.random.key(1), np.float32([1e-2]))
    return devices.unreplicate(state).variables


def plane(images, object_, count=8):
    """Return images whose tokens lie in a plane through 0 of their five channels."""
    axes = np.linalg.qr(np.random.default_rng(object_).standard_normal((CHANNELS, 2)))[0]
    batch = images(count, object_)
    tokens = batch.features["rgb"] @ axes @ axes.T
    return batch._replace(features={"rgb": tokens.astype(np.float32)})


@pytest.fixture
def kept(method, variables, images):
    """Return the strategy after an object of the base step, its state, and the object's images."""
    strategy, batch = isvd(settings_with(gamma=0.9999), method), plane(images, 0)
    state = strategy.finish(strategy.begin({}, variables, batch, 0), variables, batch, 0)
    return strategy, strategy.begin(state, variables, batch, 1), batch


def test_later_updates_hardly_change_what_old_objects_receive(method, variables, images, kept):
    """AdamW with weight decay, which a projection of gradients would not stop; but new objects are learned."""
    strategy, state, old = kept
    new = plane(images, 1)
    protected = trained(method, variables, state, strategy, new)
    unprotected = trained(method, variables, {}, finetune(method), new)

    def change(after, batch):
        moved = after["params"]["down"]["kernel"] - variables["params"]["down"]["kernel"]
        return float(np.abs(batch.features["rgb"] @ moved).max())

    assert change(protected, old) < 0.03 * change(unprotected, old)
    assert change(protected, new) > 0.3 * change(unprotected, new)


def test_only_projected_kernels_are_trained(method, variables, images, kept):
    strategy, state, _ = kept
    for freeze in (True, False):
        by = strategy if freeze else isvd(settings_with(freeze_rest=False), method)
        after = flatten_dict(trained(method, variables, state, by, plane(images, 1))["params"])
        for path, before in flatten_dict(variables["params"]).items():
            same = np.array_equal(after[path], before)
            assert same == (freeze and path[-1] == "bias"), path


def test_nothing_is_learned_once_the_bases_are_full(method, variables, images):
    strategy, state = isvd(settings_with(gamma=1.0), method), {}
    for object_ in range(4):
        batch = images(8, object_)
        state = strategy.finish(strategy.begin(state, variables, batch, object_), variables, batch, object_)
    assert strategy.describe(state) == {"filled": {"down": 1.0, "up": 1.0}, "left_out": 0.0}
    after = trained(method, variables, strategy.begin(state, variables, batch, 4), strategy, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after["params"], dict(variables["params"]))


def test_memory_is_bounded_by_the_rank(method, variables, images):
    strategy, state = isvd(settings_with(rank=3, gamma=1.0), method), {}
    for object_ in range(3):
        batch = images(8, object_)
        state = strategy.finish(strategy.begin(state, variables, batch, object_), variables, batch, object_)
        sizes = {path: array.shape for path, array in flatten_dict(state["layers"]).items() if path[-1] == "basis"}
        assert sizes == {("down", "basis"): (CHANNELS, 3), ("up", "basis"): (WIDTH, 3)}
    described = strategy.describe(state)
    assert described["filled"] == {"down": 1, "up": 1}
    assert 0 < described["left_out"] < 1


def test_every_nth_image_is_looked_at_up_to_a_number(method, variables, images):
    """The state is that of these images alone."""
    batch = images(40)
    chosen = jax.tree.map(lambda array: array[:30:10], batch)
    config = settings_with(images=3)
    all_, some = isvd(config, method), isvd(config.copy_and_resolve_references(), method)
    config.every = 10
    expected = some.finish({}, variables, chosen, 0)
    found = all_.finish({}, variables, batch, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_a_method_that_tells_no_inputs_is_refused():
    method = Method(init=None, predict=None, loss=lambda *_: None)
    with pytest.raises(UserError, match=re.escape(sentences.ISVD_NEEDS_INPUTS)):
        isvd(settings_with(), method)
