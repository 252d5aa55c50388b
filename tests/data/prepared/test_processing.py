"""Processing of samples with official normals, and with or without masks."""

import dataclasses

import numpy as np
import pytest

from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.sample import Sample
from iumad_jax.errors import UserError
from tests import sentences


def processing(encoding: str, window: int = 3) -> Processing:
    return Processing(("depth",), 32, encoding, height_range=0.1, object_height=0.005, normals_window=window)


@pytest.fixture
def sample(scan) -> Sample:
    """Make a ball on a plane; the official normals are exact on the plane and point to the camera on the ball."""
    scene = scan(96, 128, noise=1e-3)
    z = scene.cloud[..., 2]
    normals = np.where(scene.mask[..., None] > 0, [0, 0, -1], scene.normal).astype(np.float32)
    depth = np.where(z == 0, np.nan, z).astype(np.float32)
    return Sample("bolt", "7", "good", scene.rgb, depth, scene.mask > 0, False, scene.camera, normals)


def test_official_normals_replace_those_from_depth(sample: Sample) -> None:
    noisy, official = (processing(name)(sample)["images_depth"] for name in ("normals", "normals_official"))
    corner = np.s_[:6, :6]
    up = [127.5, 127.5, 255]
    assert np.abs(official[corner] - up).max() < 4  # the plane is fitted to noisy depth
    assert np.abs(noisy[corner] - up).max() > 10
    tilt = np.degrees(np.arccos(official[16, 16, 2] / 127.5 - 1))
    assert tilt == pytest.approx(20, abs=2)
    with pytest.raises(UserError, match=sentences.NORMALS_MISSING.format("bolt 7")):
        processing("normals_official")(dataclasses.replace(sample, normals=None))


def test_bits_other_than_those_of_the_run_are_refused(sample: Sample) -> None:
    """Otherwise images of one brightness would be prepared differently."""
    prepare = dataclasses.replace(processing("normals"), bits=12)
    for bits in (12, None):
        prepare(dataclasses.replace(sample, bits=bits))
    with pytest.raises(UserError, match=sentences.OTHER_BITS.format(found=10, expected=12)):
        prepare(dataclasses.replace(sample, bits=10))


def test_a_larger_window_gives_smoother_normals(sample: Sample) -> None:
    smooth, noisy = (processing("normals", window)(sample)["images_depth"].astype(float) for window in (11, 3))
    assert smooth[:6, :6].std(axis=(0, 1)).max() < 0.3 * noisy[:6, :6].std(axis=(0, 1)).max()


@pytest.mark.parametrize(
    ("defect", "marked", "expected"),
    [
        ("good", False, True),
        ("good", True, True),
        ("dent", True, True),
        ("dent", False, False),
        ("unknown", False, False),
    ],
)
def test_masked_is_true_if_the_mask_shows_the_defect(sample: Sample, defect: str, marked: bool, expected: bool) -> None:
    mask = sample.mask if marked else None
    arrays = processing("height")(dataclasses.replace(sample, defect=defect, mask=mask, anomalous=defect == "dent"))
    assert arrays["masked"] == expected
    assert arrays["mask"].any() == marked
