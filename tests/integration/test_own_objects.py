"""The README's commands for new objects, run in a new folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import sentences
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = re.search(r"<!-- own objects commands -->\n```bash\n(.*?)\n```\n", README, re.DOTALL)[1]
KEYS = SMALL | {
    "method": "memory_bank",
    "backbone.grid": 4,
    "memory_bank.megabytes": 0.05,
    "memory_bank.neighbourhood": 3,
}


def write(folder: Path, name: str, mask: bool = False) -> None:
    """Save images of a block on a tilted plane half a metre away; with a mask, the block has a dent."""
    columns, rows = np.meshgrid(np.arange(96), np.arange(72))
    block, dent = (np.maximum(abs(columns - 48), abs(rows - 36)) < reach for reach in (20, 6))
    levels = 500 + rows / 4 - 30 * block + 15 * (dent & mask)
    rgb = np.random.default_rng(len(name)).integers(0, 256, (72, 96, 3))
    images = {"rgb": rgb.astype(np.uint8), "depth": levels.astype(np.uint16)}
    if mask:
        images["mask"] = 255 * dent.astype(np.uint8)
    for kind, image in images.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / kind / f"{name}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Create RGB and depth images of bolts and nuts; only nuts have test images."""
    home = tmp_path_factory.mktemp("home")
    for name in ("1", "22", "333"):
        write(home / "bolts", name)
        write(home / "objects/nut/train/good", name)
        write(home / "objects/nut/test/good", name)
        write(home / "objects/nut/test/dent", name, mask=True)
    (home / "bolts/rgb").rename(home / "photographs")
    (home / "bolts/depth").rename(home / "measurements")
    return home


def test_commands_of_the_readme_make_a_run(home):
    """Bolts are learned first and have no test images: their scores are undefined, those of nuts are not."""
    flags = "".join(f" --config.{key}={value}" for key, value in KEYS.items())
    process = subprocess.run(
        COMMANDS.replace("python", sys.executable) + flags + " --workdir=run",
        shell=True,
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((home / "run/results.json").read_text())
    assert results["objects"] == ["bolt", "nut"]
    scores = np.array(results["matrix"]["i_auroc"], float)
    assert np.isnan(scores[:, 0]).all()
    assert 0 <= scores[1, 1] <= 1
    assert 0 <= results["summary"]["p_auroc_object"]["final"] <= 1
    assert (home / "run/pictures/step1_nut.jpg").exists()


def test_evaluation_skips_objects_without_test_images_like_the_run(home):
    command = [sys.executable, "-m", "iumad_jax.evaluate", "--workdir=run", "--output=again"]
    process = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results, evaluation = (json.loads((home / folder / "results.json").read_text()) for folder in ("run", "again"))
    for metric, matrix in results["matrix"].items():
        assert evaluation["matrix"][metric] == [matrix[-1]]
    assert evaluation["decisions"][0]["objects"] == results["decisions"][-1]["objects"]
    assert "test" not in evaluation["decisions"][0]["objects"]["bolt"]


def test_choose_needs_good_images_that_were_not_learned(home):
    command = [sys.executable, "-m", "iumad_jax.choose", "--workdir=run"]
    process = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert sentences.NO_CALIBRATION_IMAGES.format("bolt") in process.stderr


def test_an_exported_memory_bank_computes_the_same_maps(home):
    """The command compares them; the ending tells the format."""
    command = [sys.executable, "-m", "iumad_jax.export", "--workdir=run", "--output=bank.onnx", "--batch=2"]
    process = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(re.search(r"at most (\S+) of", process.stdout)[1]) < 1e-5
    assert json.loads((home / "bank.onnx.json").read_text())["format"] == "onnx"
