"""What tests of whole runs share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def compile_quickly(tmp_path_factory):
    """Without optimisation, and once for all runs of a module."""
    settings = {
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("cache")), None),
        "jax_persistent_cache_min_compile_time_secs": (0.1, 1.0),
    }
    for name, (here, _) in settings.items():
        jax.config.update(name, here)
    yield
    for name, (_, default) in settings.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()
