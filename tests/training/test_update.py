"""Training: the optimiser against float64 NumPy, the schedules by hand, and what a resumed or broken run leaves."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax.config import paper
from iumad_jax.data.batches import images_of, training_batches, training_input
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
    """Images whose only feature is a number."""
    values = np.random.default_rng(seed).normal(1, 2, IMAGES).astype(np.float32)
    return Batch({"rgb": values.reshape(IMAGES, 1, 1)}, {}, np.arange(IMAGES, dtype=np.int32))


def pull(noise=0.0):
    """A method whose parameters are pulled towards the images' numbers: the gradient is p - (mean number + noise)."""

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


def trained(method, config, images, first=0, state=None, update=None, stream=None, **rest):
    """Every epoch from the first update, each as training leaves it."""
    optimizer = make_optimizer(config)
    if state is None:
        state = initial_state(method.init(jax.random.key(1), images), optimizer, 0, [])
    stream = stream or training_input([images], BATCH, 7, first)
    update = update or make_update(method, optimizer)
    rates = learning_rates(config, PER_EPOCH)
    return train_epochs(update, state, stream, rates, jax.random.key(2), PER_EPOCH, config.epochs, **rest)


def test_updates_are_those_of_adamw_with_a_clipped_norm():
    """Decoupled weight decay (Loshchilov and Hutter, 2019), gradients clipped before the moments are taken."""
    config = settings(schedule="step", drop_epoch=2)
    method, data = pull(), images()
    found = list(trained(method, config, data))
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
            epoch = found[t // PER_EPOCH - 1]
            assert epoch.number == t // PER_EPOCH - 1
            for k, p in params.items():
                np.testing.assert_allclose(epoch.state.variables["params"][k], p, rtol=1e-4, atol=1e-5, err_msg=k)
    assert 2 < sum(clipped) < len(clipped) - 2  # both kinds occurred
    assert len(found) == 4


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


def test_every_update_draws_its_own_noise():
    """The same images over and over, to weights that stand still, have another loss in every update."""
    config, data = settings(learning_rate=0.0, epochs=12), images()
    data.features["rgb"][:] = 1
    losses = [epoch.losses["loss"] for epoch in trained(pull(noise=1.0), config, data)]
    assert len(set(losses)) == 12


def test_what_the_network_decays():
    """Matrices, embeddings and queries; no bias, no norm's scale, nothing that shapes the scan's time."""
    config = paper("1-0").model
    config.update(width=8, heads=2, layers=1, hidden=12, patch_size=4, states=2)
    batch = Batch(
        {m: np.zeros((1, 16, 6), np.float32) for m in ("rgb", "depth")},
        {m: np.zeros((1, 16, 16, 3), np.float32) for m in ("rgb", "depth")},
        np.zeros(1, np.int32),
    )
    shapes = jax.eval_shape(lambda key: ib_iumad(config, ("rgb", "depth"), 3).init(key, batch), jax.random.key(0))
    optimizer = make_optimizer(settings())

    @jax.jit
    def at_rest():
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["params"])
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    moved, kept, decayed = at_rest(), set(), set()
    for path, change in jax.tree.leaves_with_path(moved):
        (decayed if change.any() else kept).add(path[-1].key)
    assert kept == {"A_log", "D", "bias", "dt_bias", "scale"}
    assert decayed == {"kernel", "dt_proj", "x_proj", "row_position", "column_position", "decoder_0_query"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "step", "drop_epoch": 2}, {0: 0.1, 9: 0.1, 10: 0.01, 19: 0.01}),
        ({"schedule": "step", "drop_epoch": 800}, {0: 0.1, 19: 0.1}),
        # 40 epochs of 5 updates: 10 of warm-up, then half a cosine over the 190 that remain.
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


def test_training_goes_on_as_if_it_had_never_stopped():
    """From the numbers after any update alone: same keys, same order of images, same moments and losses, bit by bit."""
    method, config, data = pull(noise=1.0), settings(schedule="cosine"), images()
    whole = list(trained(method, config, data))
    assert [epoch.updates for epoch in whole] == [5, 10, 15, 20]
    assert all(epoch.whole for epoch in whole)
    assert len({epoch.losses["loss"] for epoch in whole}) == 4
    paused = list(trained(method, config, data, pause=lambda: True))
    assert [epoch.updates for epoch in paused] == list(range(1, 21))
    assert [epoch.updates for epoch in paused if epoch.whole] == [5, 10, 15, 20]
    optimizer = make_optimizer(config)
    for stopped in (paused[i] for i in (0, 4, 6, 8, 9, 18)):
        done = stopped.updates
        state = initial_state(stopped.state.variables, optimizer, done, jax.tree.leaves(stopped.state.optimizer))
        history = {} if stopped.whole else stopped.history
        rest = list(trained(method, config, data, done, state, history=history))
        assert [epoch.number for epoch in rest] == list(range(done // PER_EPOCH, 4))
        for one, other in zip(whole[done // PER_EPOCH :], rest, strict=True):
            assert one.losses == other.losses
            jax.tree.map(np.testing.assert_array_equal, (one.state, one.history), (other.state, other.history))


@pytest.mark.parametrize("updates_per_loop", [1, PER_EPOCH])
def test_resident_images_train_as_streamed_ones_do(updates_per_loop):
    """Bit by bit update by update; to rounding where an epoch is one loop, which is compiled in another way."""
    method, config, data = pull(noise=1.0), settings(schedule="cosine"), images()
    streamed, found = (
        trained(method, config, data, stream=training_input([data], BATCH, 7, 0, resident, updates_per_loop))
        for resident in ("never", "always")
    )
    for one, other in zip(streamed, found, strict=True):
        rtol = 0 if updates_per_loop == 1 else 1e-5
        jax.tree.map(lambda a, b, r=rtol: np.testing.assert_allclose(a, b, r), other.state, one.state)
        assert other.losses == pytest.approx(one.losses, rel=rtol, abs=0)


def square_root(number):
    return jnp.sqrt(number)  # whose derivative at 0 is infinite


def logarithm(number):
    return jax.lax.scan(lambda carry, x: (carry + jnp.log(x), None), 0.0, jnp.stack([1.0, number]))[0]


def flawed(flaw):
    """`pull`, whose loss has a further term of one parameter that a flaw makes of it."""
    method = pull()

    def loss(variables, batch, keys):
        own = method.loss(variables, batch, keys)
        term = jnp.sum(jax.vmap(flaw)(variables["params"]["bias"] * 0 + batch.features["rgb"].min()))
        return own._replace(total=own.total + term, terms=own.terms | {"flaw": term})

    return Method(method.init, predict=None, loss=loss)


def spoiled(number):
    """Images of which one, left out of the first epoch, has another number; its place and the update that takes it."""
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
    ("flaw", "number", "told"),
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
def test_the_operation_that_makes_nan_is_found(flaw, number, told):
    """In the forward or backward pass, also within a loop; and the images of the update are named."""
    data, update, rows = spoiled(number)
    method, config = flawed(flaw), settings(learning_rate=1e-3, schedule="step")
    finding = make_update(method, make_optimizer(config), None, find_operations=True)
    passes = trained(method, config, data, update=finding, stream=training_input([data], BATCH, 7, 0, "always", 1))
    epochs = explain(passes, 3, PER_EPOCH, lambda update: [f"x/{row}" for row in images_of(update, IMAGES, BATCH, 7)])
    assert np.isfinite(next(epochs).losses["loss"])
    with pytest.raises(UserError) as error:
        next(epochs)
    named = ", ".join(f"x/{row}" for row in rows)
    expected = sentences.IN_STEP.format(what=told, step=3, epoch=1, update=update - PER_EPOCH, images=named)
    assert re.fullmatch(rf"{expected}; [^\n]*\.", str(error.value))


def test_what_is_not_finite_is_told_by_its_first_part():
    """Of the earliest update the term, not the total that it spoils; the gradient of the parameter that broke first."""
    params = {"a": 0, "b": {"c": 0}}
    good = {name: np.ones(4) for name in ("loss", "pull", "gradient_norm", "update_norm")} | {
        "parameter": np.zeros(4, int)
    }
    check(good, params, 10)
    bad = {name: np.array([1, 1, np.nan, np.nan]) for name in good} | {"parameter": np.array([0, 0, 1, 1])}
    for broken, told in [
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
        with pytest.raises(NotFinite, match=told):
            check(broken, params, 10)


def test_weights_that_are_not_finite_are_never_kept():
    """Not even those of an epoch's last update, before any loss could tell."""
    config = settings(learning_rate=1e38, schedule="step", clip_norm=1e9)
    with pytest.raises(
        NotFinite,
        match=sentences.IN_UPDATE_OF_STEP.format(what=sentences.UPDATE_NOT_FINITE.format(value="inf"), update=0),
    ):
        next(trained(pull(), config, images()))


def test_the_update_is_compiled_once(caplog):
    """After the first epoch nothing is, whether a step ends, another begins or a snapshot is resumed."""
    method, config, data = pull(), settings(), images()
    optimizer = make_optimizer(config)
    update = make_update(method, optimizer)
    epochs = trained(method, config, data, update=update)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        next(epochs)
        assert "Compiling" in caplog.text
        caplog.clear()
        (*_, last) = epochs
        for done, leaves in [(0, []), (2, jax.tree.leaves(last.state.optimizer))]:
            state = initial_state(last.state.variables, optimizer, done, leaves)
            list(trained(method, config, images(1), done, state, update))
    assert "Compiling" not in caplog.text
