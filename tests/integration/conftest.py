"""What tests of whole runs share: the smallest model, and how to compile it quickly."""

import pytest

SMALL = {  # keys of a config, upon `config.small`, that a test changes where it looks at something else
    "input.size": 64,
    "backbone.grid": 8,  # the smallest that uniad can do with
    "model.width": 8,
    "model.hidden": 8,
    "model.heads": 2,
    "model.states": 2,
    "train.epochs": 2,
    "train.batch_size": 2,
    "report.pictures_per_object": 1,
}


def as_flags(keys):
    """The same on a command line."""
    return [f"--config.{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module", autouse=True)
def processes_compile_quickly(compiled):
    """Processes that tests start compile without optimisation, and once for all of them."""
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with candies, and a workdir `run` that learned two of three objects; some modules have their own."""
    from tests.integration.trained import train

    return train(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def detector(home):
    from iumad_jax import Detector

    return Detector.load(home / "run")


@pytest.fixture(scope="module")
def reader(home):
    from tests.integration.trained import open_reader

    return open_reader(home)
