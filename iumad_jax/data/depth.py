"""Geometry from metric depth, and its encoding as images for networks trained on photographs.

All lengths are metres. Camera coordinates: x right, y down, z along the optical axis.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy import ndimage

from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError

ENCODINGS = ("normals", "height", "height+normals", "xyz_uint8", "normals_official")


@dataclass(frozen=True)
class Plane:
    """Plane of all points p with normal . p + distance = 0."""

    normal: Float[np.ndarray, "3"]  # unit vector towards the camera
    distance: float  # distance of the origin from the plane, >= 0 unless the camera is orthographic

    @property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Right-handed axes in rows: the camera's x projected onto the plane, away from the camera, up."""
        right = np.array([1.0, 0.0, 0.0]) - self.normal[0] * self.normal
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(self.normal, right), self.normal])


@dataclass(frozen=True, eq=False)
class Surface:
    """Geometry of a depth image, whose missing depth is filled from the nearest valid pixel."""

    valid: Bool[np.ndarray, "h w"]  # pixels with measured depth
    points: Float32[np.ndarray, "h w 3"]  # camera coordinates
    plane: Plane  # background plane on which the object lies
    height: Float32[np.ndarray, "h w"]  # height above the plane
    normals: Float32[np.ndarray, "h w 3"]  # unit vectors in the plane's axes


def measure(depth: Float32[np.ndarray, "h w"], camera: Camera, window: int = 3) -> Surface:
    """Measure the surface in a depth image.

    Args:
        depth: Depth image, NaN where depth is missing.
        camera: Camera of the depth image.
        window: Side of the window in which normals are fitted, in pixels; see `normals`.

    Raises:
        UserError: If too few pixels are valid to fit a plane or normals.
    """
    filled, valid = fill_missing(depth, camera)
    points = backproject(filled, camera)
    plane = fit_plane(border(points, valid), camera.orthographic)
    in_plane_axes = normals(depth, camera, window) @ plane.axes.T.astype(np.float32)
    return Surface(valid, points, plane, height_above(points, plane), in_plane_axes)


def measured(depth: Float[np.ndarray, "h w"], camera: Camera) -> Bool[np.ndarray, "h w"]:
    """Find the pixels with measured depth: finite, and above 0 unless it is heights."""
    return np.isfinite(depth) & (camera.heights | (depth > 0))


def fill_missing(
    depth: Float32[np.ndarray, "h w"], camera: Camera
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Fill missing depth from the nearest valid pixel.

    Returns:
        The filled depth, and a mask of the valid pixels, see `measured`.

    Raises:
        UserError: If no pixel is valid.
    """
    valid = measured(depth, camera)
    if not valid.any():
        raise UserError("the depth image has no valid pixel; replace the image.")
    return _from_nearest(depth, valid), valid


def backproject(depth: Float32[np.ndarray, "h w"], camera: Camera) -> Float32[np.ndarray, "h w 3"]:
    """Convert depth to points in camera coordinates."""
    x, y = _rays(depth.shape, camera)
    scale = np.ones_like(depth) if camera.orthographic else depth
    return np.stack([x * scale, y * scale, -depth if camera.heights else depth], axis=-1)


def project(points: Float[np.ndarray, "n 3"], camera: Camera, size: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """Project points in camera coordinates to a depth image of (h, w) pixels: the nearest per pixel, NaN where none."""
    x, y, z = points[(points[:, 2] > 0) & np.isfinite(points).all(-1)].T
    scale = 1 if camera.orthographic else z
    pixels = np.stack([camera.fy * y / scale + camera.cy, camera.fx * x / scale + camera.cx])
    inside = ((pixels > -0.5) & (pixels < np.array(size)[:, None] - 0.5)).all(0)
    depth = np.full(size, np.inf, np.float32)
    np.minimum.at(depth, tuple(np.rint(pixels[:, inside]).astype(int)), z[inside].astype(np.float32))
    return np.where(np.isinf(depth), np.float32(np.nan), depth)


def border(
    points: Float[np.ndarray, "h w 3"], valid: Bool[np.ndarray, "h w"], width: float = 1 / 16, max_points: int = 2048
) -> Float[np.ndarray, "n 3"]:
    """Select valid points in a frame along the image's edge, which shows background, and thin them evenly.

    Args:
        points: Points in camera coordinates.
        valid: Pixels with measured depth. If fewer than 100 lie in the frame, points of the whole image are selected.
        width: Width of the frame as a fraction of the image's sides.
        max_points: Largest number of points to return.
    """
    height_px, width_px = valid.shape
    rows, columns = max(1, round(width * height_px)), max(1, round(width * width_px))
    frame = valid.copy()
    frame[rows : height_px - rows, columns : width_px - columns] = False
    selected = points[frame if frame.sum() >= 100 else valid]
    return selected[:: -(-len(selected) // max_points)]


def fit_plane(points: Float[np.ndarray, "n 3"], orthographic: bool = False, trials: int = 256) -> Plane:
    """Fit a plane to most of the points by RANSAC with a truncated quadratic cost (MSAC; Torr and Zisserman, 2000).

    The best of `trials` planes through three random points each is refined by least squares on the points within 2 mm
    of it, or within 1 % of the scene's size if that is less than 20 cm. The random seed is fixed. If half of the points
    lie off the plane, all 256 trials miss it with a probability of 1e-15.

    Raises:
        UserError: If the points do not span a plane.
    """
    points = points.astype(np.float64)
    if len(points) >= 3:
        corners = points[np.random.default_rng(0).integers(len(points), size=(trials, 3))]
        candidates = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        lengths = np.linalg.norm(candidates, axis=1)
        usable = lengths > 1e-12
        candidates, anchors = candidates[usable] / lengths[usable, None], corners[usable, 0]
    if len(points) < 3 or not usable.any():
        raise UserError("the depth image has too few valid pixels to fit the background plane; replace the image.")
    tolerance = min(0.002, 0.01 * float(np.linalg.norm(np.ptp(points, axis=0))))
    offsets = points @ candidates.T - (candidates * anchors).sum(1)  # (n, trials)
    np.square(offsets, out=offsets)  # in place, since memory limits the speed
    cost = np.minimum(offsets, tolerance**2, out=offsets).sum(0)
    normal, centre = candidates[cost.argmin()], anchors[cost.argmin()]
    for _ in range(3):
        inliers = points[np.abs((points - centre) @ normal) < tolerance]
        centre = inliers.mean(0)
        normal = np.linalg.svd(inliers - centre, full_matrices=False)[2][2]
    distance = -normal @ centre
    sign = 1 if (-normal[2] if orthographic else distance) >= 0 else -1
    return Plane(sign * normal, float(sign * distance))


def height_above(points: Float32[np.ndarray, "h w 3"], plane: Plane) -> Float32[np.ndarray, "h w"]:
    """Compute the signed distance of points from a plane, positive on the camera's side."""
    return points @ plane.normal.astype(np.float32) + np.float32(plane.distance)


def normals(depth: Float32[np.ndarray, "h w"], camera: Camera, window: int = 3) -> Float32[np.ndarray, "h w 3"]:
    """Estimate unit normals towards the camera, in camera coordinates, by fitting a plane around every pixel.

    The inverse depth of a plane is linear over the image, 1/z = a (u - cx)/fx + b (v - cy)/fy + c with a normal along
    (a, b, c). The fit is therefore a linear regression over the window's valid pixels, exact for planes at any tilt.
    For an orthographic camera, -z replaces 1/z, and c = 1. If a window has too few valid pixels, the nearest fitted
    normal is used.

    Args:
        depth: Depth image, NaN where depth is missing.
        camera: Camera of the depth image.
        window: Side of the fitted window in pixels. The default suits renderings without noise; see `choose_window`.

    Raises:
        UserError: If no window has three valid pixels that span a plane.
    """
    valid = measured(depth, camera)
    weight = valid.astype(np.float32)
    linear = weight * _linearised(np.where(valid, depth, 1), camera)
    # Regress over each window on offsets (u, v) from its centre: means, then (co)variances, then slopes.
    count, u, v, uu, uv, vv = _window_sums(weight, window, [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)])
    q, uq, vq = _window_sums(linear, window, [(0, 0), (1, 0), (0, 1)])
    inverse_count = 1 / np.maximum(count, 1)
    u, v, q = u * inverse_count, v * inverse_count, q * inverse_count
    uu, vv, uv, uq, vq = (
        uu * inverse_count - u * u,
        vv * inverse_count - v * v,
        uv * inverse_count - u * v,
        uq * inverse_count - u * q,
        vq * inverse_count - v * q,
    )
    determinant = uu * vv - uv * uv
    fitted = determinant > 1e-3
    if not fitted.any():
        raise UserError("the depth image has too few valid pixels side by side to fit normals; replace the image.")
    scale = 1 / np.where(fitted, determinant, 1)
    slope_u, slope_v = (uq * vv - vq * uv) * scale, (vq * uu - uq * uv) * scale
    x, y = _rays(depth.shape, camera)
    a, b = slope_u * np.float32(camera.fx), slope_v * np.float32(camera.fy)
    c = np.ones_like(q) if camera.orthographic else q - u * slope_u - v * slope_v - a * x - b * y
    length = np.where(fitted, np.sqrt(a * a + b * b + c * c), 1)
    return _from_nearest(np.stack([a, b, c], axis=-1) / -length[..., None], fitted)


def choose_window(depth: Float32[np.ndarray, "h w"], camera: Camera, largest: int = 15) -> int:
    """Return the smallest odd window of `normals` in which noise tilts 95 % of the normals by less than 3 degrees.

    With noise of s metres and pixels p metres apart, the normal of a w x w window tilts along each axis by s/p radians
    divided by sqrt(w^2 (w^2 - 1) / 12), the root of the sum of the squared offsets: 2.4 for w = 3, 7 for 5, 35 for 11.
    s/p is estimated from the median of second differences along the rows, which are zero on planes, and from the step
    of quantised depth. Use one window for a whole dataset, so that normals are equally smooth in all images.

    Args:
        depth: Depth image of the dataset, NaN where depth is missing.
        camera: Camera of the depth image.
        largest: Largest window to return; larger ones would smooth away more than noise.
    """
    valid = measured(depth, camera)
    metres = np.where(valid, depth, np.nan)
    scale = np.where(valid, 1.0, np.nan) if camera.orthographic else metres
    pitch = scale / max(camera.fx, camera.fy)  # metres between pixels
    linear = _linearised(metres, camera)
    second_difference = linear[:, :-2] - 2 * linear[:, 1:-1] + linear[:, 2:]
    # A change of 1/z by d changes z by z^2 d.
    second_difference = np.abs(second_difference * scale[:, 1:-1] ** 2 / pitch[:, 1:-1])
    if np.isnan(second_difference).all():
        return largest
    noise = 1.4826 * np.nanmedian(second_difference) / np.sqrt(6)
    levels = np.diff(np.unique(depth[valid]))
    step = levels.min() / np.nanmedian(pitch) if len(levels) else 0
    noise = np.hypot(noise, step / np.sqrt(12))
    allowed = np.radians(3) / np.sqrt(-2 * np.log(0.05))  # 95 % quantile of a normal distribution in two dimensions
    sizes = np.arange(3, largest + 1, 2)
    sufficient = sizes[noise <= allowed * np.sqrt(valid.mean() * sizes**2 * (sizes**2 - 1) / 12)]
    return int(sufficient[0]) if len(sufficient) else largest


def picture(depth: Float32[np.ndarray, "h w"], camera: Camera) -> UInt8[np.ndarray, "h w 3"]:
    """Draw depth in place of a photograph: the nearest pixels white, the farthest and those without depth black."""
    depth = -depth if camera.heights else depth
    far, near = np.nanquantile(depth, [0.99, 0.01])
    grey = 255 * ((far - depth) / max(far - near, np.finfo(np.float32).tiny)).clip(0, 1)
    return np.repeat(np.nan_to_num(grey).astype(np.uint8)[..., None], 3, axis=-1)


def seems_heights(depth: Float32[np.ndarray, "h w"]) -> bool:
    """Whether the image's edge is nearer than its middle, as in a height map, by 1 % at least."""
    rows, columns = (max(1, side // 8) for side in depth.shape)
    edge = depth.copy()
    edge[rows:-rows, columns:-columns] = np.nan
    middle = depth[2 * rows : -2 * rows, 2 * columns : -2 * columns]
    measured_parts = [part[np.isfinite(part)] for part in (edge, middle)]
    return all(map(len, measured_parts)) and 1.01 * np.median(measured_parts[0]) < np.median(measured_parts[1])


def with_normals(surface: Surface, official: Float32[np.ndarray, "h w 3"]) -> Surface:
    """Replace the normals of a surface with official ones, which are in camera coordinates."""
    return replace(surface, normals=official @ surface.plane.axes.T.astype(np.float32))


def object_mask(height: Float[np.ndarray, "h w"], threshold: float) -> Bool[np.ndarray, "h w"]:
    """Mask the surface more than `threshold` metres above the plane: the object and anything beside it."""
    return height > threshold


def free_standing(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Remove 8-connected components that touch the image's edge, such as side walls and bars, from an object mask."""
    components, _ = ndimage.label(mask, np.ones((3, 3)))
    at_edge = np.concatenate([components[0], components[-1], components[:, 0], components[:, -1]])
    return mask & ~np.isin(components, at_edge)


def check_encoding(encoding: str) -> None:
    """Raise a UserError if the depth encoding is unknown."""
    if encoding not in ENCODINGS:
        raise UserError(f'config.input.depth_encoding is "{encoding}"; use one of {", ".join(ENCODINGS)}.')


def encode(surface: Surface, encoding: str, height_range: float) -> Float32[np.ndarray, "h w 3"]:
    """Encode a surface as an image with values from 0 to 255.

    `normals`: normals in the plane's axes, so that the background has one colour at any camera tilt and the object's
    slopes use the whole range. `normals_official`: the same encoding, for a surface from `with_normals`.
    `height`: height above the plane, 0 to `height_range` metres, in all three channels.
    `height+normals`: height, and the normal's two components along the plane.
    `xyz_uint8`: coordinates in metres * 255, cast to 8 bits with overflow; for comparison only.

    Raises:
        UserError: If the encoding is unknown.
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
    """Return x/z (1, w) and y/z (h, 1) of every pixel's ray, or x and y for an orthographic camera."""
    x = (np.arange(shape[1], dtype=np.float32) - np.float32(camera.cx)) / np.float32(camera.fx)
    y = (np.arange(shape[0], dtype=np.float32) - np.float32(camera.cy)) / np.float32(camera.fy)
    return x[None, :], y[:, None]


def _linearised(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Return 1/z, or -z for an orthographic camera; either is linear over the image of a plane."""
    if camera.heights:
        return depth
    return -depth if camera.orthographic else 1 / depth


def _window_sums(image: np.ndarray, window: int, powers: list[tuple[int, int]]) -> list[np.ndarray]:
    """Sum u^i v^j image over the window around every pixel for each (i, j); pixels outside the image are zero."""
    radius = window // 2
    padded = np.pad(image, radius)

    def sum_along(image: np.ndarray, axis: int, power: int) -> np.ndarray:
        length = image.shape[axis] - 2 * radius
        total = np.zeros_like(image, shape=(length, image.shape[1]) if axis == 0 else (image.shape[0], length))
        for start in range(window):
            part = image[start : start + length] if axis == 0 else image[:, start : start + length]
            total += part * np.float32((start - radius) ** power)
        return total

    rows = {i: sum_along(padded, 1, i) for i, _ in powers}
    return [sum_along(rows[i], 0, j) for i, j in powers]


def _from_nearest(image: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Replace invalid pixels of an image (h, w, ...) by the nearest valid pixel."""
    if valid.all():
        return image.copy()
    rows, columns = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return image[rows, columns]
