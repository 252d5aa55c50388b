"""A run that learned two of three small objects, for tests of commands that use a trained model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from iumad_jax.data.readers.eyecandies import Eyecandies
from tests.integration.conftest import SMALL, as_flags

LEARNED, NEVER_LEARNED = ("CandyCane", "GummyBear"), "Lollipop"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
KEYS = SMALL | {
    "baselines": "gaussian,memory_bank",
    "dataset.name": "eyecandies",
    "dataset.root": "candies",
    "dataset.objects": ",".join(LEARNED),
    "dataset.prepared": "prepared",
    "backbone.grid": 4,
    "model.hidden": 16,
}


def train(home, candies, **changes):
    """Fill a folder with candies and learn two of the three objects in its workdir `run`, with changed keys."""
    candies(home / "candies", ",".join([*LEARNED, NEVER_LEARNED]), train=8, val=3, test=4)
    code, _, err = in_process(home, "main", f"--config={QUICKSTART}:1-1", "--workdir=run", *as_flags(KEYS | changes))
    assert code == 0, err
    return home


def open_reader(home):
    return Eyecandies(home / "candies", ",".join([*LEARNED, NEVER_LEARNED]))


def in_process(home, name, *flags):
    """Run a command as a process and return its exit code, standard output and standard error."""
    module = [sys.executable, "-m", f"iumad_jax.{name}"]
    process = subprocess.run([*module, *flags], cwd=home, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def samples(reader, object_, split="test"):
    return [reader.read(object_, split, id_) for id_ in reader.ids(object_, split)]


def stacked(samples):
    return np.stack([sample.rgb for sample in samples]), np.stack([sample.depth for sample in samples])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())
