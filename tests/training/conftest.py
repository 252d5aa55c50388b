"""Tests that compile quickly."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """Networks this small take longer to compile than to run."""
