"""Training on one to eight emulated devices is equal."""

import functools
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from iumad_jax.config import paper
from iumad_jax.continual.iuf import iuf
from iumad_jax.continual.replay import replay
from iumad_jax.data.batches import single_update, training_batches
from iumad_jax.errors import UserError
from iumad_jax.methods.ib_iumad import ib_iumad
from iumad_jax.methods.network import from_network, jitter
from iumad_jax.runtime import devices, joining
from iumad_jax.shapes import Batch
from iumad_jax.training.epochs import train_epochs
from iumad_jax.training.optimization import make_optimizer
from iumad_jax.training.update import initial_state, make_update
from tests import sentences

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

SMALL = {
    "finetune": 8,
    "iuf": 3,
    "replay": 3,
}  # batch size for each strategy; three images cannot be divided among the devices


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compile without optimisation. Each function runs only a few times, so this takes a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def three_updates():
    """Train a small IB-IUMAD with all its randomness for three updates.

    Returns:
        The losses with the norm of the first gradient, the weights after training and the initial weights, as NumPy
        arrays.
    """
    config = paper("1-0")
    config.model.update(width=8, heads=2, layers=1, hidden=12, patch_size=4, states=2, dropout=0.2)
    config.model.jitter.probability = 0.5
    rng = np.random.default_rng(0)
    batch = Batch(
        {"rgb": rng.normal(0, 2, (8, 16, 6)).astype(np.float32)},
        {"rgb": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.float32)},
        np.arange(8, dtype=np.int32) % 3,
    )
    method, optimizer = ib_iumad(config.model, ("rgb",)), make_optimizer(config.train)
    variables = method.grow(jax.jit(method.init)(jax.random.key(0), batch), 3, jax.random.key(0))
    variables = jax.tree.map(np.asarray, variables)
    state = initial_state(variables, optimizer, 0, [])
    shifted = [single_update(jax.tree.map(lambda a, shift=shift: np.roll(a, shift, 0), batch)) for shift in range(3)]
    stream = (device_batches for device_batches in shifted)
    (epoch,) = train_epochs(
        make_update(method, optimizer),
        state,
        stream,
        lambda _: 1e-2,
        jax.random.key(1),
        per_epoch=3,
        epochs=1,
    )
    # Later gradients amplify rounding: another instruction set (XLA_FLAGS=--xla_cpu_max_isa) changes them by 1e-3.
    losses = epoch.losses | {"gradient_norm": epoch.history["gradient_norm"][0]}
    return losses, epoch.state.variables["params"], variables["params"]


class Narrow(nn.Module):
    """Autoencoder of tokens with a narrow layer."""

    @nn.compact
    def __call__(self, tokens, images, *, deterministic):
        noisy = (
            tokens["rgb"] if deterministic else jitter(self.make_rng("jitter"), tokens["rgb"], scale=2, probability=0.5)
        )
        hidden = nn.Dense(4)(noisy)
        colour = nn.Dense(2)(images["rgb"].mean((0, 1)) / 255)
        return (nn.Dense(6)(hidden), colour), {"rgb": (hidden,)}


def small_training(strategy, batch_size):
    """Train a small network for four updates, and return the losses, the weights and the strategy's state."""

    def losses(output, features, object_id):
        rebuilt, colour = output
        return {"error": jnp.mean((rebuilt - features["rgb"]) ** 2), "object": -nn.log_softmax(colour)[object_id]}

    config, rng = paper("1-0"), np.random.default_rng(0)
    config.model.jitter.probability = 0.5
    images = Batch(
        {"rgb": rng.normal(0, 2, (17, 9, 6)).astype(np.float16)},
        {"rgb": rng.integers(0, 256, (17, 4, 4, 3)).astype(np.float32)},
        np.arange(17, dtype=np.int32) % 2,
    )
    method = from_network(Narrow(), config.model, ("rgb",), losses, residuals_and_logits=None)
    build = {
        "finetune": lambda: None,
        "iuf": lambda: iuf(config.continual, method),
        "replay": lambda: replay(config.continual.replay, method),
    }
    strategy, optimizer = build[strategy](), make_optimizer(config.train)
    variables = jax.tree.map(np.asarray, jax.jit(method.init)(jax.random.key(0), images))
    strategy_state = strategy.begin({}, variables, images, 0) if strategy else {}
    if "queues" in strategy_state:  # small singular values, since otherwise nothing would be compressed
        strategy_state = jax.tree.map(
            lambda queue: rng.normal(0, [1, 1, 0.02, 0.01], queue.shape).astype(np.float32), strategy_state
        )
    elif strategy:
        strategy_state = strategy.begin(strategy.finish(strategy_state, variables, images, 0), variables, images, 1)
    stream = (device_batches for device_batches in training_batches([images], batch_size, 0, 0))
    update, state = make_update(method, optimizer, strategy), initial_state(variables, optimizer, 0, [], strategy_state)
    (epoch,) = train_epochs(update, state, stream, lambda _: 1e-2, jax.random.key(1), per_epoch=4, epochs=1)
    return epoch.losses, epoch.state.variables["params"], epoch.state.strategy_state


def small_trainings():
    return {strategy: small_training(strategy, size) for strategy, size in SMALL.items()}


@pytest.fixture(scope="module")
def by_devices(tmp_path_factory):
    """Return the results of `small_trainings` and, for 1 and 4 devices, `three_updates`, by number of devices."""
    folder = tmp_path_factory.mktemp("devices")
    assert jax.local_device_count() == 4
    processes = [
        subprocess.Popen([sys.executable, "-m", "tests.runtime.test_devices", folder / str(n), str(n)], cwd=ROOT)
        for n in (1, 2, 8)
    ]
    results = {4: (small_trainings(), three_updates())}
    assert [process.wait() for process in processes] == [0, 0, 0]
    return results | {n: pickle.loads((folder / str(n)).read_bytes()) for n in (1, 2, 8)}


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("strategy", SMALL)
def test_any_number_of_devices_trains_like_one_whether_or_not_the_batch_divides(by_devices, devices, strategy):
    """The mean over the batch decides. Results are equal up to rounding, since sums have another order."""
    (losses, params, strategy_state), (one_losses, one_params, one_state) = (
        by_devices[number][0][strategy] for number in (devices, 1)
    )
    assert losses == pytest.approx(one_losses, rel=1e-4)
    for actual, expected in ((params, one_params), (strategy_state, one_state)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected)


def test_four_devices_train_ib_iumad_like_one(by_devices):
    """Results are equal up to rounding, as above."""
    losses, params, before = by_devices[4][1]
    one_losses, one_params, _ = by_devices[1][1]
    assert losses == pytest.approx(one_losses, rel=1e-4)
    moved = []
    for (path, four), one, old in zip(
        jax.tree.leaves_with_path(params), *map(jax.tree.leaves, (one_params, before)), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moved.append(np.abs(four - old).max())
        if not name.endswith("key/bias"):  # softmax ignores it, so AdamW only follows rounding errors
            np.testing.assert_allclose(four, one, rtol=0, atol=1e-3, err_msg=name)
    assert np.median(moved) > 0.02


def test_the_key_of_an_image_depends_on_its_place_in_the_batch():
    keys = jax.random.split(jax.random.key(3), 12)

    def local_keys(_, rows, key):
        return jax.random.key_data(devices.image_keys(key, len(rows)))

    for batch_size in (12, 10):  # on four devices, the latter leaves two places to fill
        actual = devices.data_parallel(local_keys)(
            np.zeros(4), devices.split_indices(np.arange(batch_size)), jax.random.key(3)
        )
        np.testing.assert_array_equal(
            np.asarray(actual).reshape(12, -1)[:batch_size], jax.random.key_data(keys)[:batch_size]
        )


def test_every_device_has_its_share_of_the_batch_and_a_copy_of_the_state():
    batch = {"x": np.arange(24.0).reshape(8, 3), "n": np.arange(8)}
    state = {"w": np.arange(3.0), "count": np.int32(5)}

    def update(state, batch, factor):
        mean = devices.mean_over_devices(batch["x"].mean(0))
        return {"w": state["w"] + factor * mean, "count": state["count"] + batch["n"].sum()}

    whole_batch = jax.tree.map(lambda array: array[devices.split_indices(np.arange(8))], batch)
    after = devices.data_parallel(update)(devices.replicate(state), whole_batch, 2.0)
    np.testing.assert_array_equal(after["count"], 5 + np.array([0 + 1, 2 + 3, 4 + 5, 6 + 7]))
    for copy in np.asarray(after["w"]):
        np.testing.assert_allclose(copy, state["w"] + 2 * batch["x"].mean(0))
    first = devices.unreplicate(after)
    assert isinstance(first["w"], np.ndarray)
    np.testing.assert_allclose(first["w"], state["w"] + 2 * batch["x"].mean(0))
    assert first["count"] == 6


def test_a_coordinator_that_does_not_answer_is_reported(monkeypatch):
    monkeypatch.setattr(joining, "_START_TIMEOUT", 1)
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    with (
        pytest.raises(
            UserError,
            match=sentences.COORDINATOR_SILENT.format(address=address, reason="Connection refused", seconds=1),
        ),
        joining.joined(address, 2, 1, cluster=False),
    ):
        pass


def test_shapes_on_a_device_are_those_before_replication():
    tree = {"kernel": np.zeros((2, 3)), "scale": np.float32(1)}
    shapes = devices.shapes_on_a_device(devices.replicate(tree))
    assert jax.tree.map(np.shape, shapes) == {"kernel": (2, 3), "scale": ()}


if __name__ == "__main__":  # the same training on another number of devices, which needs a separate process
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    results = small_trainings(), three_updates() if sys.argv[2] == "1" else None
    Path(sys.argv[1]).write_bytes(pickle.dumps(results))
