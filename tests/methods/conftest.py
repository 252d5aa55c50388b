"""Fixture of the methods tests."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(compile_quickly):
    """Compile without optimisation, since these networks take longer to compile than to run."""
