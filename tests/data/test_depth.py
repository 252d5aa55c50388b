"""Geometry from depth against exactly intersected scenes, and against the normals of the Eyecandies renderer."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import RANSACRegressor

from iumad_jax.data import depth
from iumad_jax.data.readers.eyecandies import Eyecandies
from iumad_jax.data.sample import Camera
from iumad_jax.data.transforms import region, resize_mask
from iumad_jax.errors import UserError
from tests import sentences

CAMERA = Camera(300.0, 310.0, 118.0, 97.0)
SHAPE = (200, 240)
DISTANCE = 0.5  # metres from the plane, where pixels are 1.7 mm apart
NOISE = 1e-4  # metres, as for a structured-light scanner
TILTS = [0, 10, 20, 30, 40, 50]

SCANNER = Camera(1350.0, 1350.0, 118.0, 97.0)  # as for MVTec 3D-AD, with pixels 0.37 mm apart
SCANNERS_NOISE = 2.5e-4


def rays(camera: Camera = CAMERA) -> np.ndarray:
    """Return every pixel's ray (h w 3) with z = 1."""
    columns, rows = np.meshgrid(np.arange(SHAPE[1]), np.arange(SHAPE[0]))
    x, y = (columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy
    return np.stack([x, y, np.ones(SHAPE)], axis=-1)


def normal_of(tilt: float) -> np.ndarray:
    """Return the normal of a plane tilted by `tilt` degrees, slightly sideways."""
    down, sideways = np.radians(tilt), np.radians(25)
    return np.array([np.sin(down) * np.sin(sideways), -np.sin(down) * np.cos(sideways), -np.cos(down)])


def plane_depth(normal: np.ndarray, distance: float = DISTANCE, camera: Camera = CAMERA) -> np.ndarray:
    """Return the depth at which every ray meets the plane normal . p + distance = 0."""
    return -distance / (rays(camera) @ normal)


def sphere_depth(centre: np.ndarray, radius: float, camera: Camera = CAMERA) -> np.ndarray:
    """Return the depth at which every ray first meets the sphere, infinite if it misses."""
    ray = rays(camera)
    a, b, c = (ray * ray).sum(-1), ray @ centre, centre @ centre - radius**2
    return np.where(b * b > a * c, (b - np.sqrt(np.maximum(b * b - a * c, 0))) / a, np.inf)


def spoiled(z: np.ndarray, seed: int = 0, noise: float = NOISE, holes: float = 0.05) -> np.ndarray:
    """Add scanner noise, scattered missing pixels and a hole to a depth image."""
    rng = np.random.default_rng(seed)
    z = z + noise * rng.standard_normal(z.shape)
    z[rng.random(z.shape) < holes] = np.nan
    z[60:80, 150:170] = 0
    z[:9, :30] = np.inf
    return z.astype(np.float32)


def degrees_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


@pytest.mark.parametrize("tilt", TILTS)
def test_tilted_plane(tilt: float) -> None:
    normal = normal_of(tilt)
    surface = depth.measure(spoiled(plane_depth(normal)), CAMERA, window=5)
    assert degrees_between(surface.plane.normal, normal) < 0.002
    assert abs(surface.plane.distance - DISTANCE) < 3e-6
    assert np.abs(surface.height[surface.valid]).max() < 5 * NOISE
    off = degrees_between(surface.normals, np.array([0, 0, 1]))  # in the plane's axes
    assert np.sqrt((off**2).mean()) < 1.5
    assert np.quantile(off[surface.valid], 0.99) < 3


@pytest.mark.parametrize("tilt", TILTS)
def test_normals_of_a_plane_are_exact_without_noise(tilt: float) -> None:
    normal = normal_of(tilt)
    for window in (3, 7):
        estimated = depth.normals(plane_depth(normal).astype(np.float32), CAMERA, window)
        assert degrees_between(estimated, normal).max() < 0.1


@pytest.mark.parametrize("tilt", [0, 45])
def test_sphere_on_a_plane(tilt: float) -> None:
    normal, radius = normal_of(tilt), 0.06
    foot = rays()[100, 120] * plane_depth(normal)[100, 120]
    centre = foot + radius * normal
    ball = sphere_depth(centre, radius)
    exact = np.minimum(ball, plane_depth(normal))
    points = rays() * exact[..., None]
    surface = depth.measure(spoiled(exact), CAMERA, window=5)

    height = points @ normal + DISTANCE
    assert np.abs(surface.height - height)[surface.valid].max() < 5e-4
    on_ball = np.isfinite(ball) & (ball < plane_depth(normal))
    inside = ndimage.binary_erosion(on_ball, iterations=3) & surface.valid
    outward = (points - centre) / radius
    seen = (outward * -points).sum(-1) / np.linalg.norm(points, axis=-1) > np.cos(np.radians(60))
    off = degrees_between(surface.normals @ surface.plane.axes, outward)
    assert inside.sum() > 1000
    assert np.sqrt((off[inside & seen] ** 2).mean()) < 1.5
    assert np.quantile(off[inside & seen], 0.98) < 3
    # Where the height differs from the threshold by more than the noise, the mask is exactly the ball's cap.
    clear = surface.valid & (np.abs(height - 0.005) > 5 * NOISE)
    np.testing.assert_array_equal(depth.object_mask(surface.height, 0.005)[clear], (height > 0.005)[clear])


def test_step() -> None:
    """For a block 20 mm high, heights are correct up to its edge, and normals beyond half a window from it."""
    normal = normal_of(0)
    block = np.zeros(SHAPE, bool)
    block[70:140, 80:170] = True
    surface = depth.measure(
        spoiled(np.where(block, plane_depth(normal, DISTANCE - 0.02), plane_depth(normal))), CAMERA, 5
    )
    np.testing.assert_allclose(surface.height[surface.valid], np.where(block, 0.02, 0)[surface.valid], atol=5e-4)
    flat = ~(ndimage.maximum_filter(block, 5) & ndimage.maximum_filter(~block, 5))
    off = degrees_between(surface.normals, np.array([0, 0, 1]))
    assert np.quantile(off[flat & surface.valid], 0.99) < 3
    assert np.median(off[~flat]) > 45


# With the noise of MVTec 3D-AD: plane within 0.5 degrees, heights within 0.5 mm, normals within 3 degrees


def window_inside(window: int) -> np.ndarray:
    """Mask the pixels whose window lies within the image."""
    inside = np.zeros(SHAPE, bool)
    inside[window // 2 : -(window // 2), window // 2 : -(window // 2)] = True
    return inside


@pytest.mark.parametrize("holes", [0.05, 0.2])
@pytest.mark.parametrize("tilt", TILTS)
def test_tilted_plane_of_a_scanner(tilt: float, holes: float) -> None:
    normal, exact = normal_of(tilt), plane_depth(normal_of(tilt), camera=SCANNER)
    image = spoiled(exact, noise=SCANNERS_NOISE, holes=holes)
    window = depth.choose_window(image, SCANNER)
    surface = depth.measure(image, SCANNER, window)
    assert degrees_between(surface.plane.normal, normal) < 0.1
    true_points = rays(SCANNER) * exact[..., None]
    assert np.abs(depth.height_above(true_points, surface.plane)).max() < 1e-4
    assert np.quantile(np.abs(surface.height), 0.95) < 5e-4  # including the noise of the pixel itself
    off = degrees_between(surface.normals, np.array([0, 0, 1]))
    assert np.quantile(off[surface.valid & window_inside(window)], 0.95) < 3
    assert np.quantile(off, 0.95) < 3.3


@pytest.mark.parametrize("tilt", [0, 25, 50])
def test_sphere_of_a_scanner(tilt: float) -> None:
    normal, radius = normal_of(tilt), 0.015
    plane = plane_depth(normal, camera=SCANNER)
    centre = rays(SCANNER)[100, 120] * plane[100, 120] + 0.5 * radius * normal
    ball = sphere_depth(centre, radius, SCANNER)
    exact = np.minimum(plane, ball)
    image = spoiled(exact, noise=SCANNERS_NOISE, holes=0.1)
    surface = depth.measure(image, SCANNER, depth.choose_window(image, SCANNER))
    points = rays(SCANNER) * exact[..., None]
    height = points @ normal + DISTANCE
    assert np.quantile(np.abs(surface.height - height), 0.95) < 5e-4
    inside = ndimage.binary_erosion(ball < plane, iterations=6)
    assert inside.sum() > 1200
    off = degrees_between(surface.normals @ surface.plane.axes, (points - centre) / radius)[inside]
    assert np.median(off) < 2
    assert np.quantile(off, 0.9) < 3


def test_step_of_a_scanner() -> None:
    """For a block 10 mm high, normals beyond half a window from its edge point up."""
    normal = normal_of(0)
    block = np.zeros(SHAPE, bool)
    block[70:140, 80:170] = True
    low, high = (plane_depth(normal, distance, SCANNER) for distance in (DISTANCE, DISTANCE - 0.01))
    image = spoiled(np.where(block, high, low), noise=SCANNERS_NOISE, holes=0.1)
    window = depth.choose_window(image, SCANNER)
    surface = depth.measure(image, SCANNER, window)
    error = np.abs(surface.height - np.where(block, 0.01, 0))[surface.valid]
    assert np.quantile(error, 0.95) < 5e-4
    assert error.max() < 5 * SCANNERS_NOISE
    flat = window_inside(window) & ~(ndimage.maximum_filter(block, window) & ndimage.maximum_filter(~block, window))
    assert np.quantile(degrees_between(surface.normals, np.array([0, 0, 1]))[flat & surface.valid], 0.95) < 3


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("slope", [0, 30])
def test_an_object_on_nearly_half_the_border_does_not_move_the_plane(tilt: float, slope: float) -> None:
    """The object is 20 mm high, flat or sloped on top, and lies along the left and lower edges."""
    normal = normal_of(tilt)
    block = np.zeros(SHAPE, bool)
    block[:, :30] = block[188:, :150] = True
    frame = np.ones(SHAPE, bool)
    frame[12:-12, 15:-15] = False
    assert 0.4 < block[frame].mean() < 0.46
    low = plane_depth(normal, camera=SCANNER)
    right, _, up = depth.Plane(normal, DISTANCE).axes
    top = np.cos(np.radians(slope)) * up + np.sin(np.radians(slope)) * right
    high = plane_depth(top, -top @ ((0.02 - DISTANCE) * up), SCANNER)
    image = spoiled(np.where(block, np.minimum(high, low), low), noise=SCANNERS_NOISE, holes=0.1)
    surface = depth.measure(image, SCANNER)
    assert degrees_between(surface.plane.normal, normal) < 0.5
    true_points = rays(SCANNER) * low[..., None]
    assert np.abs(depth.height_above(true_points, surface.plane)).max() < 5e-4


@pytest.mark.parametrize("noise", [2e-5, 1e-4, 2e-4, 3.5e-4])
@pytest.mark.parametrize("tilt", [0, 20])
def test_the_window_is_the_smallest_that_keeps_normals_within_3_degrees(noise: float, tilt: float) -> None:
    normal = normal_of(tilt)
    image = spoiled(plane_depth(normal, camera=SCANNER), noise=noise)
    window = depth.choose_window(image, SCANNER)
    valid = np.isfinite(image) & (image > 0)
    off = [degrees_between(depth.normals(image, SCANNER, size), normal)[valid] for size in (window, window - 2)]
    assert np.quantile(off[0], 0.95) < 3.3
    if window > 3:
        assert np.quantile(off[1], 0.95) > 2.5


@pytest.mark.parametrize(("step", "expected"), [(1e-3, {13, 15}), (2e-4, {5, 7})])
def test_the_window_follows_from_the_step_of_quantised_depth(step: float, expected: set[int]) -> None:
    """If the steps of a plane are wider than a window, as with whole millimetres, no window gives correct normals."""
    exact = plane_depth(normal_of(10), camera=SCANNER)
    image = (np.round(exact / step) * step).astype(np.float32)
    assert depth.choose_window(image, SCANNER) in expected
    off = degrees_between(depth.normals(image, SCANNER, depth.choose_window(image, SCANNER)), normal_of(10))
    assert (np.sqrt((off**2).mean()) < 3) == (step < 1e-3)
    assert depth.choose_window(exact.astype(np.float32), SCANNER) == 3


def test_orthographic_camera() -> None:
    """A ball on a tilted plane with pixels of 0.4 mm, against its closed form."""
    camera = Camera(2500, 2500, 118, 97, orthographic=True)
    columns, rows = np.meshgrid(np.arange(SHAPE[1]), np.arange(SHAPE[0]))
    x, y = (columns - 118) / 2500, (rows - 97) / 2500
    normal = normal_of(30)
    z = (-DISTANCE - x * normal[0] - y * normal[1]) / normal[2]
    centre, radius = np.array([0.0, 0.0, -DISTANCE / normal[2]]), 0.015
    squared = radius**2 - x**2 - y**2
    ball = np.where(squared > 0, centre[2] - np.sqrt(np.maximum(squared, 0)), np.inf)
    exact = np.minimum(z, ball)
    points = np.stack([x, y, exact], axis=-1)
    surface = depth.measure(spoiled(exact, noise=2e-5), camera, window=5)
    assert degrees_between(surface.plane.normal, normal) < 0.1
    np.testing.assert_allclose(surface.points[surface.valid], points[surface.valid], atol=1.5e-4)
    np.testing.assert_allclose((surface.height - points @ normal)[surface.valid], DISTANCE, atol=1.5e-4)
    inside = ndimage.binary_erosion(ball < z, iterations=4) & (squared > 0.4 * radius**2) & surface.valid
    off = degrees_between(surface.normals @ surface.plane.axes, (points - centre) / radius)[inside]
    assert np.quantile(off, 0.95) < 2


def test_plane_is_found_where_walls_fill_two_fifths_of_the_border() -> None:
    rng = np.random.default_rng(1)
    normal = normal_of(45)
    belt = rng.uniform(-1, 1, (600, 3))
    belt -= (belt @ normal + DISTANCE)[:, None] * normal
    wall = np.array([0.8, 0, 0]) + rng.uniform(-1, 1, (400, 3)) * [0, 1, 1]
    points = rng.permutation(np.concatenate([belt, wall])) + 1e-4 * rng.standard_normal((1000, 3))
    plane = depth.fit_plane(points)
    assert degrees_between(plane.normal, normal) < 0.05
    other = RANSACRegressor(residual_threshold=0.003, random_state=0, max_trials=1000).fit(points[:, :2], points[:, 2])
    slopes = np.append(other.estimator_.coef_, -1)
    assert degrees_between(plane.normal, slopes / np.linalg.norm(slopes)) < 0.1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 50), st.floats(0.3, 3))
def test_heights_do_not_depend_on_the_camera_position(seed: int, tilt: float, distance: float) -> None:
    """Points at known heights above a plane keep their heights for every camera position."""
    rng = np.random.default_rng(seed)
    right, away, up = depth.Plane(normal_of(tilt), distance).axes
    height = np.append(np.zeros(300), rng.uniform(0.01, 0.2, 100))
    along = rng.uniform(-1, 1, (2, 400))
    points = along[0, :, None] * right + along[1, :, None] * away + (height - distance)[:, None] * up
    plane = depth.fit_plane(points)
    np.testing.assert_allclose(depth.height_above(points[None], plane)[0], height, atol=1e-6)


def test_axes_of_the_plane() -> None:
    """For a camera at 45 degrees, the axes are the camera's x, away from the camera, and up."""
    half = np.sqrt(0.5)
    axes = depth.Plane(np.array([0, -half, -half]), 2.0).axes
    np.testing.assert_allclose(axes, [[1, 0, 0], [0, -half, half], [0, -half, -half]], atol=1e-12)


def test_backprojection_by_hand() -> None:
    points = depth.backproject(np.full((3, 4), 2, np.float32), Camera(fx=4, fy=8, cx=1, cy=1))
    np.testing.assert_array_equal(points[0, 3], [(3 - 1) / 4 * 2, (0 - 1) / 8 * 2, 2])
    np.testing.assert_array_equal(points[1, 1], [0, 0, 2])


@settings(deadline=None, max_examples=25)
@given(arrays(np.float32, (7, 8), elements=st.sampled_from([0, -1, 1, 2, 3, 4, np.nan, np.inf])))
def test_missing_depth_is_the_nearest_valid(image: np.ndarray) -> None:
    camera = Camera(8, 8, 3.5, 3)
    pixels = [(row, column) for row, column in np.ndindex(image.shape) if 0 < image[row, column] < np.inf]
    if not pixels:
        with pytest.raises(UserError, match=sentences.NO_VALID_PIXEL):
            depth.fill_missing(image, camera)
        return
    filled, valid = depth.fill_missing(image, camera)
    assert valid.sum() == len(pixels)
    for row, column in np.ndindex(image.shape):
        distances = {pixel: np.hypot(pixel[0] - row, pixel[1] - column) for pixel in pixels}
        nearest = [image[pixel] for pixel in pixels if distances[pixel] == min(distances.values())]
        assert filled[row, column] in nearest


@pytest.mark.parametrize("valid", [[], [(5, 5), (5, 6)], [(5, 5), (5, 6), (5, 7), (5, 8)], [(0, 0), (9, 0), (0, 9)]])
def test_too_little_depth_is_refused(valid: list[tuple[int, int]]) -> None:
    image = np.full((10, 10), np.nan, np.float32)
    for pixel in valid:
        image[pixel] = 1
    with pytest.raises(UserError, match=f"{sentences.NO_VALID_PIXEL}|{sentences.TOO_FEW_VALID_PIXELS}"):
        depth.measure(image, CAMERA)


def test_border_is_a_thinned_frame() -> None:
    rows, columns = np.mgrid[:160, :320]
    points = np.stack([columns, rows, np.ones(rows.shape)], axis=-1)
    valid = columns != 0
    frame = depth.border(points, valid, max_points=500)
    assert 250 < len(frame) <= 500
    x, y = frame[:, 0], frame[:, 1]
    assert ((x < 20) | (x >= 300) | (y < 10) | (y >= 150)).all()
    assert x.min() > 0
    assert len(depth.border(points, valid, max_points=10**6)) == 160 * 320 - 140 * 280 - 160
    only_middle = (rows > 50) & (rows < 100) & (columns > 50) & (columns < 100)
    assert len(depth.border(points, only_middle, max_points=5000)) == only_middle.sum()


def test_encodings_by_hand() -> None:
    """Three pixels: 0.25 m above the plane with normal (0.6, 0, 0.8), below the plane, and above the height range."""
    surface = depth.Surface(
        valid=np.ones((1, 3), bool),
        points=np.array([[[0.5, -0.1, 1.2], [0, 0, 1], [0, 0, 1]]], np.float32),
        plane=depth.Plane(np.array([0.0, 0, -1]), 1.0),
        height=np.array([[0.25, -0.1, 2]], np.float32),
        normals=np.array([[[0.6, 0, 0.8], [0, 0, 1], [-1, 0, 0]]], np.float32),
    )
    expected = {
        "normals": [[204, 127.5, 229.5], [127.5, 127.5, 255], [0, 127.5, 127.5]],
        "height": [[127.5] * 3, [0] * 3, [255] * 3],
        "height+normals": [[127.5, 204, 127.5], [0, 127.5, 127.5], [255, 0, 127.5]],
        "xyz_uint8": [[127, 256 - 25, 306 - 256], [0, 0, 255], [0, 0, 255]],
    }
    expected["normals_official"] = expected["normals"]
    assert set(expected) == set(depth.ENCODINGS)
    for encoding, image in expected.items():
        encoded = depth.encode(surface, encoding, height_range=0.5)
        assert encoded.dtype == np.float32
        np.testing.assert_allclose(encoded[0], image, atol=1e-4, err_msg=encoding)
    with pytest.raises(
        UserError, match=re.escape(sentences.UNKNOWN_ENCODING.format(found="heights", known="normals, height"))
    ):
        depth.encode(surface, "heights", 0.5)


# Real samples


@pytest.fixture(scope="module")
def candy_canes(eyecandies_root: Path) -> Eyecandies:
    return Eyecandies(eyecandies_root, "CandyCane")


@pytest.mark.parametrize(("split", "id_"), [("train", "000"), ("train", "001"), ("test", "13")])
def test_real_normals(candy_canes: Eyecandies, split: str, id_: str) -> None:
    """The renderer's normals have y up and z backwards; the belt's grooves exist only in its shading."""
    sample = candy_canes.read("CandyCane", split, id_)
    file = candy_canes.files("CandyCane", split, id_)[0].with_name(f"{id_}_normals.png")
    official = np.asarray(Image.open(file)) / 127.5 - 1
    official = official / np.linalg.norm(official, axis=-1, keepdims=True) * [1, -1, -1]
    surface = depth.measure(sample.depth, sample.camera)
    mask = depth.object_mask(surface.height, candy_canes.object_height)
    inside = ndimage.binary_erosion(depth.free_standing(mask), iterations=3)
    off = degrees_between(surface.normals @ surface.plane.axes, official)
    assert np.median(off) < 0.5
    assert np.quantile(off[inside], 0.99) < 3


def test_components_at_the_edge_are_not_free_standing() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = mask[:6, 7] = mask[5, 4:7] = True  # a square; a wall with a bar attached
    mask[6, 5] = True  # touches the bar by a corner
    expected = np.zeros((8, 8), bool)
    expected[2:4, 2:4] = True
    np.testing.assert_array_equal(depth.free_standing(mask), expected)


def test_real_object_is_the_only_free_standing_component(candy_canes: Eyecandies) -> None:
    for id_ in candy_canes.ids("CandyCane", "test")[::3]:
        sample = candy_canes.read("CandyCane", "test", id_)
        height = depth.measure(sample.depth, sample.camera).height
        mask = depth.object_mask(height, candy_canes.object_height)
        cane = depth.free_standing(mask)
        assert ndimage.label(cane, np.ones((3, 3)))[1] == 1
        assert 0.03 < cane.mean() < 0.1
        assert region(mask, 224)[resize_mask(sample.mask, 224)].all()
