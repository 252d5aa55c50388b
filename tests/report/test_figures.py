"""The pixels of the pictures: every panel shows the right content at the right place."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from scipy import ndimage

from iumad_jax.data.depth import measure
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.transforms import resize_image, resize_mask, resize_nearest
from iumad_jax.errors import UserError
from iumad_jax.report.figures import choose, save_heatmaps, save_matrix
from tests import sentences

SIZE = 64
RED, CYAN, MAGENTA = (200, 40, 40), (0, 255, 255), (255, 0, 200)


def scene(rows=2):
    """Return red images, flat heights, empty masks and maps of zeros."""
    return {
        "title": "Sweet after step 0",
        "labels": [f"good\n{row:02}" for row in range(rows)],
        "rgb": np.full((rows, SIZE, SIZE, 3), RED, np.uint8),
        "heights": np.zeros((rows, SIZE, SIZE), np.float32),
        "height_scale": 0.02,
        "masks": np.zeros((rows, SIZE, SIZE), bool),
        "maps": np.zeros((rows, SIZE, SIZE), np.float32),
        "scores": np.arange(rows),
    }


def drawn(folder, **changes):
    """Draw a picture and return its pixels, shape (h, w, 3)."""
    path = folder / "picture.png"
    save_heatmaps(path, **(scene() | changes))
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def near(picture, colour, tolerance=40):
    return np.abs(picture - np.asarray(colour)).max(axis=-1) <= tolerance


def panels(folder, columns=5, rows=2):
    """Return the slices of the panels, found in a picture whose panels have a single colour each."""
    blank = {"maps": np.zeros((rows, 4, 4)), "heights": np.full((rows, SIZE, SIZE), np.nan) if columns == 5 else None}
    picture = drawn(folder, **(scene(rows) | blank))
    flat = (
        near(picture, RED, 2)
        | near(picture, MAGENTA, 2)
        | near(picture, np.array(colormaps["inferno"](0)[:3]) * 255, 2)
    )
    large = [box for box in ndimage.find_objects(ndimage.label(flat)[0]) if box[1].stop - box[1].start > 150]
    return np.array(sorted(large, key=lambda box: (box[0].start, box[1].start))).reshape(rows, columns, 2)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return panels(tmp_path_factory.mktemp("grid"))


def cut(picture, panel):
    """Return a panel and the scale from its pixels to those of the image."""
    pixels = picture[panel[0], panel[1]]
    return pixels, SIZE / np.array(pixels.shape[:2])


def test_the_outline_runs_around_the_mask(grid, tmp_path):
    masks = scene()["masks"]
    masks[1, 40:50, 10:30] = True
    picture = drawn(tmp_path, masks=masks)
    for row, column in np.ndindex(2, 5):
        count = near(cut(picture, grid[row, column])[0], CYAN).sum()
        assert (count > 50) == ((row, column) == (1, 2)), (row, column)
    inside, scale = cut(picture, grid[1, 2])
    y, x = ((np.stack(np.nonzero(near(inside, CYAN)), -1) + 0.5) * scale).T
    assert [y.min(), y.max(), x.min(), x.max()] == pytest.approx([40, 50, 10, 30], abs=0.5)
    core = inside[int(43 / scale[0]) : int(47 / scale[0]), int(13 / scale[1]) : int(27 / scale[1])]
    assert near(core, RED, 2).all()  # the defect itself stays visible


def test_a_defect_at_the_border_is_outlined_within_the_picture(grid, tmp_path):
    masks = np.zeros((2, SIZE, SIZE), bool)
    masks[0, :6, :6] = True
    masks[1] = True
    picture = drawn(tmp_path, masks=masks)
    corner, scale = cut(picture, grid[0, 2])
    y, x = ((np.stack(np.nonzero(near(corner, CYAN)), -1) + 0.5) * scale).T
    assert y.max() == pytest.approx(6, abs=0.5)
    assert x.max() == pytest.approx(6, abs=0.5)
    inside, scale = cut(picture, grid[1, 2])
    y, x = np.nonzero(near(inside, CYAN, 130))
    assert [y.min(), y.max(), x.min(), x.max()] == pytest.approx([0, len(inside) - 1, 0, inside.shape[1] - 1], abs=1)


def test_the_maps_have_a_common_colour_scale(grid, tmp_path):
    """The maps are smaller than the images; the peak of the second row is half of the first one."""
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0, 1, 6], maps[1, 5, 2] = 4, 2
    picture = drawn(tmp_path, maps=maps)
    for row, (y, x) in enumerate([(1.5 / 8, 6.5 / 8), (5.5 / 8, 2.5 / 8)]):
        for column in (3, 4):
            inside, _ = cut(picture, grid[row, column])
            middle = inside[int(y * len(inside)), int(x * inside.shape[1])]
            expected = np.array(colormaps["inferno"]([1.0, 0.5][row])[:3]) * 255
            if column == 4:
                opacity = [0.85, 0.8][row]
                expected = opacity * expected + (1 - opacity) * np.array(RED)
            assert middle == pytest.approx(expected, abs=4), (row, column)
            elsewhere = inside[int((1 - y) * len(inside)), int((1 - x) * inside.shape[1])]
            assert elsewhere == pytest.approx(
                RED if column == 4 else np.array(colormaps["inferno"](0)[:3]) * 255, abs=2
            )


def test_the_relief_shows_heights_and_missing_depth(grid, tmp_path):
    heights = np.zeros((2, SIZE, SIZE), np.float32)
    heights[0, 20:36, 24:44] = 0.02
    heights[1, 50:60, 4:14] = np.nan
    heights[1, 0, 60:] = np.nan
    picture = drawn(tmp_path, heights=heights)

    inside, scale = cut(picture, grid[0, 1])
    assert (np.ptp(inside, axis=-1) <= 2).all()  # grey
    grey = inside[..., 0]
    floor = np.median(grey)
    assert 20 < floor < 100  # dark, but not black, so that holes are visible
    (box,) = ndimage.find_objects(ndimage.label(grey > floor + 60)[0])
    edges = [box[0].start * scale[0], box[0].stop * scale[0], box[1].start * scale[1], box[1].stop * scale[1]]
    assert edges == pytest.approx([20, 36, 24, 44], abs=0.5)
    outside = np.abs(grey - floor)
    outside[box] = 0
    assert outside.max() <= 2  # the plane is level

    inside, scale = cut(picture, grid[1, 1])
    boxes = ndimage.find_objects(ndimage.label(near(inside, MAGENTA, 2))[0])
    edges = [[s.start * scale[0], s.stop * scale[0], t.start * scale[1], t.stop * scale[1]] for s, t in boxes]
    assert edges == [pytest.approx([0, 1, 60, 64], abs=0.5), pytest.approx([50, 60, 4, 14], abs=0.5)]


def test_without_depth_the_relief_is_left_out(tmp_path):
    narrow = panels(tmp_path, columns=4)
    picture = drawn(tmp_path, heights=None, maps=np.ones((2, 4, 4)) * [[[0]], [[1]]])
    assert near(cut(picture, narrow[1, 1])[0], RED, 2).all()  # the image with the outline of the truth, which is empty
    assert near(cut(picture, narrow[1, 2])[0], np.array(colormaps["inferno"](1.0)[:3]) * 255, 4).all()


def test_labels_scores_and_title_are_printed(grid, tmp_path):
    """Other text changes the pixels at its place and nowhere else."""
    before = drawn(tmp_path)
    left, top = grid[0, 0][1].start, grid[0, 0][0].start
    for change, region in (
        ({"labels": ["good\n00", "dents\n01"]}, np.s_[top + 200 :, :left]),
        ({"scores": [0, 1234]}, np.s_[top + 200 :, :left]),
        ({"title": "Other after step 0"}, np.s_[:top, :]),
    ):
        changed = (drawn(tmp_path, **change) != before).any(axis=-1)
        assert changed[region].any()
        changed[region] = False
        assert not changed.any()


@pytest.mark.slow
def test_a_picture_of_real_samples_is_small_and_outlines_their_defects(eyecandies_root, tmp_path):
    reader = Eyecandies(eyecandies_root, "CandyCane")
    ids = reader.ids("CandyCane", "test")
    samples = [reader.read("CandyCane", "test", name) for name in ids[:4] + ids[25:29]]
    masks = np.stack([resize_mask(sample.mask, 224) for sample in samples])
    noise = np.random.default_rng(0).random((len(samples), 14, 14))
    pictures = []
    for truth in (masks, np.zeros_like(masks)):
        path = tmp_path / "CandyCane.jpg"
        save_heatmaps(
            path,
            title="CandyCane after step 0",
            labels=[f"{sample.defect}\n{sample.id}" for sample in samples],
            rgb=np.stack([resize_image(sample.rgb, 224) for sample in samples]).astype(np.uint8),
            heights=np.stack([resize_nearest(measure(sample.depth, sample.camera).height, 224) for sample in samples]),
            height_scale=0.04,
            masks=truth,
            maps=ndimage.zoom(noise, (1, 16, 16), order=1),
            scores=[0.5] * len(samples),
        )
        assert path.stat().st_size < 400_000
        pictures.append(np.asarray(Image.open(path)).astype(int))
    outlines = near(pictures[0], CYAN, 90) & ~near(pictures[1], CYAN, 90)
    y, x = np.nonzero(outlines)
    counts, _ = np.histogram(y, [0, *len(outlines) / 8 * np.arange(4, 9)])  # only the last four are anomalous
    assert counts[0] == 0
    assert (counts[1:] > 20).all()
    assert x.max() - x.min() < outlines.shape[1] / 5  # all in one column


def test_the_matrix_has_a_coloured_cell_for_every_value(tmp_path):
    matrix = [[1.0, 0.5, np.nan], [0.5, 0.75, 1.0]]
    path = tmp_path / "matrix.png"
    save_matrix(path, matrix, ["ant", "bee", "cat"], ["step 0", "step 1"], "AUPRO")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    centres = {}
    for value in (0.5, 0.75, 1.0):
        flat = near(picture, np.array(colormaps["viridis"]((value - 0.5) / 0.5)[:3]) * 255, 2)
        boxes = [box for box in ndimage.find_objects(ndimage.label(flat)[0]) if box[0].stop - box[0].start > 20]
        boxes = [box for box in boxes if box[1].stop - box[1].start > 40]  # not of the colour bar
        centres[value] = [(box[0].start + box[0].stop, box[1].start + box[1].stop) for box in boxes]
    (top_left, low_right), (top, low_left), ((y, x),) = (sorted(centres[value]) for value in (1.0, 0.5, 0.75))
    assert top_left[0] == pytest.approx(top[0], abs=4)
    assert top_left[0] < low_left[0] == pytest.approx(y, abs=4) == pytest.approx(low_right[0], abs=4)
    assert top_left[1] < top[1] < low_right[1]
    assert [low_left[1], x] == pytest.approx([top_left[1], top[1]], abs=4)
    empty = picture[top[0] // 2, low_right[1] // 2]
    assert tuple(empty) == (255, 255, 255)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, [0]),
        (3, [0, 3, 1]),
        (4, [0, 2, 3, 1]),
        (5, [0, 2, 3, 4, 1]),
        (99, [0, 2, 5, 3, 4, 1]),
    ],
)
def test_images_are_chosen_from_all_kinds_in_turn_good_first(rows, expected):
    assert choose(["good", "dents", "good", "bumps", "bumps", "good"], rows) == expected


def test_choice_without_good_images_or_without_samples():
    assert choose(["b", "a", "a"], 2) == [1, 0]
    assert choose([], 3) == []


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format("")):
        save_heatmaps(tmp_path / "nowhere" / "a.png", **scene())
    with pytest.raises(UserError, match=sentences.CANNOT_WRITE.format("")):
        save_matrix(tmp_path / "nowhere" / "a.png", [[0.5]], ["a"], ["0"], "t")


def test_pictures_of_the_same_data_have_identical_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_heatmaps(tmp_path / name, **scene())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
