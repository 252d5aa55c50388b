"""Mosaic kernels on a CPU."""

import jax
import pytest
from iumad_kernels.selective_scan import pallas_mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpreted(monkeypatch, capfd):
    """Run the Mosaic kernels on CPU in the interpreter, which also detects races."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the Mosaic interpreter, InterpretGPUParams")
    monkeypatch.setattr(pallas_mosaic, "interpret", plgpu.InterpretGPUParams(detect_races=True))
    yield
    assert "RACE" not in capfd.readouterr().out.upper()  # the interpreter prints the races that it detects
