"""What tests of whole runs share: the smallest model, and how to compile it quickly."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id):
    """Where all tests of whole runs keep what they have compiled: most of them train the same small model."""
    folder = tmp_path_factory.getbasetemp()
    return (folder if worker_id == "master" else folder.parent) / "compiled"


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
def compile_quickly(compiled):
    """This process does the same."""
    settings = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(compiled), None),
        "jax_persistent_cache_min_compile_time_secs": (0.1, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (0, 0),
    }
    for name, (here, _) in settings.items():
        jax.config.update(name, here)
    yield
    for name, (_, default) in settings.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()
