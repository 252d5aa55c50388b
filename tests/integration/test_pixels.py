"""Runs of DiAD and CDAD in pixels, with a small file of Stable Diffusion."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from iumad_jax import Detector, evaluate, main
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.errors import USER_ERROR, UserError
from iumad_jax.runtime import snapshots
from tests.integration.conftest import SMALL, as_flags
from tests.integration.test_learn import same_snapshots
from tests.integration.trained import QUICKSTART
from tests.methods.test_pixels import MASKED, SETTINGS, config_of, states
from tests.models.stable_diffusion_files import as_safetensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compile_quickly"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]

FILE = "v1-5-pruned.safetensors"
KEYS = SMALL | {f"diffusion.{key}": value for key, value in SETTINGS.items()}
KEYS |= {f"diffusion.masked.{key}": value for key, value in MASKED.items()}
KEYS |= {"dataset.name": "eyecandies", "dataset.root": "candies", "dataset.objects": "CandyCane,GummyBear"}
KEYS |= {
    "diffusion.weights": FILE,
    "modality": "rgb",
    "baselines": "",
    "train.epochs": 1,
    "backbone.grid": 4,
    "report.pictures_per_object": 0,
}


@pytest.fixture
def home(tmp_path, candies, monkeypatch):
    candies(tmp_path / "candies", KEYS["dataset.objects"], train=3, val=2, test=2)
    as_safetensors(tmp_path, states(config_of("diad", "unused")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(home, monkeypatch, capsys):
    """Run in this process, and return its exit code and standard error."""

    def run(*flags, module=main):
        monkeypatch.setattr(sys, "argv", arguments := ["command", "--workdir=run", *flags])  # ml_collections reads it
        return module.main(arguments), capsys.readouterr().err

    return run


def flags_of(method, strategy):
    return [f"--config={QUICKSTART}:1-1", *as_flags(KEYS | {"method": method, "continual.strategy": strategy})]


@pytest.mark.usefixtures("home")
def test_a_run_resumes_and_is_used_with_the_same_file_alone(command):
    flags = flags_of("cdad", "isvd")
    assert command(*flags)[0] == 0
    shutil.copytree("run", "whole")
    results = json.loads(Path("run/results.json").read_bytes())["matrix"]
    progress = snapshots.read(Path("run"))
    assert set(progress.variables["cdad"]) == {"params", "statistics", "by_object"}
    protected = {path[:-1] for path in flatten_dict(progress.strategy_state["layers"]) if path[-1] == "basis"}
    trained = {path[:-1] for path in flatten_dict(progress.variables["cdad"]["params"]) if path[-1] == "kernel"}
    assert protected == trained
    undo()
    assert command(*flags)[0] == 0
    same_snapshots("run", "whole", 1)
    detector = Detector.load("run")
    reader = Eyecandies("candies", "GummyBear")
    image = reader.read("GummyBear", "test", reader.ids("GummyBear", "test")[0]).rgb
    Path(FILE).rename("moved.safetensors")
    with pytest.raises(UserError, match=FILE):
        Detector.load("run")
    moved = Detector.load("run", **{"diffusion.weights": "moved.safetensors"})
    np.testing.assert_array_equal(moved(image).map, detector(image).map)
    new = "--config.diffusion.weights=moved.safetensors"
    assert command("--output=elsewhere", new, module=evaluate) == (0, "")
    assert json.loads(Path("elsewhere/results.json").read_bytes())["matrix"]["i_auroc"][-1] == results["i_auroc"][-1]
    assert command(*flags, "--config.backbone.weights=random")[0] == USER_ERROR  # other ones, which it does not keep
    assert command(*flags, new)[0] == 0  # which keeps where the file is
    np.testing.assert_array_equal(Detector.load("run")(image).map, moved(image).map)
    shutil.copy("moved.safetensors", FILE)
    assert command(*flags)[0] == 0
    other = {name: np.asarray(value + 1) for name, value in safetensors.numpy.load_file("moved.safetensors").items()}
    safetensors.numpy.save_file(other, FILE)
    expected = "the frozen arrays of cdad are not those that this run was trained with"
    with pytest.raises(UserError, match=expected):
        Detector.load("run")
    undo()
    code, error = command(*flags)
    assert code == USER_ERROR
    assert expected in error


def undo():
    """Remove the last step of the run."""
    shutil.rmtree("run/snapshots/1")
    Path("run/results.json").unlink()


@pytest.mark.usefixtures("home")
def test_a_file_of_another_model_is_refused_in_a_sentence(command):
    """Stable Diffusion 2 differs in the width of its text encoder."""
    code, error = command(*flags_of("diad", "finetune"), "--config.diffusion.context=128")
    assert code == USER_ERROR
    tensor = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert error == (
        f"iumad_jax: weights file {FILE}: tensor '{tensor}' of the unet should have shape (8, 128) and is (8, 64); use"
        " weights of Stable Diffusion 1.5.\n"
    )
    assert not Path("run").exists()
