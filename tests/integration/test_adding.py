"""The method, dataset and strategy of iumad_jax/README.md, added to a copy of the package as described, make a run."""

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from iumad_jax.runtime.ledger import read
from iumad_jax.runtime.snapshots import read as snapshot
from tests import sentences
from tests.integration.conftest import SMALL, as_flags

pytestmark = pytest.mark.slow

ARRAYS = SMALL | {"dataset.name": "arrays", "dataset.root": "arrays", "backbone.grid": 4}
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (file|line) (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)

EVERYTHING = '''"""A method that uses every optional part of a method: it learns the mean token of each object."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iumad_jax.methods.error_maps import upsample_errors, norm
from iumad_jax.methods.method import Loss, Method


def everything():
    def init(key, batch):
        channels = batch.features["rgb"].shape[-1]
        return {"params": {"mean": jnp.zeros((0, channels))}, "statistics": {"done": jnp.zeros(())}}

    def grow(variables, objects, key):
        mean = np.asarray(variables["params"]["mean"])
        new = np.zeros((objects - len(mean), mean.shape[1]), np.float32)
        return variables | {"params": {"mean": np.concatenate([mean, new])}}

    def centres(variables):
        return variables["params"]["mean"] + variables["frozen"]["offset"][None]

    def error(centres, batch):
        return batch.features["rgb"] - centres[batch.object_id][:, None]

    def loss(variables, batch, keys):
        squares = batch.mean((error(centres(variables), batch) ** 2).mean((1, 2)))
        return Loss(squares, {"squares": squares}, statistics={"done": batch.progress})

    def arrange(variables):
        return {"centres": centres(variables)}

    def predict(variables, batch):
        return upsample_errors({"rgb": norm(error(variables["centres"], batch))})

    def held_out(variables, object_id):
        return upsample_errors({"rgb": jnp.full((2, 16), 3.0 + object_id)})

    def decay_to_zero(updates, state, params=None, *, progress, **_):
        return jax.tree.map(lambda update: (1 - progress) * update, updates), state

    def optimizer(config):
        decay = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), decay_to_zero)
        return optax.chain(optax.scale_by_adam(), decay)

    def frozen():
        return {"offset": np.load("offset.npy")}

    optional = {"grow": grow, "optimizer": optimizer, "frozen": frozen, "arrange": arrange, "held_out": held_out}
    return Method(init, predict, loss, **optional)
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Create a folder with an extended copy of the package, and small images of two objects."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "iumad_jax", home / "iumad_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", home / "configs")
    blocks = BLOCK.findall((ROOT / "iumad_jax" / "README.md").read_text())
    assert [kind for kind, _, _ in blocks] == ["file", "line"] * 3
    for (_, file, content), (_, registry, line) in zip(blocks[::2], blocks[1::2], strict=True):
        assert len(content.splitlines()) < 30
        assert not (home / file).exists()
        (home / file).write_text(content)
        (name,) = re.findall(r"^(?:def|class) (\w+)(?!.*nn\.Module)", content, re.MULTILINE)
        before = (home / registry).read_text()
        imported = before.replace("\n\n", f"\n\nfrom {file[:-3].replace('/', '.')} import {name}\n", 1)
        after = re.sub(r"(    (?:\w+ =|return) \{\n)", rf"\1{line}", imported, count=1)
        assert len(after.splitlines()) == len(before.splitlines()) + 2
        (home / registry).write_text(after)
    (home / "iumad_jax/methods/everything.py").write_text(EVERYTHING)
    methods = home / "iumad_jax/methods/__init__.py"
    text = methods.read_text().replace("    methods = {\n", '    methods = {\n        "everything": everything,\n')
    methods.write_text(text.replace("\n\n", "\n\nfrom iumad_jax.methods.everything import everything\n", 1))
    rng = np.random.default_rng(0)
    for object_, split, number in product(("bolt", "nut"), ("train", "test"), range(4)):
        depth = np.full((48, 64), 0.5, np.float32) - rng.normal(0, 1e-4, (48, 64)).astype(np.float32)
        depth[16:32, 20:40] -= 0.02
        mask = np.zeros((48, 64), bool)
        mask[18:22, 22:26] = split == "test" and number % 2
        folder = home / "arrays" / object_ / split
        folder.mkdir(parents=True, exist_ok=True)
        rgb = rng.integers(0, 256, (48, 64, 3), np.uint8)
        np.savez(folder / f"{number}.npz", rgb=rgb, depth=depth, mask=mask)
    return home


def run(home, module, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"iumad_jax.{module}", *flags],
        cwd=home,
        env=os.environ | {"PYTHONPATH": f"{home}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )


def test_method_dataset_and_strategy_of_the_readme(home):
    keys = ARRAYS | {"method": "autoencoder", "continual.strategy": "l2", "train.epochs": 3}
    process = run(home, "main", "--config=configs/quickstart.py:1-1", "--workdir=run", *as_flags(keys))
    assert process.returncode == 0, process.stderr
    epochs = [event for event in read(home / "run" / "ledger.jsonl") if event["event"] == "epoch"]
    assert [set(event) - {"event", "step", "epoch"} for event in epochs] == [
        *[{"loss", "error", "gradient_norm", "update_norm"}] * 3,
        *[{"loss", "error", "gradient_norm", "update_norm", "pull"}] * 3,
    ]
    assert epochs[2]["error"] < epochs[0]["error"]
    assert epochs[5]["pull"] > 0
    assert sentences.STRATEGY_STORES.format(strategy="l2", size="0.0 kB") in process.stdout
    assert re.search(r"I-AUROC +autoencoder +[01]\.\d+", process.stdout)


def test_method_that_uses_every_optional_part(home):
    """Growth by objects, optimiser, progress, statistics, frozen and arranged arrays, errors of held-out images."""
    offset = np.linspace(-1, 1, 192, dtype=np.float32)
    np.save(home / "offset.npy", offset)
    keys = ARRAYS | {"method": "everything", "modality": "rgb", "continual.strategy": "finetune"}
    keys |= {"train.epochs": 40, "train.schedule": "step", "train.learning_rate": 0.1}
    process = run(home, "main", "--config=configs/quickstart.py:1-1", "--workdir=all", *as_flags(keys))
    assert process.returncode == 0, process.stderr
    snapshots = {step: snapshot(home / "all", step) for step in (0, 1)}
    first, second = (progress.variables["everything"] for progress in snapshots.values())
    assert [first["params"]["mean"].shape, second["params"]["mean"].shape] == [(1, 192), (2, 192)]
    np.testing.assert_array_equal(first["params"]["mean"][0], second["params"]["mean"][0])
    assert second["statistics"]["done"] == pytest.approx(79 / 80)  # progress at the last of 80 updates
    assert "frozen" not in second
    assert "centres" not in second
    assert snapshots[1].scales["everything"]["rgb"].quantile.tolist() == pytest.approx([3, 4])
    assert len(snapshots[1].frozen["everything"]) == 64
    epochs = [event for event in read(home / "all" / "ledger.jsonl") if event["event"] == "epoch"]
    assert epochs[79]["squares"] < 0.7 * epochs[40]["squares"]
    assert epochs[39]["update_norm"] < 0.1 * epochs[0]["update_norm"]  # the optimiser uses the progress
    assert run(home, "evaluate", "--workdir=all").returncode == 0
    np.save(home / "offset.npy", offset + 1)
    process = run(home, "evaluate", "--workdir=all", "--output=other")
    assert process.returncode == 2
    assert sentences.FROZEN_DIFFERS.format("everything") in process.stderr
