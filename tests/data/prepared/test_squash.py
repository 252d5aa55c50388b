"""What is told about images that lose much when they are resized."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.prepared.squash import describe_squash
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.readers.folder import Folder
from tests.data.prepared.sets import quarters
from tests.sentences import NO_DEFECT_LABELLED, SMALLEST_DEFECT


def store(tmp_path, sizes, defect=None):
    """Make a store of an object with one training image of each size, and a test image of the first with a mask."""
    folder = tmp_path / "objects/bolt"
    for part in ("train/good/rgb", "test/scratch/rgb", "test/scratch/mask"):
        (folder / part).mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(folder / f"train/good/rgb/{number}.png")
    mask = np.zeros(sizes[0][::-1], np.uint8)
    if defect:
        mask[: defect[1], : defect[0]] = 255
        Image.fromarray(mask).save(folder / "test/scratch/mask/0.png")
    Image.new("RGB", sizes[0]).save(folder / "test/scratch/rgb/0.png")
    processing = Processing(("rgb",), 50, "normals", 0.1, 0.005)
    return Store(tmp_path / "prepared", Folder(tmp_path / "objects"), processing, quarters, {"grid": 10})


@pytest.mark.parametrize("sizes", [[(60, 120)], [(200, 200)], [(16, 16), (200, 150)]])
def test_nothing_is_told_and_no_test_image_prepared_for_images_near_the_input(tmp_path, sizes):
    opened = store(tmp_path, sizes)
    assert describe_squash(opened, ("bolt",)) is None
    assert {folder.name.split("-")[1] for folder in opened.folder.iterdir()} == {"train"}


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ([(60, 121), (60, 60)], "60x121 pixels"),  # longer than twice its width
        ([(201, 150), (60, 60)], "201x150 pixels"),  # more than four times the input
        ([(500, 500 + n) for n in range(5)], "500x500, 500x501, 500x502 pixels and 2 more sizes"),
    ],
)
def test_long_and_large_images_are_told_with_a_defect_of_a_given_share(tmp_path, sizes, named):
    told = describe_squash(store(tmp_path, sizes), ("bolt",))
    assert NO_DEFECT_LABELLED.format(sizes=named, size=50, grid=10, share="0.1", tokens="0.1") in told


def test_the_smallest_labelled_defect_is_told_in_tokens(tmp_path):
    opened = store(tmp_path, [(400, 100)], defect=(20, 4))  # 80 of 40,000 pixels, which 100 tokens see
    told = describe_squash(opened, ("bolt",))
    assert SMALLEST_DEFECT.format(sizes="400x100 pixels", size=50, grid=10, share="0.2", tokens="0.2") in told
    finer = dataclasses.replace(opened, settings={"grid": 30})
    assert SMALLEST_DEFECT.format(sizes="400x100 pixels", size=50, grid=30, share="0.2", tokens="1.8") in (
        describe_squash(finer, ("bolt",))
    )
