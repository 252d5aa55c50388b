"""Training: the optimiser against float64 NumPy, schedules by hand, resumed training and non-finite numbers."""

import logging
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax.config import paper
from iumad_jax.data.batches import batch_indices, training_batches, training_input
from iumad_jax.errors import UserError
from iumad_jax.methods.ib_iumad import ib_iumad
from iumad_jax.methods.method import Loss, Method
from iumad_jax.shapes import Batch
from iumad_jax.training.epochs import train_epochs
from iumad_jax.training.nonfinite import NotFinite, check, explain
from iumad_jax.training.optimization import learning_rates, make_optimizer
from iumad_jax.training.update import initial_state, make_update
from tests import sentences

pytestmark = pytest.mark.slow

IMAGES, BATCH, PER_EPOCH = 21, 4, 5
DECAYED = {"kernel", "query"}
SHAPES = {"kernel": (3, 2), "query": (2,), "bias": (2,), "scale": (4,), "A_log": (2, 2), "D": (5,), "dt_bias": (3,)}


def images(seed=0):
    """Create images whose only feature is a number."""
    values = np.random.default_rng(seed).normal(1, 2, IMAGES).astype(np.float32)
    return Batch({"rgb": values.reshape(IMAGES, 1, 1)}, {}, np.arange(IMAGES, dtype=np.int32))


def pull(noise=0.0):
    """Build a method with the gradient p - (mean number of the images + noise) for each parameter p."""

    def init(key, batch):
        keys = jax.random.split(key, len(SHAPES))
        return {
            "params": {name: jax.random.normal(k, SHAPES[name]) for name, k in zip(SHAPES, keys, strict=True)},
            "statistics": {},
        }

    def loss(variables, batch, keys):
        numbers = batch.features["rgb"][:, 0, 0] + noise * jax.vmap(jax.random.normal)(keys)
        leaves = jax.tree.leaves(variables["params"])
        terms = {"pull": sum(0.5 * jnp.mean(jax.vmap(lambda x, p=p: jnp.sum((p - x) ** 2))(numbers)) for p in leaves)}
        return Loss(terms["pull"], terms, {})

    return Method(init, predict=None, loss=loss)


def settings(**changes):
    config = paper("1-0").train
    config.update(epochs=4, batch_size=BATCH, learning_rate=0.1, weight_decay=0.5, clip_norm=6.0)
    config.update(changes)
    return config


def trained(method, config, images, first=0, state=None, update=None, stream=None, **arguments):
    """Train from update `first` on, and yield the epochs."""
    optimizer = make_optimizer(config)
    if state is None:
        state = initial_state(method.init(jax.random.key(1), images), optimizer, 0, [])
    stream = stream or training_input([images], BATCH, 7, first)
    update = update or make_update(method, optimizer)
    rates = learning_rates(config, PER_EPOCH)
    return train_epochs(update, state, stream, rates, jax.random.key(2), PER_EPOCH, config.epochs, **arguments)


def test_updates_are_those_of_adamw_with_a_clipped_norm():
    """Weight decay is decoupled (Loshchilov and Hutter, 2019), and gradients are clipped before the moments."""
    config = settings(schedule="step", drop_epoch=2)
    method, data = pull(), images()
    epochs = list(trained(method, config, data))
    batches = iter(training_batches([data], BATCH, seed=7, first=0))

    params = {k: np.asarray(v, np.float64) for k, v in method.init(jax.random.key(1), data)["params"].items()}
    first, second = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    clipped = []
    for t in range(1, 4 * PER_EPOCH + 1):
        numbers = next(batches).images.features["rgb"].astype(np.float64)
        gradients = {k: p - numbers.mean() for k, p in params.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        clipped.append(norm > 6)
        rate = 0.1 if t <= 2 * PER_EPOCH else 0.01
        for k, g in gradients.items():
            g = g * min(1, 6 / norm)
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g**2
            direction = first[k] / (1 - 0.9**t) / (np.sqrt(second[k] / (1 - 0.999**t)) + 1e-8)
            params[k] = params[k] - rate * (direction + (0.5 * params[k] if k in DECAYED else 0))
        if t % PER_EPOCH == 0:
            epoch = epochs[t // PER_EPOCH - 1]
            assert epoch.number == t // PER_EPOCH - 1
            for k, p in params.items():
                np.testing.assert_allclose(epoch.state.variables["params"][k], p, rtol=1e-4, atol=1e-5, err_msg=k)
    assert 2 < sum(clipped) < len(clipped) - 2  # both clipped and unclipped updates occurred
    assert len(epochs) == 4


def test_the_duration_of_an_epoch_does_not_include_the_compilation():
    config, method, data = settings(epochs=2), pull(), images()
    update, waits = make_update(method, make_optimizer(config)), [2.0]  # seconds, of the first update alone

    def slow_at_first(*arguments):
        time.sleep(waits.pop() if waits else 0.0)
        return update(*arguments)

    stream = training_input([data], BATCH, 7, 0, "never")
    first, second = trained(method, config, data, update=slow_at_first, stream=stream)
    assert not waits
    assert 0 < first.seconds < 2
    assert 0 < second.seconds < 2


def test_the_losses_of_an_epoch_are_means_over_its_updates():
    config = settings(learning_rate=0.0)
    method, data = pull(), images()
    params = method.init(jax.random.key(1), data)["params"]
    batches = iter(training_batches([data], BATCH, seed=7, first=0))
    for epoch in trained(method, config, data):
        numbers = [next(batches).images.features["rgb"].astype(np.float64) for _ in range(PER_EPOCH)]
        losses = [0.5 * sum(((p - x) ** 2).sum() for p in params.values()) for x in np.ravel(numbers)]
        squares = [sum(((p - np.mean(x)) ** 2).sum() for p in params.values()) for x in numbers]
        assert epoch.losses == {
            "loss": pytest.approx(np.mean(losses), rel=1e-5),
            "pull": epoch.losses["loss"],
            "gradient_norm": pytest.approx(np.mean(np.sqrt(squares)), rel=1e-5),
            "update_norm": 0,
        }


def test_every_update_draws_new_noise():
    """With constant images and weights, the loss still differs between epochs."""
    config, data = settings(learning_rate=0.0, epochs=12), images()
    data.features["rgb"][:] = 1
    losses = [epoch.losses["loss"] for epoch in trained(pull(noise=1.0), config, data)]
    assert len(set(losses)) == 12


def test_which_parameters_decay():
    """Matrices, embeddings and queries decay; biases, scales of norms and time parameters of the scan do not."""
    config = paper("1-0").model
    config.update(width=8, heads=2, layers=1, hidden=12, patch_size=4, states=2)
    batch = Batch(
        {m: np.zeros((1, 16, 6), np.float32) for m in ("rgb", "depth")},
        {m: np.zeros((1, 16, 16, 3), np.float32) for m in ("rgb", "depth")},
        np.zeros(1, np.int32),
    )
    shapes = jax.eval_shape(lambda key: ib_iumad(config, ("rgb", "depth")).init(key, batch), jax.random.key(0))
    optimizer = make_optimizer(settings())

    @jax.jit
    def changes_without_gradient():
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["params"])
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    changes, kept, decayed = changes_without_gradient(), set(), set()
    for path, change in jax.tree.leaves_with_path(changes):
        (decayed if change.any() else kept).add(path[-1].key)
    assert kept == {"A_log", "D", "bias", "dt_bias", "scale"}
    assert decayed == {"kernel", "dt_proj", "x_proj", "row_position", "column_position", "decoder_0_query"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "step", "drop_epoch": 2}, {0: 0.1, 9: 0.1, 10: 0.01, 19: 0.01}),
        ({"schedule": "step", "drop_epoch": 800}, {0: 0.1, 19: 0.1}),
        # 40 epochs of 5 updates: 10 updates of warm-up, then half a cosine over the other 190.
        ({"schedule": "cosine", "epochs": 40}, {0: 0, 5: 0.05, 10: 0.1, 105: 0.05, 190: 6.8188e-4, 200: 0}),
        ({"schedule": "cosine"}, {0: 0, 1: 0.1, 19: 0.1 * (1 + np.cos(np.pi * 18 / 19)) / 2}),
    ],
)
def test_learning_rates(changes, expected):
    rates = learning_rates(settings(**changes), PER_EPOCH)
    assert {update: float(rates(update)) for update in expected} == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_unknown_schedule_is_refused():
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_SCHEDULE.format(found="linear", known="step, cosine"))
    ):
        learning_rates(settings(schedule="linear"), PER_EPOCH)


def test_resumed_training_equals_uninterrupted_training():
    """After a stop at any update, keys, image order, moments and losses are equal bit by bit."""
    method, config, data = pull(noise=1.0), settings(schedule="cosine"), images()
    uninterrupted = list(trained(method, config, data))
    assert [epoch.updates for epoch in uninterrupted] == [5, 10, 15, 20]
    assert all(epoch.complete for epoch in uninterrupted)
    assert len({epoch.losses["loss"] for epoch in uninterrupted}) == 4
    paused = list(trained(method, config, data, pause=lambda: True))
    assert [epoch.updates for epoch in paused] == list(range(1, 21))
    assert [epoch.updates for epoch in paused if epoch.complete] == [5, 10, 15, 20]
    optimizer = make_optimizer(config)
    for stopped in (paused[i] for i in (0, 4, 6, 8, 9, 18)):
        updates = stopped.updates
        state = initial_state(stopped.state.variables, optimizer, updates, jax.tree.leaves(stopped.state.optimizer))
        history = {} if stopped.complete else stopped.history
        resumed = list(trained(method, config, data, updates, state, history=history))
        assert [epoch.number for epoch in resumed] == list(range(updates // PER_EPOCH, 4))
        for expected, epoch in zip(uninterrupted[updates // PER_EPOCH :], resumed, strict=True):
            assert epoch.losses == expected.losses
            jax.tree.map(
                np.testing.assert_array_equal, (epoch.state, epoch.history), (expected.state, expected.history)
            )


@pytest.mark.parametrize("updates_per_loop", [1, PER_EPOCH])
def test_resident_images_train_like_streamed_ones(updates_per_loop):
    """Single updates are equal bit by bit; an epoch as one loop, compiled differently, is equal up to rounding."""
    method, config, data = pull(noise=1.0), settings(schedule="cosine"), images()
    streamed_epochs, resident_epochs = (
        trained(method, config, data, stream=training_input([data], BATCH, 7, 0, resident, updates_per_loop))
        for resident in ("never", "always")
    )
    for expected, epoch in zip(streamed_epochs, resident_epochs, strict=True):
        rtol = 0 if updates_per_loop == 1 else 1e-5
        jax.tree.map(lambda a, b, r=rtol: np.testing.assert_allclose(a, b, r), epoch.state, expected.state)
        assert epoch.losses == pytest.approx(expected.losses, rel=rtol, abs=0)


def square_root(number):
    return jnp.sqrt(number)  # has an infinite derivative at 0


def logarithm(number):
    return jax.lax.scan(lambda carry, x: (carry + jnp.log(x), None), 0.0, jnp.stack([1.0, number]))[0]


def flawed(flaw):
    """Build `pull` with a further loss term: a flawed function of the smallest number in the batch."""
    method = pull()

    def flawed_loss(variables, batch, keys):
        loss = method.loss(variables, batch, keys)
        term = jnp.sum(jax.vmap(flaw)(variables["params"]["bias"] * 0 + batch.features["rgb"].min()))
        return loss._replace(total=loss.total + term, terms=loss.terms | {"flaw": term})

    return Method(method.init, predict=None, loss=flawed_loss)


def spoiled(number):
    """Create images, one of which has another number and is not used in the first epoch.

    Returns:
        The images, the update that uses this image, and the rows of that update.
    """
    data = images()
    data.features["rgb"][:] = np.abs(data.features["rgb"]) + 1
    order = [
        device_batches.images.object_id
        for device_batches, _ in zip(training_batches([data], BATCH, 7, 0), range(10), strict=False)
    ]
    (broken,) = set(range(IMAGES)) - set(np.ravel(order[:PER_EPOCH]).tolist())
    (update,) = [number for number, ids in enumerate(order) if broken in ids]
    data.features["rgb"][broken] = number
    return data, update, np.ravel(order[update])


@pytest.mark.parametrize(
    ("flaw", "number", "message"),
    [
        (jnp.abs, np.nan, sentences.INPUT_NOT_FINITE.format("images/features/rgb")),
        (
            logarithm,
            -1,
            sentences.OPERATION_NOT_FINITE.format(
                place=r"\S+/test_update\.py:\d+", source=r"return .*jnp\.log\(x\).*", operation="log", value="nan"
            ),
        ),
        (
            square_root,
            0,
            sentences.OPERATION_NOT_FINITE.format(
                place=r"\S+/test_update\.py:\d+", source=r"return jnp\.sqrt\(number\) .*", operation=r"\w+", value="inf"
            ),
        ),
    ],
)
def test_the_operation_that_produces_nan_is_found(flaw, number, message):
    """It is found in the forward and the backward pass, also within a loop; the update's images are listed."""
    data, update, rows = spoiled(number)
    method, config = flawed(flaw), settings(learning_rate=1e-3, schedule="step")
    update_with_debugging = make_update(method, make_optimizer(config), None, debug_nans=True)
    stream = training_input([data], BATCH, 7, 0, "always", 1)
    epochs = trained(method, config, data, update=update_with_debugging, stream=stream)
    epochs = explain(
        epochs, 3, PER_EPOCH, lambda update: [f"x/{row}" for row in batch_indices(update, IMAGES, BATCH, 7)]
    )
    assert np.isfinite(next(epochs).losses["loss"])
    with pytest.raises(UserError) as error:
        next(epochs)
    image_names = ", ".join(f"x/{row}" for row in rows)
    expected = sentences.IN_STEP.format(what=message, step=3, epoch=1, update=update - PER_EPOCH, images=image_names)
    assert re.fullmatch(rf"{expected}; [^\n]*\.", str(error.value))


def test_the_most_specific_cause_in_the_earliest_update_is_reported():
    """A loss term takes precedence over the total loss, and the gradient of the first broken parameter is named."""
    params = {"a": np.zeros((2, 3)), "b": {"c": np.zeros(2)}}
    good = {name: np.ones(4) for name in ("loss", "pull", "gradient_norm", "update_norm")} | {
        "element": np.zeros(4, int)
    }
    check(good, params, 10)
    bad = {name: np.array([1, 1, np.nan, np.nan]) for name in good} | {"element": np.array([0, 0, 6, 6])}
    for broken, message in [
        (
            bad,
            sentences.IN_UPDATE_OF_STEP.format(
                what=sentences.LOSS_NOT_FINITE.format(term="pull", value="nan"), update=12
            ),
        ),
        (
            bad | {"pull": np.array([1, 1, 1, np.inf])},
            sentences.IN_UPDATE.format(what=sentences.LOSS_NOT_FINITE.format(term="loss", value="nan"), update=12),
        ),
        (
            bad | {"pull": good["pull"], "loss": good["loss"]},
            sentences.IN_UPDATE.format(
                what=sentences.GRADIENT_NOT_FINITE.format(parameter="b/c", value="nan"), update=12
            ),
        ),
        (
            good | {"update_norm": np.array([1, np.inf, 1, 1])},
            sentences.IN_UPDATE.format(what=sentences.UPDATE_NOT_FINITE.format(value="inf"), update=11),
        ),
    ]:
        with pytest.raises(NotFinite, match=message):
            check(broken, params, 10)


def test_non_finite_weights_are_never_kept():
    """They are detected even after an epoch's last update, before they affect any loss."""
    config = settings(learning_rate=1e38, schedule="step", clip_norm=1e9)
    with pytest.raises(
        NotFinite,
        match=sentences.IN_UPDATE_OF_STEP.format(what=sentences.UPDATE_NOT_FINITE.format(value="inf"), update=0),
    ):
        next(trained(pull(), config, images()))


def test_the_update_is_compiled_once(caplog):
    """Nothing is compiled after the first epoch, even if another step begins or a snapshot is resumed."""
    method, config, data = pull(), settings(), images()
    optimizer = make_optimizer(config)
    update = make_update(method, optimizer)
    epochs = trained(method, config, data, update=update)
    initial_state(jax.tree.map(np.asarray, method.init(jax.random.key(1), data)), optimizer, 0, [])  # compiles zeros
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        next(epochs)
        assert "Compiling" in caplog.text
        caplog.clear()
        (*_, last) = epochs
        for updates, leaves in [(0, []), (2, jax.tree.leaves(last.state.optimizer))]:
            state = initial_state(last.state.variables, optimizer, updates, leaves)
            list(trained(method, config, images(1), updates, state, update))
    assert "Compiling" not in caplog.text
