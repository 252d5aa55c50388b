"""Resizing against another implementation and examples by hand; dilation against its definition."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iumad_jax.data.transforms import dilate, erode, region, resize_image, resize_mask, resize_nearest


@pytest.mark.parametrize(("shape", "size"), [((37, 50, 3), 16), ((20, 20, 3), 33), ((512, 512, 1), 224)])
def test_images_are_resized_by_an_antialiased_bilinear_filter(shape: tuple[int, ...], size: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    expected = jax.image.resize(image, (size, size, shape[2]), "bilinear", antialias=True)
    resized = resize_image(image, size)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected, atol=1e-2)
    bytes_resized = resize_image(image.astype(np.uint8), size)
    assert bytes_resized.dtype == np.uint8
    channels = [resize_image(image.astype(np.uint8)[..., [c]], size) for c in range(shape[2])]
    np.testing.assert_array_equal(bytes_resized, np.concatenate(channels, -1))
    expected = jax.image.resize(np.floor(image), (size, size, shape[2]), "bilinear", antialias=True)
    np.testing.assert_allclose(bytes_resized, expected, atol=1.01)


def test_nearest_pixel_by_hand() -> None:
    """5 pixels to 2: the new centres lie 1.25 and 3.75 pixels from the edge, in pixels 1 and 3; 2 to 3: 1/3, 1, 5/3."""
    row = np.array([[10, 11, 12, 13, 14]])
    assert resize_nearest(row, 2).tolist() == [[11, 13], [11, 13]]
    column = np.array([[1.0], [np.nan]])
    np.testing.assert_array_equal(resize_nearest(column, 3)[:, 0], [1, np.nan, np.nan])


def test_mask_by_hand() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[1, 3] = 1  # 8 to 4: rows and columns 1, 3, 5, 7 are sampled
    mask[4, 4] = 255
    assert np.argwhere(resize_mask(mask, 4)).tolist() == [[0, 1]]
    assert resize_mask(mask, 8).sum() == 2


def test_no_component_larger_than_the_step_is_lost() -> None:
    """From 512 to 224 pixels the step is 2.29, so that every 3 x 3 square remains visible."""
    for corner in range(0, 509, 7):
        mask = np.zeros((512, 512), bool)
        mask[corner : corner + 3, corner : corner + 3] = True
        assert 1 <= resize_mask(mask, 224).sum() <= 4


@settings(deadline=None, max_examples=25)
@given(arrays(bool, (12, 9)), st.integers(0, 4))
def test_dilation_by_its_definition(mask: np.ndarray, pixels: int) -> None:
    near = np.zeros_like(mask)
    for row, column in np.ndindex(mask.shape):
        distances = [np.hypot(row - r, column - c) for r, c in np.argwhere(mask)]
        near[row, column] = bool(distances) and min(distances) <= pixels
    np.testing.assert_array_equal(dilate(mask, pixels), near)
    np.testing.assert_array_equal(erode(~mask, pixels), ~near)


def test_region_is_the_object_and_its_rim() -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True  # rows 10 to 19 at half the size
    resized = region(mask, 32)
    assert resized.shape == (32, 32)
    assert resized[15].nonzero()[0].tolist() == list(range(7, 23))
    assert resized[:, 15].nonzero()[0].tolist() == list(range(7, 23))
    assert not resized[7, 7]  # diagonally 3 pixels off the corner is farther than 3
