"""The Eyecandies reader on the real samples of CandyCane."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from iumad_jax.data import depth
from iumad_jax.data.readers.eyecandies import Eyecandies


@pytest.fixture(scope="module")
def candy_canes(eyecandies_root: Path) -> Eyecandies:
    return Eyecandies(eyecandies_root, "CandyCane")


def test_real_labels(candy_canes: Eyecandies) -> None:
    assert [len(candy_canes.ids("CandyCane", split)) for split in ("train", "calibration", "test")] == [100, 50, 50]
    samples = [candy_canes.read("CandyCane", "test", id_) for id_ in candy_canes.ids("CandyCane", "test")]
    assert Counter(sample.defect for sample in samples) == {
        "good": 25,
        "bumps": 5,
        "dents": 5,
        "colors": 5,
        "normals": 5,
        "combined": 5,
    }
    shares = [100 * sample.mask.mean() for sample in samples if sample.anomalous]
    assert len(shares) == 25
    assert round(min(shares), 2) == 0.03
    assert round(max(shares), 2) == 0.44
    assert not any(sample.mask.any() for sample in samples if not sample.anomalous)


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_real_depth_lies_on_the_plane_of_the_camera_pose(candy_canes: Eyecandies, split: str) -> None:
    """The belt is the world plane z = 0; depth along the ray or a centre half a pixel off would fail."""
    for id_ in candy_canes.ids("CandyCane", split)[::10]:
        sample = candy_canes.read("CandyCane", split, id_)
        assert np.isfinite(sample.depth).all()
        pose = np.loadtxt(candy_canes.files("CandyCane", split, id_)[0].with_name(f"{id_}_pose.txt"))
        up_in_camera = pose[2, :3] * [1, -1, -1]  # the file's camera has y up and z backwards
        points = depth.backproject(sample.depth, sample.camera)
        plane = depth.fit_plane(depth.border(points, np.isfinite(sample.depth)))
        assert np.degrees(np.arccos(np.clip(plane.normal @ up_in_camera, -1, 1))) < 0.01
        assert abs(plane.distance - pose[2, 3]) < 1e-4
        belt = depth.height_above(points, plane)[200:, 20:490]
        assert np.abs(belt[belt < 0.001]).max() < 1e-4
