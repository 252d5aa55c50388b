"""What holds for all strategies: which objects they see, and the same training on one device and on four."""

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

STRATEGIES = ("finetune", "iuf", "replay", "joint")


def config_for(strategy):
    config = paper("1-1")
    config.continual.strategy = strategy
    config.continual.replay.update(rank=3, image_size=2)
    return config


def two_steps(name, method, images):
    """The losses, the weights after two steps of three updates each, and the state within and after the last."""
    config = config_for(name)
    strategy = continual.build(config, method, objects=2)
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
def test_four_devices_train_as_one_does(tmp_path, method, skewed_images):
    """To rounding, with all of a strategy's chance and what it gathers within and between steps."""
    assert jax.local_device_count() == 4
    file = tmp_path / "one"
    with subprocess.Popen([sys.executable, __file__, file]) as process:
        four = {name: two_steps(name, method, skewed_images) for name in ("iuf", "replay")}
    assert process.returncode == 0
    one = pickle.loads(file.read_bytes())
    for name in four:
        for ours, theirs in zip(four[name][0], one[name][0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2), name
        for (path, ours), theirs in zip(
            jax.tree.leaves_with_path(four[name][1:]), jax.tree.leaves(one[name][1:]), strict=True
        ):
            where = f"{name} {jax.tree_util.keystr(path)}"
            ours, theirs = (np.asarray(array, np.float32) for array in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=2e-3, err_msg=where)
    assert four["iuf"][0][0]["compression"] > 1e-3
    assert "compression" not in four["iuf"][0][3]


def test_only_joint_sees_the_images_of_earlier_steps(method):
    for name in STRATEGIES:
        strategy = continual.build(config_for(name), method, objects=5)
        seen = [strategy.objects(step) for step in steps("3-1", ("a", "b", "c", "d", "e"))]
        if name == "joint":
            assert seen == [("a", "b", "c"), ("a", "b", "c", "d"), ("a", "b", "c", "d", "e")]
        else:
            assert seen == [("a", "b", "c"), ("d",), ("e",)]


def test_unknown_strategy_is_refused(method):
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_STRATEGY.format(found="ewc", known="finetune, iuf, replay, joint"))
    ):
        continual.build(config_for("ewc"), method, objects=2)


def test_the_optimiser_of_later_steps():
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
    np.testing.assert_allclose(direction["kernel"], [0.06, 0.08], rtol=1e-5)  # clipped to 0.1, and no more
    config.continual.optimizer = "lion"
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_OPTIMIZER.format(found="lion", known="adamw, sgd"))
    ):
        make_optimizer(step_config(config, 1))


if __name__ == "__main__":  # the same on one device, which only a process of its own has
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.local_device_count() == 1
    from conftest import linear, random_images, skewed

    one = {name: two_steps(name, linear(), lambda *args: skewed(random_images(*args))) for name in ("iuf", "replay")}
    Path(sys.argv[1]).write_bytes(pickle.dumps(one))
