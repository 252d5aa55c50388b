"""Runs that are killed, stopped, damaged or out of disk space at random moments end like an uninterrupted run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "survival.py"
QUICK = {  # a method and a baseline that are traced quickly
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "method": "uniad",
    "baselines": "feature_norm",
    "backbone.grid": 8,
    "continual.strategy": "replay",
    "continual.replay.rank": 2,
    "continual.replay.image_size": 8,
    "train.epochs": 4,
}
FAULTS = {"kills": 4, "preemptions": 1, "damages": 1, "full_disks": 1}


def test_interrupted_runs_end_like_an_uninterrupted_run(tmp_path, candies):
    candies(tmp_path / "candies", "CandyCane,GummyBear", train=6, val=1, test=4)
    flags = [f"--{name}={count}" for name, count in FAULTS.items()]
    flags += [f"--config.{key}={value}" for key, value in QUICK.items()]
    command = [sys.executable, "-m", "tests.harness.survival", f"--config={CONFIG}", *flags]
    process = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CONFIG.parents[1])}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in process.stdout.splitlines()[2:]]
    assert sum(int(tried) for _, _, tried, _ in rows) == sum(FAULTS.values())
    assert sum(int(tried) for fault, _, tried, _ in rows if fault == "SIGKILL") == 4
    assert all(tried == survived for _, _, tried, survived in rows)
