"""The conveyor belt, the lights and the camera: from a sweet to pictures, depth and normals.

Two passes, as in deferred shading. The first finds what each pixel shows: the sweet by sphere tracing its signed
distance (Hart, "Sphere tracing", 1996), the belt as a plane, exactly. The second lights it.

World frame: x right, y away from the camera, z up from the belt's surface, metres. Camera frame as in Eyecandies'
files: x right, y up, z towards the camera.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.data.candies import defects as flaws
from iumad_jax.data.candies import sweets
from iumad_jax.data.candies.defects import Defects
from iumad_jax.data.candies.sweets import Look, Material, norm

FOCAL = 711.11 / 512  # of the picture's width
POSE = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.5**0.5, -(0.5**0.5), -2.121320343559642385],
        [0.0, 0.5**0.5, 0.5**0.5, 2.221320343559642918],
        [0.0, 0.0, 0.0, 1.0],
    ]
)  # Eyecandies' own

TILES, TILE = 16, (0.135, 0.34)  # tiles across the belt; width and length of one
BELT_HALF_WIDTH = TILES * TILE[0] / 2
PLATE = -0.06  # height of the steel plates beside the belt, below its surface

# Four lamps: where they hang, and how bright each is in each of the six pictures; the last column is the light from
# everywhere. Picture 0 is lit from the camera's side, 1 to 3 by one lamp each, 4 by one lamp and some light from
# everywhere, 5 by all.
LAMPS = np.array([[-0.9, -2.2, 2.6], [0.5, 2.2, 2.4], [-2.4, 0.2, 2.0], [2.3, -0.3, 2.2]])
RIG = np.array(
    [
        [1.10, 0.00, 0.00, 0.15, 0.30],
        [0.00, 1.00, 0.00, 0.00, 0.06],
        [0.00, 0.00, 1.00, 0.00, 0.06],
        [0.80, 0.00, 0.00, 0.00, 0.06],
        [0.10, 0.05, 0.10, 1.00, 0.20],
        [0.60, 0.35, 0.40, 0.60, 0.45],
    ]
)
EXPOSURE = 1.5
SOFTNESS = 9.0  # of the shadows: larger is sharper

STEPS, SHADOW_STEPS = 48, 16
HIT = 4e-4  # metres from the surface at which a ray has arrived
CAREFUL = 0.8  # share of the distance that a step goes: relief makes distances a little too long

BELT_MATERIAL = Material(0.04, 12.0)
TALLEST = 0.95  # metres: rays start here

Array = jax.Array | np.ndarray


def unit(v: Array) -> Array:
    """Vectors (3, ...) at length 1."""
    return v / norm(*v)[None]


def turned(v: Array, angle: Array) -> Array:
    """Vectors (3, n) turned about z."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]])


# ---- what is where -------------------------------------------------------------------------------------------------


def trace(distance: Callable[[Array], Array], origin: Array, direction: Array, end: Array) -> tuple[Array, Array]:
    """Follow rays to a surface.

    Args:
        distance: signed distance (3, n) -> (n,), metres.
        origin: (3,).
        direction: (3, n), length 1.
        end: (n,) metres along the rays at which they stop.

    Returns:
        Metres along each ray (n,) to its hit or, if it misses, to where it passes closest; and how far from the
        surface that is, per metre along the ray (n,).
    """

    def proceed(state: tuple) -> tuple:
        count, along, _, nearest, at = state
        gap = distance(origin[:, None] + along[None] * direction)
        near = gap / along
        at, nearest = jnp.where(near < nearest, along, at), jnp.minimum(near, nearest)
        moving = (gap > HIT) & (along < end)
        return count + 1, jnp.where(moving, along + CAREFUL * gap, along), moving.any(), nearest, at

    start = jnp.maximum((TALLEST - origin[2]) / direction[2], 0.1)
    state = 0, start, True, jnp.full_like(end, jnp.inf), start
    *_, nearest, at = jax.lax.while_loop(lambda s: s[2] & (s[0] < STEPS), proceed, state)
    return at, nearest


def gradient(distance: Callable[[Array], Array], points: Array) -> Array:
    """Unit normals (3, n) of the surface at points (3, n) on it, by differences over the corners of a tetrahedron."""
    corners = jnp.array([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    gaps = jax.lax.map(lambda corner: distance(points + 1e-3 * corner[:, None]), corners)
    return unit(jnp.einsum("ki,kn->in", corners, gaps))


def shadows(distance: Callable[[Array], Array], points: Array, lamps: Array) -> Array:
    """How much of each lamp (lamps, 3) each point (3, n) sees: (lamps, n) in 0..1, soft at the edge."""

    def from_lamp(lamp: Array) -> Array:
        direction = unit(lamp[:, None] - points)

        def proceed(_: int, state: tuple) -> tuple:
            along, seen = state
            gap = distance(points + along[None] * direction)
            return along + jnp.clip(gap, 0.012, 0.12), jnp.minimum(seen, SOFTNESS * gap / along)

        along = jnp.full_like(points[0], 0.03)
        return jax.lax.fori_loop(0, SHADOW_STEPS, proceed, (along, jnp.ones_like(along)))[1]

    seen = jnp.clip(jax.lax.map(from_lamp, lamps), 0, 1)
    return seen * seen * (3 - 2 * seen)


def openness(distance: Callable[[Array], Array], points: Array, normals: Array) -> Array:
    """Ambient occlusion (n,): 1 where nothing is near, towards 0 in corners."""
    reach = jnp.array([0.04, 0.12])
    gaps = jax.lax.map(lambda h: distance(points + h * normals), reach)
    return jnp.clip(1 - (jnp.array([[5.0], [2.2]]) * jnp.maximum(reach[:, None] - gaps, 0)).sum(0), 0.15, 1)


# ---- how it looks --------------------------------------------------------------------------------------------------


def belt(points: Array, along: Array, shift: Array, pixel: float) -> tuple[Array, Array]:
    """Colour and normals (3, n) of the belt, a row of green tiles, and of the steel plates beside it.

    Args:
        points: (3, n) on it.
        along: (n,) metres from the camera.
        shift: () metres by which the belt has moved.
        pixel: metres that a pixel spans at 1 m: seams thinner than that are drawn wider and fainter.
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
    normal = unit(jnp.stack([jnp.where(on, slopes[0], 0), jnp.where(on, slopes[1], 0), jnp.ones_like(x)]))
    return jnp.where(on[None], green, steel), normal


def lit(surface: "Surface", points: Array, normals: Array, albedo: Array, view: Array, material: Material) -> Array:
    """The six pictures (6, 3, n), linear, of points of a material seen along `view` (3, n)."""
    gloss, shine, translucency = material
    lights = []
    for lamp, seen in zip(LAMPS, surface.seen, strict=True):
        towards = jnp.asarray(lamp, jnp.float32)[:, None] - points
        squared = (towards * towards).sum(0)
        towards = towards / jnp.sqrt(squared)[None]
        slant = (normals * towards).sum(0)
        wrap = 0.5 * translucency  # light that comes round the corner, through the jelly
        diffuse = jnp.maximum((slant + wrap) / (1 + wrap), 0) * (seen + wrap * (1 - seen))
        half = unit(towards - view)
        highlight = gloss * jnp.maximum((normals * half).sum(0), 1e-6) ** shine * (slant > 0) * seen
        lights.append((albedo * diffuse[None] + highlight[None]) * (9.0 / squared)[None])
    grazing = (1 + (normals * view).sum(0)) ** 4
    sky = 0.65 + 0.35 * normals[2]
    lights.append((albedo * sky[None] + (0.35 * gloss * grazing)[None]) * surface.open[None])
    return EXPOSURE * jnp.einsum("ij,jcn->icn", jnp.asarray(RIG, jnp.float32), jnp.stack(lights))


def screen(light: Array) -> Array:
    """Linear light as 8-bit values for a screen, with a soft shoulder instead of clipped highlights."""
    return (255 * (1 - jnp.exp(-light)) ** (1 / 2.2) + 0.5).astype(jnp.uint8)


# ---- the two passes ------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """The camera's rays at a picture size and where they meet the floor: (3, n) and (n,), pixels row by row."""

    direction: np.ndarray  # length 1
    per_metre: np.ndarray  # metres along the ray per metre of depth
    floor_depth: np.ndarray  # metres along the optical axis


@lru_cache
def view_of(size: int) -> View:
    """The rays of a square picture: Eyecandies' pinhole camera, scaled to its size."""
    offset = (np.arange(size) - (size - 1) / 2) / (FOCAL * size)
    x, y = np.meshgrid(offset, -offset)
    ray = np.einsum("ij,jn->in", POSE[:3, :3], np.stack([x.ravel(), y.ravel(), -np.ones(size * size)]))
    depth = -POSE[2, 3] / ray[2]
    beside = np.abs(ray[0] * depth) > BELT_HALF_WIDTH
    depth = np.where(beside, (PLATE - POSE[2, 3]) / ray[2], depth)
    length = np.linalg.norm(ray, axis=0)
    return View(*(a.astype(np.float32) for a in (ray / length, length, depth)))


class Surface(NamedTuple):
    """What the rays meet, (n,) or (channels, n). Where they meet the floor, the fields of the sweet mean nothing."""

    hit: Array  # whether it is the sweet
    cover: Array  # share of the pixel that the sweet covers, for smooth outlines in the pictures
    depth: Array  # metres along the optical axis
    local: Array  # the point in the sweet's frame
    local_normal: Array  # there, before creases
    facing: Array  # cosine between it and the direction to the camera
    normal: Array  # in the world's frame, with creases
    albedo: Array  # linear RGB
    seen: Array  # how much of each lamp
    open: Array  # how much of the sky


@cache
def surveyor(name: str, size: int) -> Callable[[Look, Defects], Surface]:
    """The compiled first pass for one sweet: an instance and its defects -> what each pixel shows."""
    sweet = sweets.SWEETS[name]
    view = view_of(size)
    origin = POSE[:3, 3].astype(np.float32)
    floor_along = view.floor_depth * view.per_metre
    floor = origin[:, None] + floor_along * view.direction

    def survey(look: Look, defects: Defects) -> Surface:
        place = jnp.concatenate([look.place, jnp.zeros(1)])[:, None]

        def distance(local: Array) -> Array:
            return sweet.distance(local, look) - flaws.relief(local, defects)

        def to_sweet(world: Array) -> Array:
            return turned(world - place, -look.turn) / look.scale

        def world_distance(world: Array) -> Array:
            return distance(to_sweet(world)) * look.scale

        # Rays are followed in the sweet's own frame, where lengths are 1/scale as long.
        eye, ray = to_sweet(origin[:, None])[:, 0], turned(jnp.asarray(view.direction), -look.turn)
        along, nearest = trace(distance, eye, ray, floor_along / look.scale)
        local = eye[:, None] + along[None] * ray
        along = along * look.scale
        above = along < floor_along
        hit = (nearest * along < 2 * HIT) & above
        cover = jnp.where(hit, 1.0, jnp.clip(1 - nearest * FOCAL * size, 0, 1) * above)

        local_normal = gradient(distance, local)
        smooth = turned(local_normal, look.turn)
        up = jnp.array([[0.0], [0.0], [1.0]])
        lit_from = jnp.where(hit[None], origin[:, None] + along[None] * view.direction + 0.004 * smooth, floor)
        return Surface(
            hit=hit,
            cover=cover,
            depth=jnp.where(hit, along, floor_along) / view.per_metre,
            local=local,
            local_normal=local_normal,
            facing=-(local_normal * ray).sum(0),
            normal=turned(flaws.creased(local_normal, local, defects), look.turn),
            albedo=flaws.stained(jnp.clip(sweet.colour(local, look), 0, 1), local, defects),
            seen=shadows(world_distance, lit_from, jnp.asarray(LAMPS, jnp.float32)),
            open=openness(world_distance, lit_from, jnp.where(hit[None], smooth, up)),
        )

    return jax.jit(survey)


@partial(jax.jit, static_argnames="size")
def photograph(surface: Surface, material: Material, shift: Array, size: int) -> tuple[Array, Array]:
    """The second pass: the six pictures (6, size, size, 3) uint8, and unit normals (size, size, 3), camera frame.

    Args:
        surface: what each pixel shows.
        material: the sweet's.
        shift: metres by which the belt has moved.
        size: of the pictures.
    """
    view = view_of(size)
    origin = POSE[:3, 3].astype(np.float32)[:, None]
    floor_along = view.floor_depth * view.per_metre
    floor = origin + floor_along * view.direction
    belt_colour, belt_normal = belt(jnp.asarray(floor), jnp.asarray(floor_along), shift, 1 / (FOCAL * size))
    behind = lit(surface, floor, belt_normal, belt_colour, view.direction, BELT_MATERIAL)
    points = origin + (surface.depth * view.per_metre)[None] * view.direction
    contact = jnp.clip(0.55 + 2.5 * points[2], 0, 1)  # little light reaches where the sweet meets the belt
    near_belt = surface._replace(open=surface.open * jnp.where(surface.hit, contact, 1))
    sweet = lit(near_belt, points, surface.normal, surface.albedo, view.direction, material)
    light = behind + (sweet - behind) * surface.cover[None, None]
    normal = jnp.where(surface.hit[None], surface.normal, belt_normal)
    normal = jnp.einsum("ji,jn->ni", jnp.asarray(POSE[:3, :3], jnp.float32), normal)
    return jnp.moveaxis(screen(light), 1, -1).reshape(len(RIG), size, size, 3), normal.reshape(size, size, 3)
