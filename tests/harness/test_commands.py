"""The measuring commands of this folder and iumad_jax.latency, each at its smallest size."""

import re
import sys

import jax
import numpy as np
import pytest

from iumad_jax import experiment, latency, methods
from iumad_jax.config import small
from iumad_jax.export import timing
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.shapes import Batch
from tests import sentences
from tests.harness import growth, input_pipeline, metrics, saving, scaling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("compile_quickly", "processes_compile_quickly"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections reads a config
]
KEYS = {
    "method": "uniad",
    "modality": "rgb",
    "baselines": "",
    "dataset.name": "eyecandies",
    "dataset.objects": "CandyCane",
    "input.size": 64,
    "backbone.grid": 8,
    "model.width": 8,
    "model.hidden": 8,
    "model.heads": 2,
    "train.epochs": 0,
    "train.batch_size": 2,
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory, compile_quickly, candies):
    """Return the flags of the smallest config: --config=FILE and its keys."""
    folder = tmp_path_factory.mktemp("harness")
    root = candies(folder / "candies", "CandyCane", train=5, val=1, test=2)
    config = folder / "config.py"
    config.write_text(
        "from iumad_jax.config import small\n\n\ndef get_config(protocol='1-0'):\n    return small(protocol)\n"
    )
    keys = KEYS | {"dataset.root": str(root)}
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in keys.items())]


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command's main and return its output."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])  # ml_collections reads --config.KEY from here
        assert main(sys.argv) == 0
        return capfd.readouterr().out

    return run


def test_growth(flags, run):
    out = run(growth.main, *flags, "--objects=1,2")
    assert sentences.GROWTH_OF_OBJECTS.format(2) in out
    assert re.search(sentences.GROWTH_OF_WEIGHTS.format(system="uniad", number=r"[\d.]+"), out, re.MULTILINE)


def test_weights_of_all_steps():
    """With all heads, they are as large as those of a method that learns object after object."""
    config = small("1-0")
    config.update_from_flattened_dict(KEYS | {"method": "ib_iumad", "model.patch_size": 16, "model.states": 2})
    method = methods.build(config.method, config)
    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)
    image = np.zeros((1, 64, 64, 3), np.float32)
    features = jax.eval_shape(extractor.init_with_output, jax.random.key(0), image)[0]
    tokens = np.zeros((1, 8**2, features.shape[-1]), np.float32)
    batch = Batch({"rgb": tokens}, {"rgb": image}, np.zeros(1, np.int32))
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    steps = []
    for objects in range(1, 18):
        variables = method.grow(variables, objects, jax.random.key(0))
        steps.append(sum(array.nbytes for array in jax.tree.leaves(variables)))
    sizes = growth._sizes(config, 17, 1, 1)
    assert sizes["weights of ib_iumad"] == steps[-1] > steps[0]
    assert sizes["all snapshots, of the weights"] == sum(steps)


def test_devices(flags, run):
    out = run(scaling.main, *flags, "--devices=1", "--seconds=0")
    assert re.search(r"^\| cpu +\| +1 \| +[\d.]+ \| +[\d.]+ \| +1\.000 \|$", out, re.MULTILINE)


def test_saving(flags, run):
    out = run(saving.main, *flags, "--updates=1", "--rounds=1")
    assert re.search(sentences.SAVING_COPIES.format(number=r"[\d.]+"), out, re.MULTILINE)


def test_metrics(monkeypatch, run):
    monkeypatch.setattr(metrics, "_IMAGES", (5,))
    out = run(metrics.main)
    assert out.startswith(sentences.EVALUATION_OF_MAPS.format(5))
    (difference,) = re.findall(sentences.DIFFERENCE_FROM_OTHERS.format(r"(\S+)"), out, re.MULTILINE)
    assert float(difference) < 1e-6


def test_input(flags, monkeypatch, run):
    for name, value in {"_SECONDS": 0.0, "_ROUNDS": 1, "_EPOCH": 20, "_BATCH": 2}.items():
        monkeypatch.setattr(input_pipeline, name, value)
    out = run(input_pipeline.main, *flags, "--epochs=1")
    assert out.startswith(sentences.INPUT_OF_IMAGES.format(count=5, object="CandyCane", modality="rgb"))
    assert sentences.INPUT_OPENED in out


def test_latency(flags, tmp_path, monkeypatch, run):
    monkeypatch.setattr(timing, "_BATCHES", (1,))
    config = small("1-0")
    config.update_from_flattened_dict(KEYS | {"dataset.root": flags[-1].partition("=")[2]})
    experiment.run(config, tmp_path)
    out = run(latency.main, f"--workdir={tmp_path}", "--repetitions=1")
    assert re.search(sentences.LATENCY_ON.format(device="cpu", number=r"[\d.]+"), out, re.MULTILINE)
