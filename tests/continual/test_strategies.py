"""Properties of all strategies: the objects they train on, and equal training on one and four devices."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from iumad_jax import continual
from iumad_jax.config import paper
from iumad_jax.data.batches import single_update
from iumad_jax.errors import UserError
from iumad_jax.protocol import steps
from iumad_jax.runtime import devices
from iumad_jax.training.optimization import make_optimizer, step_config
from iumad_jax.training.update import initial_state, make_update
from tests import sentences

ROOT = Path(__file__).parents[2]
STRATEGIES = ("finetune", "iuf", "isvd", "replay", "joint")


def config_for(strategy):
    config = paper("1-1")
    config.continual.strategy = strategy
    config.continual.replay.update(rank=3, image_size=2)
    return config


def two_steps(name, method, images):
    """Train two steps of three updates each.

    Returns:
        The losses, the weights, and the state within and after the last step.
    """
    config = config_for(name)
    strategy = continual.build(config, method)
    optimizer = make_optimizer(config.train)
    update = make_update(method, optimizer, strategy)
    variables = jax.tree.map(np.asarray, method.init(jax.random.key(0), images(8)))
    strategy_state, losses = {}, []
    for step in range(2):
        batch = images(8, step)
        strategy_state = strategy.begin(strategy_state, variables, batch, step)
        state = devices.replicate(initial_state(variables, optimizer, 0, [], strategy_state))
        for _ in range(3):
            state, scalars = update(state, single_update(batch), jax.random.key(step), np.float32([1e-2]))
            losses.append({name: float(value[0, 0]) for name, value in scalars.items()})
        copies = jax.tree.map(np.asarray, state.strategy_state)
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, np.broadcast_to(a[:1], a.shape)), copies)
        state = devices.unreplicate(state)
        variables, within = state.variables, state.strategy_state
        strategy_state = strategy.finish(within, variables, batch, step)
    return losses, variables["params"], [within, strategy_state]


@pytest.mark.slow
def test_four_devices_train_like_one(tmp_path, method, skewed_images):
    """Results are equal up to rounding, including random draws and the state within and between steps."""
    assert jax.local_device_count() == 4
    file = tmp_path / "one_device"
    with subprocess.Popen([sys.executable, "-m", "tests.continual.test_strategies", file], cwd=ROOT) as process:
        four_devices = {name: two_steps(name, method, skewed_images) for name in ("iuf", "isvd", "replay")}
    assert process.returncode == 0
    one_device = pickle.loads(file.read_bytes())
    for name in four_devices:
        for array, expected in zip(four_devices[name][0], one_device[name][0], strict=True):
            assert array == pytest.approx(expected, rel=1e-2), name
        for (path, array), expected in zip(
            jax.tree.leaves_with_path(four_devices[name][1:]), jax.tree.leaves(one_device[name][1:]), strict=True
        ):
            where = f"{name} {jax.tree_util.keystr(path)}"
            array, expected = (np.asarray(array, np.float32) for array in (array, expected))
            np.testing.assert_allclose(array, expected, rtol=1e-2, atol=2e-3, err_msg=where)
    assert four_devices["iuf"][0][0]["compression"] > 1e-3
    assert "compression" not in four_devices["iuf"][0][3]


def test_only_joint_trains_on_images_of_earlier_steps(method):
    for name in STRATEGIES:
        strategy = continual.build(config_for(name), method)
        objects = [strategy.objects(step) for step in steps("3-1", ("a", "b", "c", "d", "e"))]
        if name == "joint":
            assert objects == [("a", "b", "c"), ("a", "b", "c", "d"), ("a", "b", "c", "d", "e")]
        else:
            assert objects == [("a", "b", "c"), ("d",), ("e",)]


def test_unknown_strategy_is_refused(method):
    with pytest.raises(
        UserError,
        match=re.escape(sentences.UNKNOWN_STRATEGY.format(found="ewc", known="finetune, iuf, replay, isvd, joint")),
    ):
        continual.build(config_for("ewc"), method)


def test_later_steps_use_their_own_optimiser():
    config = paper("1-1")
    config.train.learning_rate = 0.5
    assert step_config(config, 1) == step_config(config, 0) == config.train
    config.continual.optimizer = "sgd"
    later = step_config(config, 1)
    assert (later.optimizer, later.learning_rate) == ("sgd", 1.0)
    assert step_config(config, 0) == config.train
    gradients = {"kernel": np.array([3.0, 4.0], np.float32)}
    optimizer = make_optimizer(later)
    direction, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(direction["kernel"], [0.06, 0.08], rtol=1e-5)  # only clipped to 0.1
    config.continual.optimizer = "lion"
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_OPTIMIZER.format(found="lion", known="adamw, sgd"))
    ):
        make_optimizer(step_config(config, 1))


if __name__ == "__main__":  # the same training on one device, which needs a separate process
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.local_device_count() == 1
    from tests.continual.conftest import linear, random_images, skewed

    results = {
        name: two_steps(name, linear(), lambda *args: skewed(random_images(*args)))
        for name in ("iuf", "isvd", "replay")
    }
    Path(sys.argv[1]).write_bytes(pickle.dumps(results))
