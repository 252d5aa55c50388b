"""Settings and fixtures shared by all tests."""

import os
from pathlib import Path

# On 2 cores and jax <= 0.11, steps over emulated devices deadlock unless this is set before jax is imported.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def eyecandies_root() -> Path:
    """The real Eyecandies samples beside the project, read where they lie."""
    root = Path(__file__).parents[2] / "shared" / "data" / "eyecandies"
    if not (root / "CandyCane").is_dir():
        pytest.skip("the real Eyecandies samples are not at ../shared/data/eyecandies")
    return root
