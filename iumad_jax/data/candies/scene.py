"""The conveyor belt, the lamps and the camera: images, depth and normals of a sweet.

Rendering takes two passes, as in deferred shading. The geometry pass computes the surface in each pixel: the sweet by
sphere tracing of its signed distance (Hart, "Sphere tracing", 1996), the belt as a plane. The lighting pass computes
colours.

World frame: x right, y away from the camera, z up from the belt's surface, in metres. Camera frame, as in Eyecandies'
files: x right, y up, z towards the camera.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.data.candies import procedural, sweets
from iumad_jax.data.candies.defects import Defects, apply_creases, apply_stain, relief
from iumad_jax.data.candies.sweets import Look, Material, norm

FOCAL = 711.11 / 512  # focal length over the image's width
POSE = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.5**0.5, -(0.5**0.5), -2.121320343559642385],
        [0.0, 0.5**0.5, 0.5**0.5, 2.221320343559642918],
        [0.0, 0.0, 0.0, 1.0],
    ]
)  # camera-to-world matrix of Eyecandies

TILES, TILE = 16, (0.135, 0.34)  # number of tiles across the belt; width and length of a tile
BELT_HALF_WIDTH = TILES * TILE[0] / 2
PLATE = -0.06  # metres; height of the steel plates beside the belt

# Positions of the four lamps, and usual brightness of each lamp (columns) in each of the six images (rows); the last
# column is ambient light. Image 0 is lit from the camera's side, 1 to 3 by one lamp each, 4 by one lamp with some
# ambient light, 5 by all.
LAMPS = np.array([[-0.9, -2.2, 2.6], [0.5, 2.2, 2.4], [-2.4, 0.2, 2.0], [2.3, -0.3, 2.2]])
BRIGHTNESS = np.array(
    [
        [1.10, 0.00, 0.00, 0.15, 0.30],
        [0.00, 1.00, 0.00, 0.00, 0.06],
        [0.00, 0.00, 1.00, 0.00, 0.06],
        [0.80, 0.00, 0.00, 0.00, 0.06],
        [0.10, 0.05, 0.10, 1.00, 0.20],
        [0.60, 0.35, 0.40, 0.60, 0.45],
    ]
)
LAMP_TURN = 1.4  # radians by which the lamps have moved around the belt where Look.lamp is 1
LAMP_COLOUR = np.array([0.62, 0.38, 0.18], np.float32)  # factor of all light, linear RGB, where Look.lamp is 1
EXPOSURE = 1.5
SHADOW_SHARPNESS = 9.0
BLOTCH_FREQUENCY = 2.6  # waves per metre of the brighter and darker areas of a sweet, which are as wide as defects

STEPS, SHADOW_STEPS = 48, 16  # largest number of steps towards a surface, number of steps towards a lamp
HIT_DISTANCE = 4e-4  # a ray this close to the surface, in metres, has hit it
STEP_SHARE = 0.8  # fraction of the distance that a ray advances, since relief makes distances slightly too long

BELT_MATERIAL = Material(0.04, 12.0)
START_HEIGHT = 0.95  # metres; rays start here, above all sweets

Array = jax.Array | np.ndarray


def normalise(v: Array) -> Array:
    """Scale vectors (3, ...) to length 1."""
    return v / norm(*v)[None]


def rotate_z(v: Array, angle: Array) -> Array:
    """Rotate vectors (3, n) about the z axis."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]])


def lamp_positions(look: Look) -> Array:
    """Return the positions of the four lamps in metres, shape (4, 3)."""
    lamps = LAMPS.astype(np.float32)
    return lamps if look.lamp is None else rotate_z(lamps.T, LAMP_TURN * look.lamp).T


# ---- geometry ------------------------------------------------------------------------------------------------------


def sphere_trace(
    distance: Callable[[Array], Array], origin: Array, direction: Array, end: Array
) -> tuple[Array, Array]:
    """Follow rays to a surface by sphere tracing.

    Args:
        distance: Signed distance function, (3, n) -> (n,), in metres.
        origin: Common origin of the rays, shape (3,).
        direction: Unit directions, shape (3, n).
        end: Lengths in metres at which the rays stop, shape (n,).

    Returns:
        Lengths (n,) of the rays up to the hit or, for rays that miss, to the closest approach; and the distances (n,)
        to the surface there, divided by these lengths.
    """

    def proceed(state: tuple) -> tuple:
        count, length, _, least_ratio, best_length = state
        gap = distance(origin[:, None] + length[None] * direction)
        ratio = gap / length
        best_length = jnp.where(ratio < least_ratio, length, best_length)
        least_ratio = jnp.minimum(ratio, least_ratio)
        moving = (gap > HIT_DISTANCE) & (length < end)
        return count + 1, jnp.where(moving, length + STEP_SHARE * gap, length), moving.any(), least_ratio, best_length

    start = jnp.maximum((START_HEIGHT - origin[2]) / direction[2], 0.1)
    state = 0, start, True, jnp.full_like(end, jnp.inf), start
    *_, least_ratio, best_length = jax.lax.while_loop(lambda s: s[2] & (s[0] < STEPS), proceed, state)
    return best_length, least_ratio


def surface_normals(distance: Callable[[Array], Array], points: Array) -> Array:
    """Estimate unit normals (3, n) at surface points (3, n) by differences over the corners of a tetrahedron."""
    corners = jnp.array([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    gaps = jax.lax.map(lambda corner: distance(points + 1e-3 * corner[:, None]), corners)
    return normalise(jnp.einsum("ki,kn->in", corners, gaps))


def lamp_visibility(distance: Callable[[Array], Array], points: Array, lamps: Array) -> Array:
    """Compute the visibility (lamps, n) of each lamp (lamps, 3) from each point (3, n): 0..1, with soft shadows."""

    def visibility_of(lamp: Array) -> Array:
        direction = normalise(lamp[:, None] - points)

        def proceed(_: int, state: tuple) -> tuple:
            length, visible = state
            gap = distance(points + length[None] * direction)
            return length + jnp.clip(gap, 0.012, 0.12), jnp.minimum(visible, SHADOW_SHARPNESS * gap / length)

        start = jnp.full_like(points[0], 0.03)
        return jax.lax.fori_loop(0, SHADOW_STEPS, proceed, (start, jnp.ones_like(start)))[1]

    visible = jnp.clip(jax.lax.map(visibility_of, lamps), 0, 1)
    return visible * visible * (3 - 2 * visible)


def ambient_occlusion(distance: Callable[[Array], Array], points: Array, normals: Array) -> Array:
    """Estimate the fraction (n,) of ambient light that reaches points (3, n): 1 in the open, less in corners."""
    offsets = jnp.array([0.04, 0.12])
    gaps = jax.lax.map(lambda h: distance(points + h * normals), offsets)
    return jnp.clip(1 - (jnp.array([[5.0], [2.2]]) * jnp.maximum(offsets[:, None] - gaps, 0)).sum(0), 0.15, 1)


# ---- appearance ----------------------------------------------------------------------------------------------------


def belt_appearance(points: Array, along: Array, shift: Array, pixel: float) -> tuple[Array, Array]:
    """Compute colours and normals (3, n) of the belt, which has green tiles, and of the steel plates beside it.

    Args:
        points: Points on the belt or the plates, shape (3, n).
        along: Distances to the camera in metres, shape (n,).
        shift: Distance in metres by which the belt has moved, shape ().
        pixel: Width of a pixel in metres at a distance of 1 m; thinner seams are drawn wider and fainter.
    """
    x, y, z = points
    y = y + shift
    moved = jnp.stack([x, y, z])
    seams, slopes = [], []
    for value, tile, width, slant in ((x, TILE[0], 0.005, 1.0), (y, TILE[1], 0.008, 1.6)):
        spread = jnp.sqrt(width**2 + (0.5 * slant * pixel * along) ** 2)
        off = value - tile * jnp.round(value / tile)
        seams.append(jnp.exp(-((off / spread) ** 2)) * width / spread)
        slopes.append(-0.5 * seams[-1] * off / spread)
    worn = 0.06 * sweets.mottle(moved, 1.2, 0.0) + 0.04 * sweets.mottle(moved, 5.0, 0.0)
    green = jnp.array([[0.060], [0.140], [0.066]]) * ((1 - 0.45 * jnp.maximum(*seams)) * (1 + worn))[None]
    steel = jnp.array([[0.030], [0.031], [0.034]]) * (1 + 0.5 * worn)[None]
    on = jnp.abs(x) < BELT_HALF_WIDTH
    normal = normalise(jnp.stack([jnp.where(on, slopes[0], 0), jnp.where(on, slopes[1], 0), jnp.ones_like(x)]))
    return jnp.where(on[None], green, steel), normal


def blotches(points: Array, look: Look) -> Array:
    """Return factors (n,) of the sweet's colour at points (3, n) in its frame, which vary smoothly about 1."""
    return 1 + look.blotches * sweets.mottle(points + look.blotch_offset[:, None], BLOTCH_FREQUENCY, 0.0)


def shade(
    surface: "Surface", points: Array, normals: Array, albedo: Array, view: Array, material: Material, look: Look
) -> Array:
    """Compute the linear light (6, 3, n) of a material's points in the six images, seen along `view` (3, n)."""
    gloss, shininess, translucency = material
    lights = []
    for lamp, visible in zip(lamp_positions(look), surface.visibility, strict=True):
        to_lamp = jnp.asarray(lamp)[:, None] - points
        squared = (to_lamp * to_lamp).sum(0)
        to_lamp = to_lamp / jnp.sqrt(squared)[None]
        slant = (normals * to_lamp).sum(0)
        wrap = 0.5 * translucency  # light that passes through translucent material
        diffuse = jnp.maximum((slant + wrap) / (1 + wrap), 0) * (visible + wrap * (1 - visible))
        half = normalise(to_lamp - view)
        highlight = gloss * jnp.maximum((normals * half).sum(0), 1e-6) ** shininess * (slant > 0) * visible
        lights.append((albedo * diffuse[None] + highlight[None]) * (9.0 / squared)[None])
    grazing = (1 + (normals * view).sum(0)) ** 4
    sky = 0.65 + 0.35 * normals[2]
    lights.append((albedo * sky[None] + (0.35 * gloss * grazing)[None]) * surface.openness[None])
    return EXPOSURE * jnp.einsum("ij,jcn->icn", look.brightness, jnp.stack(lights))


def tone_map(light: Array) -> Array:
    """Convert linear light to 8-bit screen values, compressing highlights smoothly instead of clipping them."""
    return (255 * (1 - jnp.exp(-light)) ** (1 / 2.2) + 0.5).astype(jnp.uint8)


# ---- the two passes ------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """The camera's rays and where they meet the floor (belt or plates), for pixels in row-major order."""

    direction: np.ndarray  # (3, n) unit vectors
    per_metre: np.ndarray  # (n,) metres along the ray per metre of depth
    floor_depth: np.ndarray  # (n,) metres along the optical axis


@lru_cache
def camera_view(size: int) -> View:
    """Compute the rays of a square image, from Eyecandies' pinhole camera scaled to its size."""
    offset = (np.arange(size) - (size - 1) / 2) / (FOCAL * size)
    x, y = np.meshgrid(offset, -offset)
    ray = np.einsum("ij,jn->in", POSE[:3, :3], np.stack([x.ravel(), y.ravel(), -np.ones(size * size)]))
    depth = -POSE[2, 3] / ray[2]
    beside = np.abs(ray[0] * depth) > BELT_HALF_WIDTH
    depth = np.where(beside, (PLATE - POSE[2, 3]) / ray[2], depth)
    length = np.linalg.norm(ray, axis=0)
    return View(*(a.astype(np.float32) for a in (ray / length, length, depth)))


class Surface(NamedTuple):
    """Visible surface per pixel, (n,) or (channels, n); the sweet's fields are undefined where a ray hits the floor."""

    hit: Array  # whether the ray hits the sweet
    cover: Array  # fraction of the pixel that the sweet covers, for smooth outlines in the images
    depth: Array  # metres along the optical axis
    local_point: Array  # surface point in the sweet's frame
    local_normal: Array  # normal in the sweet's frame, without creases
    facing: Array  # cosine between local_normal and the direction to the camera
    normal: Array  # normal in the world frame, with creases
    albedo: Array  # linear RGB
    visibility: Array  # visible fraction of each lamp
    openness: Array  # fraction of the ambient light that arrives


def compile_geometry_pass(name: str, size: int) -> Callable[[Look, Defects], Surface]:
    """Return the compiled geometry pass of a sweet, which maps a look and defects to the visible surface."""
    sweet = procedural.sweet(name)
    return _compile(sweet.distance, sweet.colour, size)


@cache
def _compile(
    sweet_distance: Callable[[Array, Look], Array], sweet_colour: Callable[[Array, Look], Array], size: int
) -> Callable[[Look, Defects], Surface]:
    view = camera_view(size)
    origin = POSE[:3, 3].astype(np.float32)
    floor_along = view.floor_depth * view.per_metre
    floor = origin[:, None] + floor_along * view.direction

    def geometry_pass(look: Look, defects: Defects) -> Surface:
        position = jnp.concatenate([look.position, jnp.zeros(1)])[:, None]

        def distance(local: Array) -> Array:
            return sweet_distance(local, look) - relief(local, defects)

        def to_sweet(world: Array) -> Array:
            return rotate_z(world - position, -look.rotation) / look.scale

        def world_distance(world: Array) -> Array:
            return distance(to_sweet(world)) * look.scale

        # Rays are traced in the sweet's frame, where lengths are divided by its scale.
        eye, ray = to_sweet(origin[:, None])[:, 0], rotate_z(jnp.asarray(view.direction), -look.rotation)
        along, miss_ratio = sphere_trace(distance, eye, ray, floor_along / look.scale)
        local_point = eye[:, None] + along[None] * ray
        along = along * look.scale
        above = along < floor_along
        hit = (miss_ratio * along < 2 * HIT_DISTANCE) & above
        cover = jnp.where(hit, 1.0, jnp.clip(1 - miss_ratio * FOCAL * size, 0, 1) * above)

        local_normal = surface_normals(distance, local_point)
        smooth = rotate_z(local_normal, look.rotation)
        up = jnp.array([[0.0], [0.0], [1.0]])
        colour = sweet_colour(local_point, look) * blotches(local_point, look)[None]
        shadow_origin = jnp.where(hit[None], origin[:, None] + along[None] * view.direction + 0.004 * smooth, floor)
        return Surface(
            hit=hit,
            cover=cover,
            depth=jnp.where(hit, along, floor_along) / view.per_metre,
            local_point=local_point,
            local_normal=local_normal,
            facing=-(local_normal * ray).sum(0),
            normal=rotate_z(apply_creases(local_normal, local_point, defects), look.rotation),
            albedo=apply_stain(jnp.clip(colour, 0, 1), local_point, defects),
            visibility=lamp_visibility(world_distance, shadow_origin, lamp_positions(look)),
            openness=ambient_occlusion(world_distance, shadow_origin, jnp.where(hit[None], smooth, up)),
        )

    return jax.jit(geometry_pass)


@partial(jax.jit, static_argnames="size")
def lighting_pass(surface: Surface, material: Material, look: Look, size: int) -> tuple[Array, Array]:
    """Render the images and the normals from the result of the geometry pass.

    Args:
        surface: Visible surface.
        material: Material of the sweet.
        look: Look of the sample, which determines the light and how far the belt has moved.
        size: Side of the images in pixels.

    Returns:
        The six images, uint8, shape (6, size, size, 3); and unit normals in the camera frame, shape (size, size, 3).
    """
    view = camera_view(size)
    origin = POSE[:3, 3].astype(np.float32)[:, None]
    floor_along = view.floor_depth * view.per_metre
    floor = origin + floor_along * view.direction
    belt_colour, belt_normal = belt_appearance(
        jnp.asarray(floor), jnp.asarray(floor_along), look.belt_shift, 1 / (FOCAL * size)
    )
    background = shade(surface, floor, belt_normal, belt_colour, view.direction, BELT_MATERIAL, look)
    points = origin + (surface.depth * view.per_metre)[None] * view.direction
    contact = jnp.clip(0.55 + 2.5 * points[2], 0, 1)  # little light reaches the contact of sweet and belt
    near_belt = surface._replace(openness=surface.openness * jnp.where(surface.hit, contact, 1))
    sweet = shade(near_belt, points, surface.normal, surface.albedo, view.direction, material, look)
    light = background + (sweet - background) * surface.cover[None, None]
    if look.lamp is not None:
        light = light * (1 + look.lamp * (LAMP_COLOUR - 1))[None, :, None]
    normal = jnp.where(surface.hit[None], surface.normal, belt_normal)
    normal = jnp.einsum("ji,jn->ni", jnp.asarray(POSE[:3, :3], jnp.float32), normal)
    return jnp.moveaxis(tone_map(light), 1, -1).reshape(len(BRIGHTNESS), size, size, 3), normal.reshape(size, size, 3)
