"""The part of an image that is seen: boxes, the workpiece, and maps that return to the whole image."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from iumad_jax.config import check, small
from iumad_jax.data.degradation import vary
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.region import WHOLE, Box, fixed_box, workpiece_box
from iumad_jax.data.sample import Camera, DepthFormat, Sample
from iumad_jax.errors import UserError
from iumad_jax.inference.detection import Detection
from iumad_jax.inference.detector import Detector
from tests import sentences

PROCESSING = Processing(("rgb", "depth"), 32, "height+normals", height_range=0.1, object_height=0.005)
HEIGHT, WIDTH = 100, 160
BLOCK = np.s_[30:50, 60:72]


def scene(seed: int = 0) -> Sample:
    """Make a block, 20 mm high, on a table that is tilted by 10 degrees and seen from half a metre."""
    rng = np.random.default_rng(seed)
    camera = Camera(150, 150, 79.5, 49.5)
    y = (np.arange(HEIGHT)[:, None] - camera.cy) / camera.fy + np.zeros((1, WIDTH))
    depth = 0.5 / (1 + y * np.tan(np.radians(10)))
    depth[BLOCK] -= 0.02
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[34:37, 62:69] = True
    rgb = rng.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    normals = np.broadcast_to(np.float32([0, 0, -1]), (HEIGHT, WIDTH, 3))
    return Sample("bolt", "7", "dent", rgb, depth.astype(np.float32), mask, True, camera, normals)


@pytest.mark.parametrize("encoding", ["height+normals", "normals_official"])
@pytest.mark.parametrize("region", ["40,10,120,70", "0.25,0.1,0.75,0.7"])
def test_only_what_is_in_the_box_is_prepared(region, encoding):
    """It is prepared like an image of this part alone, by the camera that takes it, whatever lies outside."""
    sample = scene()
    inside = np.s_[10:70, 40:120]
    alone = dataclasses.replace(
        sample,
        **{name: getattr(sample, name)[inside] for name in ("rgb", "depth", "mask", "normals")},
        camera=dataclasses.replace(sample.camera, cx=79.5 - 40, cy=49.5 - 10),
    )
    outside = np.ones((HEIGHT, WIDTH), bool)
    outside[inside] = False
    disturbed = dataclasses.replace(
        sample, rgb=np.where(outside[..., None], 0, sample.rgb), depth=np.where(outside, np.nan, sample.depth)
    )
    whole = dataclasses.replace(PROCESSING, depth_encoding=encoding)
    expected = whole(alone)
    assert expected["object"].any()
    assert expected["mask"].any()
    for image in (sample, disturbed):
        arrays = dataclasses.replace(whole, region=region)(image)
        np.testing.assert_allclose(arrays.pop("box"), [0.25, 0.1, 0.75, 0.7])
        assert arrays.keys() == expected.keys() - {"box"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], name)


def test_depth_of_another_resolution_is_cut_in_shares():
    sample = scene()
    coarse = dataclasses.replace(sample, depth=sample.depth[::2, ::2], normals=None, camera=sample.camera.scaled(0.5))
    inside = np.s_[10:70, 40:120]
    alone = dataclasses.replace(
        coarse,
        rgb=sample.rgb[inside],
        mask=sample.mask[inside],
        depth=coarse.depth[5:35, 20:60],
        camera=dataclasses.replace(coarse.camera, cx=coarse.camera.cx - 20, cy=coarse.camera.cy - 5),
    )
    arrays, expected = (dataclasses.replace(PROCESSING, region="40,10,120,70")(coarse), PROCESSING(alone))
    for name in expected.keys() - {"box"}:
        np.testing.assert_array_equal(arrays[name], expected[name], name)


def test_a_box_beyond_an_image_is_refused():
    error = sentences.REGION_TOO_LARGE.format(image="bolt 7", size="160x100", region="0,0,161,100")
    with pytest.raises(UserError, match=error):
        dataclasses.replace(PROCESSING, region="0,0,161,100")(scene())
    assert fixed_box("0,0,160,100", scene()) == WHOLE


def test_a_box_has_at_least_one_pixel():
    assert Box(0.999, 0.5, 1, 0.5001).slices((3, 4)) == (slice(2, 3), slice(3, 4))


def test_the_workpiece_is_found_with_a_margin():
    """The block has 20 x 12 pixels: the square has 1.2 * 20 = 24, about the centre (40, 66)."""
    workpiece = np.zeros((HEIGHT, WIDTH), bool)
    workpiece[BLOCK] = True
    assert np.multiply(workpiece_box(workpiece), [WIDTH, HEIGHT] * 2) == pytest.approx([54, 28, 78, 52])
    workpiece[90, 150] = True  # noise
    assert np.multiply(workpiece_box(workpiece), [WIDTH, HEIGHT] * 2) == pytest.approx([54, 28, 78, 52])
    workpiece[48:50, 72:80] = False
    workpiece[40:42, 76:80] = True  # another piece: 20 columns from 60 to 80
    assert np.multiply(workpiece_box(workpiece), [WIDTH, HEIGHT] * 2) == pytest.approx([58, 28, 82, 52])
    assert workpiece_box(np.zeros((5, 5), bool)) == WHOLE


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((1, 21), (60, 80), (58, 0, 82, 24)),  # at the top: moved into the image
        ((5, 95), (60, 80), (20, 0, 120, 100)),  # 108 pixels do not fit into 100
    ],
)
def test_the_square_about_the_workpiece_stays_within_the_image(rows, columns, expected):
    workpiece = np.zeros((HEIGHT, WIDTH), bool)
    workpiece[slice(*rows), slice(*columns)] = True
    left, top, right, bottom = np.multiply(workpiece_box(workpiece), [WIDTH, HEIGHT] * 2)
    assert (top, bottom) == pytest.approx((expected[1], expected[3]))
    assert (left + right) / 2 == pytest.approx((expected[0] + expected[2]) / 2)
    assert right - left == pytest.approx(1.2 * (rows[1] - rows[0]))


def test_heights_of_the_workpiece_are_those_above_the_whole_images_table():
    arrays = dataclasses.replace(PROCESSING, region="workpiece")(scene())
    left, top, right, bottom = np.round(arrays["box"] * [WIDTH, HEIGHT, WIDTH, HEIGHT]).astype(int)
    assert (left, right) == (54, 78)
    whole = PROCESSING._measure(scene())
    rows, columns = (np.floor((np.arange(224) + 0.5) * 24 / 224).astype(int) for _ in range(2))
    expected = whole["height"][top:bottom, left:right][rows[:, None], columns]
    np.testing.assert_array_equal(arrays["height"], expected)
    assert np.nanmax(arrays["height"]) == pytest.approx(0.02, abs=0.002)
    share = 21 / 24**2  # of the mask
    assert arrays["mask"].mean() == pytest.approx(share, rel=0.1)


def test_an_image_without_workpiece_is_seen_whole_and_told_once(capsys):
    flat = dataclasses.replace(scene(), object="plate", depth=np.full((HEIGHT, WIDTH), 0.5, np.float32))
    processing = dataclasses.replace(PROCESSING, region="workpiece")
    for _ in range(2):
        assert tuple(processing(flat)["box"]) == WHOLE
    assert capsys.readouterr().err.count(sentences.NO_WORKPIECE.format(image="plate 7", height=5)) == 1


def test_a_workpiece_that_fills_the_image_is_none_that_is_missing(capsys):
    depth = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    depth[12:-12, 12:-12] = 0.48
    filling = dataclasses.replace(scene(), object="sheet", depth=depth)
    assert tuple(dataclasses.replace(PROCESSING, region="workpiece")(filling)["box"])[1::2] == (0, 1)
    assert sentences.NO_WORKPIECE.format(image="sheet 7", height=5) not in capsys.readouterr().err


def test_a_defect_outside_of_the_region_is_told_once(capsys):
    sample = dataclasses.replace(scene(), object="spot", mask=np.zeros((HEIGHT, WIDTH), bool), anomalous=True)
    sample.mask[-4:, -4:] = True
    for region, told in (("0.5,0.5,1,1", 0), ("0,0,0.5,0.5", 1)):
        for _ in range(2):
            dataclasses.replace(PROCESSING, region=region)(sample)
        assert capsys.readouterr().err.count(sentences.DEFECT_OUTSIDE.format(image="spot 7")) == told


def test_copies_move_by_a_share_of_what_is_seen():
    """A box of half the image would otherwise see twice the shift, and the workpiece's box follows every shift."""
    sample = scene()
    for region, extent in (("", (1, 1)), ("0,0,0.5,0.25", (0.25, 0.5)), ("workpiece", (0, 0))):
        assert dataclasses.replace(PROCESSING, region=region).extent(sample) == extent
    whole, half = (
        [vary(sample, number, 0.005, extent).camera for number in range(20)] for extent in ((1, 1), (1, 0.5))
    )
    still = vary(sample, 3, 0.005, (0, 0)).camera
    moves = np.array([(abs(a.cx - still.cx), abs(b.cx - still.cx)) for a, b in zip(whole, half, strict=True)])
    assert moves.max(0)[0] > 3
    np.testing.assert_allclose(moves[:, 1], moves[:, 0] / 2, atol=0.51)


@pytest.mark.parametrize(
    "region", ["a", "1,2,3", "0,0,1,1,1", "0.5,0,0.4,1", "-1,0,5,5", "0,0,nan,1", "0,0,inf,1", "0.5,0,9,9"]
)
def test_a_region_that_is_no_box_is_refused(region):
    config = small("1-0")
    config.input.region = region
    with pytest.raises(UserError, match=sentences.REGION_WRONG.format(region)):
        check(config)


def test_the_workpiece_needs_depth():
    config = small("1-0")
    config.input.region = "workpiece"
    check(config)
    config.modality = "rgb"
    with pytest.raises(UserError, match=sentences.REGION_NEEDS_DEPTH.format("rgb")):
        check(config)


def test_maps_return_in_the_images_own_size():
    """The map's only defect is in its upper left quarter; of 300 x 200 pixels, the seen part begins at (75, 50)."""
    processing = Processing(("rgb",), 32, "height", 0.1, 0.005, region="0.25,0.25,0.75,0.75")
    detector = Detector(Path(), {}, None, (), (), 0, processing, DepthFormat(), None, None, None, None)
    processed = detector.process(np.zeros((2, 200, 300, 3), np.uint8))
    assert (len(processed.boxes), processed.size) == (2, (200, 300))
    maps = np.zeros((2, 224, 224), np.float32)
    maps[1, :112, :112] = 5
    found = Detection(*[None] * 12)._replace(map=maps, pixel_threshold=np.float32([1, 2.5]))
    placed = processed.place(found)
    expected = np.zeros((2, 200, 300), bool)
    expected[1, 50:100, 75:150] = True
    np.testing.assert_array_equal(placed.mask, expected)
    assert (placed.map.shape, placed.map[1, 60, 80], placed.map[1, :, :75].max()) == ((2, 200, 300), 5, 0)
    assert processed._replace(whole=True).place(found) is found
    whole = dataclasses.replace(detector, processing=dataclasses.replace(processing, region=""))
    assert whole.process(np.zeros((200, 300, 3), np.uint8)).whole


def test_maps_of_tiles_are_joined_within_the_region():
    """The lower of two tiles is anomalous: rows 100 to 150, below the region's middle."""
    processing = Processing(("rgb",), 32, "height", 0.1, 0.005, region="0.25,0.25,0.75,0.75", tiles="2x1")
    detector = Detector(Path(), {}, None, (), (), 0, processing, DepthFormat(), None, None, None, None)
    processed = detector.process(np.zeros((1, 200, 300, 3), np.uint8))
    assert processed.images["rgb"].shape == (2, 32, 32, 3)
    maps = np.stack([np.zeros((224, 224), np.float32), np.full((224, 224), 5, np.float32)])[None]
    placed = processed.place(Detection(*[None] * 12)._replace(map=maps, pixel_threshold=np.float32([1])))
    expected = np.zeros((1, 200, 300), bool)
    expected[0, 100:150, 75:225] = True
    np.testing.assert_array_equal(placed.mask, expected)
