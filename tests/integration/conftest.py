"""Shared parts of the tests of whole runs: the smallest model and quick compilation."""

import importlib
import shutil
import sys

import pytest
from filelock import FileLock

SMALL = {  # changes to `config.small` that make the model as small as possible
    "input.size": 64,
    "backbone.grid": 8,  # the smallest grid that uniad supports
    "model.width": 8,
    "model.hidden": 8,
    "model.heads": 2,
    "model.states": 2,
    "destseg.student_width": 2,
    "destseg.segmentation_width": 4,
    "diffusion.latent": 4,
    "diffusion.channels": "8,16",
    "diffusion.attending": "",
    "diffusion.heads": 2,
    "diffusion.groups": 4,
    "diffusion.steps": 2,
    "diffusion.masked.layers": 1,
    "diffusion.masked.hidden": 8,
    "train.epochs": 2,
    "train.batch_size": 2,
    "report.pictures_per_object": 1,
}


def as_flags(keys):
    """Return the config keys as flags of a command."""
    return [f"--config.{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module", autouse=True)
def quick_processes(processes_compile_quickly):
    """Let the processes that tests start compile quickly."""


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared, candies):
    """Create a folder with candies and a workdir `run` that learned two of three objects; some modules override it.

    The run is trained once, and every module has a copy.
    """
    from tests.integration.trained import train

    trained = shared / "trained"
    with FileLock(f"{trained}.lock"):
        if not trained.exists():
            train(tmp_path_factory.mktemp("trained"), candies).rename(trained)
    return shutil.copytree(trained, tmp_path_factory.mktemp("home"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def detector(home):
    from iumad_jax import Detector

    return Detector.load(home / "run")


@pytest.fixture(scope="module")
def reader(home):
    from tests.integration.trained import open_reader

    return open_reader(home)


@pytest.fixture
def command(home, capsys, monkeypatch):
    """Run a command in this process, which is faster, and return its exit code, standard output and standard error."""
    monkeypatch.chdir(home)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", arguments := ["command", *flags])  # ml_collections reads the keys from here
        module = importlib.import_module(f"iumad_jax.{'export.__main__' if name == 'export' else name}")
        code = module.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
