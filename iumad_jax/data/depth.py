"""Metric depth to geometry, and geometry to what a network trained on photographs can read.

All lengths are metres. Camera coordinates: x right, y down, z along the optical axis.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32
from scipy import ndimage

from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError

ENCODINGS = ("normals", "height", "height+normals", "xyz_uint8", "normals_official")


@dataclass(frozen=True)
class Plane:
    """All points p with normal . p + distance = 0."""

    normal: Float[np.ndarray, "3"]  # unit length, towards the camera
    distance: float  # of the camera from the plane, >= 0

    @property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Right-handed axes, in rows: the camera's x laid into the plane, away from the camera, up from the plane."""
        right = np.array([1.0, 0.0, 0.0]) - self.normal[0] * self.normal
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(self.normal, right), self.normal])


@dataclass(frozen=True, eq=False)
class Surface:
    """What a depth image shows."""

    valid: Bool[np.ndarray, "h w"]  # where depth was measured; elsewhere all is guessed from the nearest measurement
    points: Float32[np.ndarray, "h w 3"]  # camera coordinates
    plane: Plane  # what the object lies on
    height: Float32[np.ndarray, "h w"]  # above the plane
    normals: Float32[np.ndarray, "h w 3"]  # unit vectors in the plane's axes


def measure(depth: Float32[np.ndarray, "h w"], camera: Camera, window: int = 3) -> Surface:
    """The surface in a depth image with NaN where depth is missing; for `window` see `normals`.

    Raises:
        UserError: too little depth is valid to fit a plane or normals.
    """
    filled, valid = fill_missing(depth)
    points = backproject(filled, camera)
    plane = fit_plane(border(points, valid))
    in_plane_axes = normals(depth, camera, window) @ plane.axes.T.astype(np.float32)
    return Surface(valid, points, plane, height_above(points, plane), in_plane_axes)


def fill_missing(
    depth: Float32[np.ndarray, "h w"],
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Depth with every missing pixel taken from the nearest valid one, and where it was valid (finite and > 0).

    Raises:
        UserError: no pixel is valid.
    """
    valid = np.isfinite(depth) & (depth > 0)
    if not valid.any():
        raise UserError("a depth image has no valid pixel; every image needs some depth.")
    return _from_nearest(depth, valid), valid


def backproject(depth: Float32[np.ndarray, "h w"], camera: Camera) -> Float32[np.ndarray, "h w 3"]:
    """Points in camera coordinates."""
    x, y = _rays(depth.shape, camera)
    spread = np.ones_like(depth) if camera.orthographic else depth
    return np.stack([x * spread, y * spread, depth], axis=-1)


def border(
    points: Float[np.ndarray, "h w 3"], valid: Bool[np.ndarray, "h w"], width: float = 1 / 16, max_points: int = 2048
) -> Float[np.ndarray, "n 3"]:
    """Valid points in a frame along the image's edge, where the object is not; evenly thinned."""
    height_px, width_px = valid.shape
    rows, columns = max(1, round(width * height_px)), max(1, round(width * width_px))
    frame = valid.copy()
    frame[rows : height_px - rows, columns : width_px - columns] = False
    chosen = points[frame if frame.sum() >= 100 else valid]
    return chosen[:: -(-len(chosen) // max_points)]


def fit_plane(points: Float[np.ndarray, "n 3"], trials: int = 256) -> Plane:
    """The plane most points lie on, by RANSAC with a truncated quadratic cost (MSAC; Torr and Zisserman, 2000).

    The winner among `trials` planes through three points each is refined by least squares on the points within 2 mm of
    it, or 1 % of the scene where that is less than 20 cm wide. The trials are drawn the same way in every call. With
    half of the points off the plane, all 256 trials miss it with a probability of 1e-15.

    Raises:
        UserError: the points do not span a plane.
    """
    points = points.astype(np.float64)
    if len(points) >= 3:
        corners = points[np.random.default_rng(0).integers(len(points), size=(trials, 3))]
        candidates = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        lengths = np.linalg.norm(candidates, axis=1)
        usable = lengths > 1e-12
        candidates, through = candidates[usable] / lengths[usable, None], corners[usable, 0]
    if len(points) < 3 or not usable.any():
        raise UserError("a depth image has too few valid pixels to find the plane the object lies on.")
    tolerance = min(0.002, 0.01 * float(np.linalg.norm(np.ptp(points, axis=0))))
    offsets = points @ candidates.T - (candidates * through).sum(1)  # (n, trials)
    cost = np.minimum(offsets**2, tolerance**2).sum(0)
    normal, centre = candidates[cost.argmin()], through[cost.argmin()]
    for _ in range(3):
        inliers = points[np.abs((points - centre) @ normal) < tolerance]
        centre = inliers.mean(0)
        normal = np.linalg.svd(inliers - centre, full_matrices=False)[2][2]
    distance = -normal @ centre
    sign = 1 if distance >= 0 else -1
    return Plane(sign * normal, float(sign * distance))


def height_above(points: Float32[np.ndarray, "h w 3"], plane: Plane) -> Float32[np.ndarray, "h w"]:
    """Distance from the plane, positive on the camera's side."""
    return points @ plane.normal.astype(np.float32) + np.float32(plane.distance)


def normals(depth: Float32[np.ndarray, "h w"], camera: Camera, window: int = 3) -> Float32[np.ndarray, "h w 3"]:
    """Unit normals towards the camera, in camera coordinates, from planes fitted in windows of `window` pixels.

    A plane is linear in inverse depth over the image, 1/z = a (u - cx)/fx + b (v - cy)/fy + c with a normal along
    (a, b, c), so that the fit is a linear regression over the window's valid pixels, exact for planes at any tilt.
    For an orthographic camera -z takes the place of 1/z, and c = 1. Where a window has too few valid pixels the normal
    is the nearest one known. The default suits renderings, which have no noise; else see `window_for`.

    Raises:
        UserError: no window has three valid pixels that span a plane.
    """
    valid = np.isfinite(depth) & (depth > 0)
    weight = valid.astype(np.float32)
    linear = weight * _linear(np.where(valid, depth, 1), camera)
    # Regression over each window with offsets (u, v) from its centre: means, then (co)variances, then slopes.
    count, u, v, uu, uv, vv = _window_sums(weight, window, [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)])
    q, uq, vq = _window_sums(linear, window, [(0, 0), (1, 0), (0, 1)])
    share = 1 / np.maximum(count, 1)
    u, v, q = u * share, v * share, q * share
    uu, vv, uv, uq, vq = (
        uu * share - u * u,
        vv * share - v * v,
        uv * share - u * v,
        uq * share - u * q,
        vq * share - v * q,
    )
    determinant = uu * vv - uv * uv
    known = determinant > 1e-3
    if not known.any():
        raise UserError("a depth image has too few valid pixels side by side to fit normals.")
    scale = 1 / np.where(known, determinant, 1)
    slope_u, slope_v = (uq * vv - vq * uv) * scale, (vq * uu - uq * uv) * scale
    x, y = _rays(depth.shape, camera)
    a, b = slope_u * np.float32(camera.fx), slope_v * np.float32(camera.fy)
    c = np.ones_like(q) if camera.orthographic else q - u * slope_u - v * slope_v - a * x - b * y
    length = np.where(known, np.sqrt(a * a + b * b + c * c), 1)
    return _from_nearest(np.stack([a, b, c], axis=-1) / -length[..., None], known)


def window_for(depth: Float32[np.ndarray, "h w"], camera: Camera, largest: int = 15) -> int:
    """The smallest odd window of `normals` in which noise turns 95 of 100 normals by less than 3 degrees.

    Noise of s metres in pixels p metres apart turns the normal of a window of w pixels each way by s/p over the root of
    w^2 (w^2 - 1) / 12, the sum of the squared offsets: 2.4 for 3, 7 for 5, 14 for 7, 35 for 11. s/p in radians is
    estimated from the median of second differences along the rows, which are zero on planes, and from the step of
    quantised depth. One window serves a whole dataset, else normals would be smoothed more in one image than another.

    Args:
        depth: one image of the dataset, NaN where missing.
        camera: of the image.
        largest: what smooths away more than noise.
    """
    valid = np.isfinite(depth) & (depth > 0)
    metres = np.where(valid, depth, np.nan)
    spread = np.where(valid, 1.0, np.nan) if camera.orthographic else metres
    pitch = spread / camera.fx  # metres between pixels
    linear = _linear(metres, camera)
    second = linear[:, :-2] - 2 * linear[:, 1:-1] + linear[:, 2:]
    # A change of 1/z by d is one of z by z^2 d.
    second = np.abs(second * spread[:, 1:-1] ** 2 / pitch[:, 1:-1])
    if np.isnan(second).all():
        return largest
    noise = 1.4826 * np.nanmedian(second) / np.sqrt(6)
    levels = np.diff(np.unique(depth[valid]))
    step = levels.min() / np.nanmedian(pitch) if len(levels) else 0
    noise = np.hypot(noise, step / np.sqrt(12))
    allowed = np.radians(3) / np.sqrt(-2 * np.log(0.05))  # 95 % of a normal distribution in two dimensions
    sizes = np.arange(3, largest + 1, 2)
    enough = sizes[noise <= allowed * np.sqrt(valid.mean() * sizes**2 * (sizes**2 - 1) / 12)]
    return int(enough[0]) if len(enough) else largest


def with_normals(surface: Surface, official: Float32[np.ndarray, "h w 3"]) -> Surface:
    """A surface with other normals, given in the camera's axes."""
    return replace(surface, normals=official @ surface.plane.axes.T.astype(np.float32))


def object_mask(height: Float[np.ndarray, "h w"], threshold: float) -> Bool[np.ndarray, "h w"]:
    """Where the surface rises more than `threshold` metres above the plane: the object, and what stands beside it."""
    return height > threshold


def free_standing(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The 8-connected pieces of an object mask that the image does not cut off: no side walls, no bars across."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3)))
    edge = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
    return mask & ~np.isin(pieces, edge)


def check_encoding(encoding: str) -> None:
    """Raises UserError unless `encode` knows it."""
    if encoding not in ENCODINGS:
        raise UserError(f'config.input.depth_encoding is "{encoding}"; use one of {", ".join(ENCODINGS)}.')


def encode(surface: Surface, encoding: str, height_range: float) -> Float32[np.ndarray, "h w 3"]:
    """A surface as an image with values 0 to 255.

    `normals`: in the plane's axes, so that the background has one colour whatever the camera's tilt and an object's
    slopes use the whole range. `normals_official`: the same of a surface `with_normals`. `height`: 0 to `height_range`
    metres above the plane, three times. `height+normals`: height and the normal's two components along the plane.
    `xyz_uint8`: metres * 255 cast to 8 bits (they wrap), for comparison only.

    Raises:
        UserError: the encoding is unknown.
    """
    check_encoding(encoding)
    height = np.clip(surface.height / height_range, 0, 1) * np.float32(255)
    directions = (surface.normals + 1) * np.float32(127.5)
    match encoding:
        case "normals" | "normals_official":
            return directions
        case "height":
            return np.repeat(height[..., None], 3, axis=-1)
        case "height+normals":
            return np.concatenate([height[..., None], directions[..., :2]], axis=-1)
        case _:
            return (surface.points * 255).astype(np.int32).astype(np.uint8).astype(np.float32)


def _rays(shape: tuple[int, ...], camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """x/z (1, w) and y/z (h, 1) of every pixel's ray; of an orthographic camera, x and y."""
    x = (np.arange(shape[1], dtype=np.float32) - np.float32(camera.cx)) / np.float32(camera.fx)
    y = (np.arange(shape[0], dtype=np.float32) - np.float32(camera.cy)) / np.float32(camera.fy)
    return x[None, :], y[:, None]


def _linear(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """What is linear over the image of a plane."""
    return -depth if camera.orthographic else 1 / depth


def _window_sums(image: np.ndarray, window: int, powers: list[tuple[int, int]]) -> list[np.ndarray]:
    """Sums of u^i v^j image over the window around every pixel, for each (i, j); zero outside the image."""
    reach = window // 2
    padded = np.pad(image, reach)

    def along(image: np.ndarray, axis: int, power: int) -> np.ndarray:
        side = image.shape[axis] - 2 * reach
        total = np.zeros_like(image, shape=(side, image.shape[1]) if axis == 0 else (image.shape[0], side))
        for start in range(window):
            part = image[start : start + side] if axis == 0 else image[:, start : start + side]
            total += part * np.float32((start - reach) ** power)
        return total

    rows = {i: along(padded, 1, i) for i, _ in powers}
    return [along(rows[i], 0, j) for i, j in powers]


def _from_nearest(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """An image (h, w, ...) with what is not known taken from the nearest known pixel."""
    if known.all():
        return image.copy()
    rows, columns = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    return image[rows, columns]
