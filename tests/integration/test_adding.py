"""The README's own files, added to a copy of the package as it says, train and are evaluated."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iumad_jax.data.candies import render
from iumad_jax.report.ledger import read

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (file|line) (\S+) -->\n```python\n(.*?)```\n", re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a changed copy of the package, and small images of two objects."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "iumad_jax", home / "iumad_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", home / "configs")
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [kind for kind, _, _ in blocks] == ["file", "line"] * 2
    for (_, file, content), (_, room, line) in zip(blocks[::2], blocks[1::2], strict=True):
        assert len(content.splitlines()) < 30
        assert not (home / file).exists()
        (home / file).write_text(content)
        name = Path(file).stem
        before = (home / room).read_text()
        imported = before.replace("\n\n", f"\n\nfrom {file[:-3].replace('/', '.')} import {name}\n", 1)
        after = re.sub(r"(    \w+ = \{\n)", rf"\1{line}", imported, count=1)
        assert len(after.splitlines()) == len(before.splitlines()) + 2
        (home / room).write_text(after)
    render(home / "candies", train=4, val=1, test=4, size=64, objects="CandyCane,GummyBear", progress=False)
    return home


def test_the_readmes_method_and_strategy(home):
    values = {
        "dataset.name": "eyecandies",
        "dataset.root": "candies",
        "dataset.objects": "CandyCane,GummyBear",
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
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": f"{home}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    epochs = [event for event in read(home / "run" / "ledger.jsonl") if event["event"] == "epoch"]
    assert [set(event) - {"event", "step", "epoch"} for event in epochs] == [
        *[{"loss", "error"}] * 3,
        *[{"loss", "error", "pull"}] * 3,
    ]
    assert epochs[2]["error"] < epochs[0]["error"]
    assert epochs[5]["pull"] > 0
    assert "Strategy l2 keeps 0.0 kB per object" in done.stdout
    assert re.search(r"I-AUROC +autoencoder +0\.\d+", done.stdout)
