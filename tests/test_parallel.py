"""Four emulated devices against one: the same training, whatever the number of devices."""

import pickle
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from iumad_jax import parallel, train
from iumad_jax.config import paper
from iumad_jax.data.pipeline import streamed
from iumad_jax.errors import UserError
from iumad_jax.methods.ib_iumad import ib_iumad
from iumad_jax.shapes import Batch


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """What is compiled once for a few numbers takes a third of the time without optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def three_updates():
    """The losses and the weights after three updates of a small IB-IUMAD with all its chance, as numpy arrays."""
    config = paper("1-0")
    config.model.update(width=8, heads=2, layers=1, hidden=12, patch_size=4, states=2, dropout=0.2)
    config.model.jitter.probability = 0.5
    rng = np.random.default_rng(0)
    batch = Batch(
        {"rgb": rng.normal(0, 2, (8, 16, 6)).astype(np.float32)},
        {"rgb": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.float32)},
        np.arange(8, dtype=np.int32) % 3,
    )
    method, optimizer = ib_iumad(config.model, ("rgb",), objects=3), train.make_optimizer(config.train)
    variables = jax.tree.map(np.asarray, jax.jit(method.init)(jax.random.key(0), batch))
    state = train.start(variables, optimizer, 0, [])
    shifted = [jax.tree.map(lambda a, shift=shift: np.roll(a, shift, 0), batch) for shift in range(3)]
    pieces = streamed(grain.MapDataset.source(shifted).to_iter_dataset())
    (epoch,) = train.epochs(
        train.make_update(method, optimizer),
        state,
        pieces,
        lambda _: 1e-2,
        jax.random.key(1),
        per_epoch=3,
        last=1,
    )
    return epoch.losses, epoch.state.variables["params"], variables["params"]


def test_four_devices_train_as_one_does(tmp_path):
    """To rounding: sums over images are taken in another order."""
    assert jax.local_device_count() == 4
    file = tmp_path / "one"
    with subprocess.Popen([sys.executable, __file__, file]) as process:
        losses, params, before = three_updates()
    assert process.returncode == 0
    one_losses, one_params, _ = pickle.loads(file.read_bytes())
    assert losses == pytest.approx(one_losses, rel=1e-4)
    moved = []
    for (path, four), one, old in zip(
        jax.tree.leaves_with_path(params), *map(jax.tree.leaves, (one_params, before)), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moved.append(np.abs(four - old).max())
        if not name.endswith("key/bias"):  # softmax ignores it, so that AdamW follows nothing but rounding
            np.testing.assert_allclose(four, one, rtol=0, atol=1e-3, err_msg=name)
    assert np.median(moved) > 0.02


def test_an_images_key_is_that_of_its_place_in_the_batch():
    keys = jax.random.split(jax.random.key(3), 12)

    def own(_, rows, key):
        return jax.random.key_data(parallel.own_keys(key, len(rows)))

    for batch_size in (12, 10):  # on four devices, the latter fill two places
        found = parallel.data_parallel(own)(np.zeros(4), parallel.share(np.arange(batch_size)), jax.random.key(3))
        np.testing.assert_array_equal(
            np.asarray(found).reshape(12, -1)[:batch_size], jax.random.key_data(keys)[:batch_size]
        )


def test_every_device_has_its_share_of_the_batch_and_a_copy_of_the_state():
    batch = {"x": np.arange(24.0).reshape(8, 3), "n": np.arange(8)}
    state = {"w": np.arange(3.0), "count": np.int32(5)}

    def update(state, batch, factor):
        mean = parallel.mean_over_devices(batch["x"].mean(0))
        return {"w": state["w"] + factor * mean, "count": state["count"] + batch["n"].sum()}

    whole_batch = jax.tree.map(lambda array: array[parallel.share(np.arange(8))], batch)
    after = parallel.data_parallel(update)(parallel.replicate(state), whole_batch, 2.0)
    np.testing.assert_array_equal(after["count"], 5 + np.array([0 + 1, 2 + 3, 4 + 5, 6 + 7]))
    for copy in np.asarray(after["w"]):
        np.testing.assert_allclose(copy, state["w"] + 2 * batch["x"].mean(0))
    first = parallel.unreplicate(after)
    assert isinstance(first["w"], np.ndarray)
    np.testing.assert_allclose(first["w"], state["w"] + 2 * batch["x"].mean(0))
    assert first["count"] == 6


if __name__ == "__main__":  # the same on one device, which only a process of its own has
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.local_device_count() == 1
    Path(sys.argv[1]).write_bytes(pickle.dumps(three_updates()))
