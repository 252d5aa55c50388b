"""Error maps against loops written from their definition."""

import numpy as np
import pytest

from iumad_jax.methods.error_maps import norm
from tests.methods.reference import map_from


def interpolate(grid, size):
    """Interpolate bilinearly. The corners of the grid are the corners of the map."""
    n = len(grid)
    out = np.zeros((size, size))
    for i, j in np.ndindex(size, size):
        y, x = i * (n - 1) / (size - 1), j * (n - 1) / (size - 1)
        top, left = min(int(y), n - 2), min(int(x), n - 2)
        dy, dx = y - top, x - left
        out[i, j] = (1 - dy) * ((1 - dx) * grid[top, left] + dx * grid[top, left + 1]) + dy * (
            (1 - dx) * grid[top + 1, left] + dx * grid[top + 1, left + 1]
        )
    return out


@pytest.mark.parametrize("side", [14, 5, 28])
def test_maps_are_interpolated_with_aligned_corners(side):
    errors = np.random.default_rng(side).random((2, side * side)).astype(np.float32)
    for error, error_map in zip(errors, map_from(errors), strict=True):
        expected = interpolate(error.reshape(side, side).astype(np.float64), 224)
        np.testing.assert_allclose(error_map, expected, rtol=1e-4, atol=1e-5)


def test_norm_is_euclidean_over_channels():
    errors = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(norm(errors), np.linalg.norm(errors, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(norm(np.zeros((3, 5), np.float32)), np.zeros(3))
