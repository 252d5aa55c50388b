"""The API documentation of every module, rendered by pdoc."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_docstrings_render_without_warnings(tmp_path):
    command = [sys.executable, "-m", "pdoc", "-d", "google", "-o", tmp_path, "iumad_jax", "iumad_kernels"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warn" not in rendered.stderr
    detector = (tmp_path / "iumad_jax" / "inference" / "detector.html").read_text()
    assert "Detector.load" in detector
