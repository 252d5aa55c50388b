"""Degraded and varied copies of samples."""

import dataclasses

import numpy as np
import pytest

from iumad_jax.data.degradation import FAULTS, degrade, vary
from iumad_jax.data.sample import Camera, Sample

HEIGHT = 0.008  # object height in metres


@pytest.fixture
def sample():
    """Make a photograph, half grey and half fine stripes, and the depth of a plane with a hole."""
    rgb = np.full((64, 96, 3), 120, np.uint8)
    rgb[:, 48::2] = (180, 60, 30)
    depth = np.full((64, 96), 1.5, np.float32)
    depth[:8, :8] = np.nan
    depth[8:16, :8] = 0
    return Sample("bolt", "1", "good", rgb, depth, None, False, Camera(100, 100, 31, 23))


def test_the_first_copies_have_different_faults(sample):
    compressed, noisy, blurred, exposed = (degrade(sample, number, HEIGHT).rgb.astype(float) for number in range(4))
    assert len(FAULTS) == 4
    before = sample.rgb.astype(float)
    grey = np.s_[4:-4, 4:40]
    assert np.abs(compressed[grey] - 120).max() <= 2  # JPEG keeps an even area and smears colours elsewhere
    assert np.abs(compressed - before)[:, 56:].mean() > 3
    assert 1 <= noisy[grey].std() <= 5.1
    assert abs(noisy[grey].mean() - 120) < 0.5
    np.testing.assert_array_equal(blurred[grey], 120)
    assert blurred[:, 56:-8].std() < 0.9 * before[:, 56:-8].std()
    gain = exposed[grey].mean() / 120
    assert 0.8 <= gain <= 1.2
    np.testing.assert_allclose(exposed, (before * gain).clip(0, 255), atol=1.5)


@pytest.mark.parametrize("number", range(8))
def test_depth_gets_noise_and_keeps_its_holes(sample, number):
    noise = degrade(sample, number, HEIGHT).depth - 1.5
    assert np.isnan(noise[:16, :8]).all()
    assert 0 < np.nanstd(noise) <= 1.05 * HEIGHT / 40
    assert abs(np.nanmean(noise)) < HEIGHT / 400


def test_a_copy_depends_only_on_its_number(sample):
    first, again, other = (degrade(sample, number, HEIGHT) for number in (3, 3, 7))
    np.testing.assert_array_equal(first.rgb, again.rgb)
    np.testing.assert_array_equal(first.depth, again.depth)
    assert (first.rgb != other.rgb).any()  # the same fault with another strength


def test_a_photograph_without_depth(sample):
    worse = degrade(Sample("bolt", "1", "good", sample.rgb, None, None, False, None), 1, HEIGHT)
    assert worse.depth is None
    assert (worse.rgb != sample.rgb).any()


@pytest.mark.parametrize("number", range(6))
def test_a_varied_sample_and_its_camera_are_shifted(sample, number):
    """A point of the scene falls on another pixel, but on the same ray of the shifted camera."""
    ramp = np.add.outer(np.arange(64.0), 100 * np.arange(96.0)).astype(np.float32) + 1
    sample = dataclasses.replace(sample, depth=ramp, mask=ramp > 5000, camera=Camera(100, 100, 47.5, 31.5))
    moved = vary(sample, number, HEIGHT)
    value = ramp[20, 30]
    row, column = np.unravel_index(np.abs(moved.depth - value).argmin(), ramp.shape)
    assert (column - moved.camera.cx, row - moved.camera.cy) == (30 - 47.5, 20 - 31.5)
    assert abs(row - 20) <= 2
    assert abs(column - 30) <= 3
    worse = degrade(sample, number, HEIGHT)
    height, width = 60 - abs(row - 20), 90 - abs(column - 30)
    np.testing.assert_array_equal(
        moved.rgb[max(row - 20, 0) :, max(column - 30, 0) :][:height, :width],
        worse.rgb[max(20 - row, 0) :, max(30 - column, 0) :][:height, :width],
    )


def test_varied_samples_move_in_all_directions(sample):
    sample = dataclasses.replace(sample, camera=Camera(100, 100, 0, 0))
    cameras = [vary(sample, number, HEIGHT).camera for number in range(20)]
    assert {np.sign(camera.cx) for camera in cameras} >= {-1, 1}
    assert {np.sign(camera.cy) for camera in cameras} >= {-1, 1}
