"""The README's own method, dataset and strategy, added to a copy of the package as it says, make a run together."""

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

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (file|line) (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a changed copy of the package, and small images of two objects."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "iumad_jax", home / "iumad_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", home / "configs")
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for kind, _, _ in blocks] == ["file", "line"] * 3
    for (_, file, content), (_, room, line) in zip(blocks[::2], blocks[1::2], strict=True):
        assert len(content.splitlines()) < 30
        assert not (home / file).exists()
        (home / file).write_text(content)
        (name,) = re.findall(r"^(?:def|class) (\w+)(?!.*nn\.Module)", content, re.MULTILINE)
        before = (home / room).read_text()
        imported = before.replace("\n\n", f"\n\nfrom {file[:-3].replace('/', '.')} import {name}\n", 1)
        after = re.sub(r"(    (?:\w+ =|return) \{\n)", rf"\1{line}", imported, count=1)
        assert len(after.splitlines()) == len(before.splitlines()) + 2
        (home / room).write_text(after)
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


def test_the_readmes_method_dataset_and_strategy(home):
    values = {
        "dataset.name": "arrays",
        "dataset.root": "arrays",
        "method": "autoencoder",
        "continual.strategy": "l2",
        "input.size": 64,
        "backbone.grid": 4,
        "model.width": 16,
        "train.epochs": 3,
        "train.batch_size": 2,
    }
    flags = ["--config=configs/quickstart.py:1-1", "--workdir=run", *(f"--config.{k}={v}" for k, v in values.items())]
    done = subprocess.run(
        [sys.executable, "-m", "iumad_jax.main", *flags],
        cwd=home,
        env=os.environ | {"PYTHONPATH": f"{home}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    epochs = [event for event in read(home / "run" / "ledger.jsonl") if event["event"] == "epoch"]
    assert [set(event) - {"event", "step", "epoch"} for event in epochs] == [
        *[{"loss", "error", "gradient_norm", "update_norm"}] * 3,
        *[{"loss", "error", "gradient_norm", "update_norm", "pull"}] * 3,
    ]
    assert epochs[2]["error"] < epochs[0]["error"]
    assert epochs[5]["pull"] > 0
    assert "Strategy l2 keeps 0.0 kB per object" in done.stdout
    assert re.search(r"I-AUROC +autoencoder +[01]\.\d+", done.stdout)
