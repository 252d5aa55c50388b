"""Pixels of depth files without a measurement, in all the words that sensors have for it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iumad_jax import errors
from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.sample import DepthFormat

SENTINELS = {
    "0": (0, np.float32, 1.0),
    "65535 of uint16": (65535, np.uint16, 1e-5),  # 0.66 m, not far from the scene
    "65535 of tenths of mm": (65535, np.uint16, 1e-4),
    "65535 of mm in 32 bits": (65535, np.int32, 1e-3),
    "65535 converted to metres": (6.5535, np.float32, 1.0),
    "4095 of a 12-bit sensor": (4095, np.int32, 1e-3),
    "32767 of int16": (32767, np.int16, 2e-5),
    "-32768 of int16": (-32768, np.int16, 2e-5),
    "-1": (-1, np.float32, 1e-3),
    "-9999": (-9999, np.float64, 1.0),
    "9999 mm": (9999, np.float32, 1e-3),
    "the largest float": (np.finfo(np.float32).max, np.float32, 1.0),
    "minus infinity": (-np.inf, np.float16, 1.0),
}


@pytest.mark.parametrize(("value", "dtype", "unit"), SENTINELS.values(), ids=SENTINELS)
def test_missing_depth_in_other_words(tmp_path: Path, scan, capsys, monkeypatch, value, dtype, unit) -> None:
    """Exactly the pixels with such a value are missing, and one sentence tells all but the usual ones once."""
    monkeypatch.setattr(errors, "_told", set())
    z = scan(holes=0, seed=8).cloud[..., 2]
    hole = np.random.default_rng(0).random(z.shape) < 0.1
    np.save(tmp_path / "000.npy", np.where(hole, value, z / unit).astype(dtype))
    for _ in range(2):
        measured, _ = read_depth(tmp_path / "000.npy", DepthFormat(unit), z.shape, "")
        np.testing.assert_array_equal(np.isnan(measured), hole)
    told = capsys.readouterr().err
    assert told.count("count as missing") == (np.isfinite(value) and value != 0)
    assert told.count(f"{hole.mean():.2%} of its pixels hold {value:g}, ") == told.count("\n")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_measurements_are_not_taken_for_missing(tmp_path: Path, draw: st.DataObject) -> None:
    """Neither a background that is one constant nor single steps of a scene within twice the nearest depth."""
    nearest = draw.draw(st.floats(0.02, 5))
    heights = draw.draw(st.lists(st.floats(0, 0.99), min_size=1, max_size=6))
    z = nearest * (1 + np.array(heights)[np.random.default_rng(len(heights)).integers(len(heights), size=(24, 32))])
    np.save(tmp_path / "000.npy", z)
    measured, _ = read_depth(tmp_path / "000.npy", DepthFormat(), z.shape, "")
    np.testing.assert_array_equal(measured, z.astype(np.float32))
