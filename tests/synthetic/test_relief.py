"""Bumps and dents in encoded depth against the same bumps in metric depth."""

import jax
import numpy as np
import pytest

from iumad_jax.data import depth
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError
from iumad_jax.synthetic import relief
from tests import sentences

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZE = 96
HEIGHT_RANGE = 0.02  # metres
PITCH = 0.0005  # metres between pixels
CAMERAS = {
    "orthographic": (Camera(1 / PITCH, 1 / PITCH, 47.5, 47.5, orthographic=True), 0.5),
    "pinhole": (Camera(1000, 1000, 40, 52), 1000 * PITCH),  # the camera and its distance from the plane, metres
}
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)
PROFILE = np.maximum(1 - ((COLUMNS - 40) / 26) ** 2 - ((ROWS - 55) / 18 + (COLUMNS - 40) / 40) ** 2, 0) ** 2
MASK = PROFILE > 0
STEEPEST = np.hypot(*np.gradient(PROFILE)).max()  # per pixel

emboss = jax.jit(relief.emboss, static_argnums=5)


def degrees_between(a, b):
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def decoded(image):
    return np.asarray(image, np.float64) / 127.5 - 1


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_relief_in_encoded_depth_agrees_with_one_in_metres(camera, sign):
    """The plane lies 5 mm below a flat table, so that a dent does not reach the plane."""
    camera, distance = CAMERAS[camera]
    metres = sign * 0.004 * PROFILE
    slope = sign * 0.004 * STEEPEST / PITCH
    border = np.ones((SIZE, SIZE), bool)
    border[8:-8, 8:-8] = False
    flat = np.where(border, distance, distance - 0.005).astype(np.float32)
    deformed = (flat - metres).astype(np.float32)
    before, after = (depth.measure(image, camera) for image in (flat, deformed))
    for encoding in ("normals", "height", "height+normals"):
        image = depth.encode(before, encoding, HEIGHT_RANGE)
        expected = depth.encode(after, encoding, HEIGHT_RANGE)
        result = np.asarray(emboss(image, MASK, PROFILE, slope, sign * 0.004 / HEIGHT_RANGE, encoding))
        np.testing.assert_array_equal(result[~MASK], image[~MASK])
        if encoding == "normals":
            off = degrees_between(decoded(result), decoded(expected))
            np.testing.assert_allclose(np.linalg.norm(decoded(result)[MASK], axis=-1), 1, atol=1e-4)
            assert degrees_between(decoded(image), decoded(expected))[MASK].max() > 15
            assert off[MASK].max() < 2
        else:
            heights = slice(0, 1 if encoding == "height+normals" else 3)
            np.testing.assert_allclose(result[..., heights], expected[..., heights], atol=0.5)
            np.testing.assert_allclose(result[MASK], expected[MASK], atol=127.5 * np.radians(2))


def test_the_steepest_slope_is_as_drawn_on_any_surface_and_a_dent_mirrors_a_bump():
    rng = np.random.default_rng(0)
    lean, around = np.radians(rng.uniform(0, 80, (SIZE, SIZE))), rng.uniform(0, 2 * np.pi, (SIZE, SIZE))
    leaning = np.stack([np.sin(lean) * np.cos(around), np.sin(lean) * np.sin(around), np.cos(lean)], axis=-1)
    upright = np.broadcast_to(np.array([0, 0, 1.0]), leaning.shape)
    for normals in (leaning, upright):
        image = ((normals + 1) * 127.5).astype(np.float32)
        bump, dent = (emboss(image, MASK, PROFILE, sign * 0.7, 0, "normals") for sign in (1.0, -1.0))
        for result in (bump, dent):
            assert degrees_between(decoded(result), normals)[MASK].max() == pytest.approx(
                np.degrees(np.arctan(0.7)), abs=0.05
            )
    np.testing.assert_allclose(decoded(dent), decoded(bump) * [-1, -1, 1], atol=1e-4)


def test_an_empty_mask_changes_nothing():
    image = np.random.default_rng(0).uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    for encoding in ("normals", "height", "height+normals"):
        for profile in (PROFILE, 0 * PROFILE):
            result = emboss(image, np.zeros_like(MASK), profile, 1.0, 0.1, encoding)
            np.testing.assert_array_equal(result, image)


def test_an_encoding_without_visible_relief_is_refused():
    for encoding in depth.ENCODINGS:
        if encoding == "xyz_uint8":
            with pytest.raises(UserError, match=sentences.NO_RELIEF_IN_ENCODING.format(encoding)):
                relief.check_encoding(encoding)
        else:
            relief.check_encoding(encoding)
