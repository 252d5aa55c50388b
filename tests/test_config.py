"""Every config in configs/: public keys, the paper's values, and acceptance by all parts."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from iumad_jax import continual, methods, protocol
from iumad_jax.benchmark import cells
from iumad_jax.config import check, paper
from iumad_jax.data.readers.eyecandies import OBJECTS
from iumad_jax.errors import UserError
from iumad_jax.training.optimization import learning_rates, make_optimizer
from tests import sentences

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
PUBLIC = (
    "dataset.name",
    "dataset.root",
    "dataset.objects",
    "modality",
    "protocol",
    "method",
    "train.epochs",
    "train.batch_size",
    "seed",
    "continual.strategy",
)


def load(file):
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(config, prefix=""):
    keys = {}
    for key, value in config.items():
        keys |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return keys


def test_configs_exist():
    assert {"quickstart", "eyecandies"} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_can_be_run(file):
    """The docstring has its command, its keys are those of all configs, and all parts accept its values."""
    module = load(file)
    command = r"python -m (iumad_jax\.(main|benchmark)|tests\.harness\.survival)"
    assert re.search(rf"{command} --config={file.stem}\b", module.__doc__)
    config = module.get_config()
    if "benchmark" in config:  # describes the differences between cells
        del config.benchmark
    assert set(PUBLIC) <= set(flat(config))
    types = {key: type(value) for key, value in flat(paper("10-0")).items()}
    assert {key: type(value) for key, value in flat(config).items()} == types
    assert protocol.steps(config.protocol, OBJECTS)
    config.diffusion.space = "features"  # pixels need files of the user
    for name in (config.method, "feature_norm", "memory_bank"):
        methods.build(name, config)
    learning_rates(config.train, 10)
    make_optimizer(config.train)
    continual.build(config, methods.build(config.method, config))
    assert module.get_config("1-1").protocol == "1-1"


def test_the_papers_values():
    config = flat(load(next(file for file in CONFIGS if file.stem == "eyecandies")).get_config("6-1"))
    assert config["protocol"] == "6-1"
    expected = {
        "method": "ib_iumad",
        "modality": "rgb+depth",
        "input.size": 224,
        "backbone.grid": 14,
        "dataset.light": "4",
        "train.epochs": 800,
        "train.batch_size": 24,
        "train.learning_rate": 1e-4,
        "train.weight_decay": 1e-4,
        "train.clip_norm": 0.1,
        "train.schedule": "step",
        "train.drop_epoch": 800,
        "model.width": 256,
        "model.layers": 4,
    }
    assert {key: config[key] for key in expected} == expected


def test_every_key_is_used():
    """A key that no code reads has no effect."""
    package = Path(__file__).parents[1] / "iumad_jax"
    code = "".join(file.read_text() for file in package.rglob("*.py") if file.name != "config.py")
    groups = {"dataset.render", "backbone"}  # passed on with all their keys
    for key in flat(paper("10-0")):
        name = key.rsplit(".", 1)[-1]
        assert re.search(rf"\.{name}\b", code) or any(key.startswith(part) for part in groups), key


@pytest.mark.parametrize("key", ["floors", "train.momentum", "dataset.render.light"])
def test_an_unknown_key_is_refused(key):
    """It may be a key of an older version that a config file still sets."""
    config = paper("10-0")
    set_key(config, key)
    with pytest.raises(UserError, match=re.escape(sentences.NOT_A_KEY.format(key))):
        check(config)


@pytest.mark.parametrize("key", ["baselines", "train.epochs", "dataset.render.seed"])
def test_a_missing_key_is_refused(key):
    config = paper("10-0")
    *groups, name = key.split(".")
    group = config
    for part in groups:
        group = group[part]
    del group[name]
    with pytest.raises(UserError, match=re.escape(sentences.KEY_MISSING.format(key))):
        check(config)


def test_a_key_without_a_value_is_refused():
    config = paper("10-0")
    config.baselines = None
    with pytest.raises(UserError, match=re.escape(sentences.KEY_MISSING.format("baselines"))):
        check(config)


def set_key(config, key):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = "x"


def test_variants_that_converge_slowly_train_for_a_multiple_of_the_epochs():
    config = load(next(file for file in CONFIGS if file.stem == "benchmark")).get_config()
    config.train.epochs = 7
    config.benchmark.update(
        {"variants": "uniad,simplenet-replay,destseg,diad", "modalities": "rgb", "protocols": "10-0", "seeds": 1}
    )
    assert [cell.train.epochs for cell, _ in cells(config)] == [7, 28, 14, 21]
    assert config.train.epochs == 7


def test_a_benchmark_with_keys_of_an_older_version_is_refused():
    config = load(next(file for file in CONFIGS if file.stem == "benchmark")).get_config()
    check(config)
    config.benchmark.systems = "uniad"
    with pytest.raises(UserError, match=sentences.WRONG_BENCHMARK_KEYS.format(found=".*systems.*", known=".*variants")):
        list(cells(config))
