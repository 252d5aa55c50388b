"""The ten sweets: signed distance functions for their shapes, and colours of their surfaces.

In its own frame, a sweet lies on the plane z = 0 around the origin, with z up, in metres. Points are arrays (3, n):
the long axis is the last one, so that every operation is vectorised. Formulas of the primitives and of the smooth
union: Inigo Quilez, "3D SDFs" (https://iquilezles.org/articles/distfunctions/).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Look(NamedTuple):
    """Pose of an instance on the belt, and the parameters of its shape and colours."""

    position: Array  # (2,) metres
    rotation: Array  # () radians about z
    scale: Array  # ()
    shape: Array  # (4,) shape parameters, mostly within -1..1, with a different meaning for each sweet
    phase: Array  # () offset of stripes, swirls and grain, in turns
    palette: Array  # (4, 3) linear RGB
    belt_shift: Array  # () metres by which the belt has moved
    blotches: Array  # () relative strength of the brighter and darker areas of the sweet's colour
    blotch_offset: Array  # (3,) metres by which the pattern of these areas is moved
    brightness: Array  # (6, 5) brightness of the four lamps and of the ambient light in the six images
    lamp: Array | None = None  # () change of the lamps, up to 1: warm, dim and at another side; None for usual lamps
    recipe: Any = ()  # `procedural.Recipe`, for a procedural sweet


class Material(NamedTuple):
    """Optical properties of a surface."""

    gloss: float  # strength of the highlight
    shininess: float  # sharpness of the highlight
    translucency: float = 0.0  # 0 for opaque, 1 for jelly


@dataclass(frozen=True)
class Sweet:
    """A kind of sweet."""

    distance: Callable[[Array, Look], Array]  # signed distance, (3, n) -> (n,) metres
    colour: Callable[[Array, Look], Array]  # (3, n) -> (3, n) linear RGB
    material: Material
    rotation: float  # usual rotation about z in radians
    palette: tuple[tuple[float, float, float], ...]  # hue, saturation, value; at most four
    recipe: Any = ()  # `procedural.Recipe`, for a procedural sweet
    turn: float = 1.0  # factor by which its instances deviate more from the usual rotation
    shift: float = 1.0  # factor by which its instances deviate more from the usual position


# ---- primitives ----------------------------------------------------------------------------------------------------


def norm(*components: Array) -> Array:
    """Compute the length of a vector from its components, with a finite gradient at zero."""
    return jnp.sqrt(sum(c * c for c in components) + 1e-12)


def ellipsoid(x: Array, y: Array, z: Array, a: Array | float, b: Array | float, c: Array | float) -> Array:
    """Estimate the distance to an ellipsoid with half axes a, b, c: exact at the surface, a good bound elsewhere."""
    k0 = norm(x / a, y / b, z / c)
    return k0 * (k0 - 1) / norm(x / (a * a), y / (b * b), z / (c * c))


def extrude(profile: Array, z: Array, half_height: Array | float, rounding: Array | float) -> Array:
    """Compute the distance to a flat shape, given by its distance in the plane, extruded along z with rounded edges."""
    u, v = profile + rounding, jnp.abs(z) - half_height + rounding
    return jnp.minimum(jnp.maximum(u, v), 0) + norm(jnp.maximum(u, 0), jnp.maximum(v, 0)) - rounding


def rectangle(x: Array, y: Array, a: Array | float, b: Array | float, rounding: Array | float) -> Array:
    """Compute the distance in the plane to a rectangle with half sides a, b and rounded corners."""
    return extrude(jnp.abs(x) - a, y, b, rounding)


def segment(x: Array, y: Array, z: Array, start: tuple, end: tuple) -> Array:
    """Compute the distance to a line segment."""
    direction = [e - s for s, e in zip(start, end, strict=True)]
    offset = [c - s for c, s in zip((x, y, z), start, strict=True)]
    along = sum(o * d for o, d in zip(offset, direction, strict=True)) / sum(d * d for d in direction)
    along = jnp.clip(along, 0, 1)
    return norm(*(o - along * d for o, d in zip(offset, direction, strict=True)))


def smooth_union(a: Array, b: Array, width: Array | float) -> Array:
    """Compute the smooth union of two shapes, which blend over `width` metres."""
    h = jnp.maximum(width - jnp.abs(a - b), 0) / width
    return jnp.minimum(a, b) - h * h * width / 4


def wave(turns: Array) -> Array:
    """Approximate sin(2 pi turns) to 0.1 %, which suffices here and is several times faster than jnp.sin."""
    t = turns - jnp.round(turns)
    parabola = 8 * t * (1 - 2 * jnp.abs(t))
    return parabola * (0.775 + 0.225 * jnp.abs(parabola))


def arctan2_turns(y: Array, x: Array) -> Array:
    """Approximate arctan2(y, x) in turns, -1/2..1/2, to 4e-5; faster than jnp.arctan2."""
    a, b = jnp.abs(x), jnp.abs(y)
    ratio = jnp.minimum(a, b) / (jnp.maximum(a, b) + 1e-12)
    s = ratio * ratio
    t = ratio * (((-0.0464964749 * s + 0.15931422) * s - 0.327622764) * s + 1) / (2 * jnp.pi)
    t = jnp.where(b > a, 0.25 - t, t)
    t = jnp.where(x < 0, 0.5 - t, t)
    return jnp.where(y < 0, -t, t)


def smoothstep(x: Array, edge: Array | float, width: float) -> Array:
    """Interpolate smoothly from 0 below the edge to 1 above it."""
    t = jnp.clip((x - edge) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, fraction: Array) -> Array:
    """Blend two colours (3,) or (3, n) by the fraction (n,) of the second."""
    a, b = (c[:, None] if c.ndim == 1 else c for c in (a, b))
    return a + (b - a) * fraction[None]


def stripes(turns: Array, fraction: float, soft: float) -> Array:
    """Return 1 inside and 0 outside of a soft-edged stripe that covers a fraction of every turn."""
    return smoothstep(fraction / 2 - jnp.abs(turns - jnp.round(turns)), 0.0, soft)


def mottle(p: Array, frequency: Array | float, phase: Array | float) -> Array:
    """Generate a smooth irregular pattern of about -1..1 with `frequency` waves per metre, for grain, crumb or wear."""
    x, y, z = p
    u = frequency * x + 0.27 * wave(0.61 * frequency * y + phase)
    v = frequency * y + 0.27 * wave(0.57 * frequency * z + 0.2)
    w = frequency * z + 0.27 * wave(0.67 * frequency * x + 0.3)
    return (wave(u) * wave(v + 0.25) + wave(v) * wave(w + 0.25) + wave(w) * wave(u + 0.25)) / 1.5


# ---- the sweets ----------------------------------------------------------------------------------------------------

CANE_RADIUS, CANE_BEND = 0.095, 0.27


def _cane_line(p: Array, look: Look) -> tuple[Array, Array, Array]:
    """Return coordinates along the cane's centre line: signed lateral offset, distance past its ends, arc length."""
    x, y, _ = p
    x, y = x - 0.33, y - 0.06
    bend = CANE_BEND * (1 + 0.06 * look.shape[0])
    ahead = x > 0
    radius = norm(x, y)
    lateral = jnp.where(ahead, radius - bend, jnp.abs(y) - bend)
    hook = 0.16 * (1 + 0.4 * look.shape[1])
    beyond_end = jnp.where(ahead, 0.0, jnp.maximum(-x - jnp.where(y > 0, hook, 0.98), 0))
    arc = bend * (2 * jnp.pi * arctan2_turns(y, x) + jnp.pi / 2)
    return lateral, beyond_end, jnp.where(ahead, arc, jnp.where(y > 0, jnp.pi * bend - x, x))


def _cane(p: Array, look: Look) -> Array:
    lateral, beyond_end, _ = _cane_line(p, look)
    return norm(lateral, p[2] - CANE_RADIUS, beyond_end) - CANE_RADIUS


def _cane_colour(p: Array, look: Look) -> Array:
    lateral, _, along = _cane_line(p, look)
    around = arctan2_turns(p[2] - CANE_RADIUS, lateral)
    turns = along / (0.30 * (1 + 0.06 * look.shape[2])) - around + look.phase
    red, white, green, _ = look.palette
    colour = mix(white, red, stripes(turns, 0.5, 0.05))
    return mix(colour, green, stripes(turns + 0.5, 0.11, 0.05))


COOKIE_RADIUS, COOKIE_HEIGHT = 0.56, 0.16


def _cookie_chips(p: Array, look: Look) -> Array:
    """Compute the distance to the chocolate chips: one in the middle and two rings around it."""
    x, y, z = p
    radius, direction = norm(x, y), arctan2_turns(y, x)
    chips = ellipsoid(x - 0.03, y, z - 0.17, 0.09, 0.075, 0.06)
    for ring, count, size in ((0.26, 6, 0.085), (0.46, 10, 0.072)):
        turns = direction * count + look.phase + 7 * ring
        number = jnp.round(turns)
        scatter = wave(0.38 * jnp.mod(number, count) + ring + 0.1 * look.shape[3])  # constant within a chip
        off = (turns - number) * (2 * jnp.pi / count) + 0.12 * scatter
        out, side = radius - ring - 0.03 * scatter, radius * off
        chips = jnp.minimum(chips, ellipsoid(out, side, z - 0.17 + 0.2 * ring**2, size, 0.85 * size, 0.06))
    return chips


def _cookie_dough(p: Array, look: Look) -> tuple[Array, Array]:
    """Compute the distance to the dough without chips, and its crumb pattern in -1..1."""
    x, y, z = p
    radius, direction = norm(x, y), arctan2_turns(y, x)
    crumb = mottle(p, 3.4, look.phase)
    rim = COOKIE_RADIUS + 0.010 * wave(5 * direction + look.phase) + 0.010 * look.shape[0] * wave(2 * direction)
    dough = extrude(radius - rim, z - COOKIE_HEIGHT / 2 + 0.1 * radius * radius, COOKIE_HEIGHT / 2 + 0.02, 0.07)
    return jnp.maximum(dough - 0.008 * crumb, -z), crumb


def _cookie(p: Array, look: Look) -> Array:
    return smooth_union(_cookie_dough(p, look)[0], _cookie_chips(p, look), 0.015)


def _cookie_colour(p: Array, look: Look) -> Array:
    dough, chip, baked, _ = look.palette
    _, crumb = _cookie_dough(p, look)
    edge = jnp.clip(smoothstep(norm(p[0], p[1]), COOKIE_RADIUS - 0.05, 0.2) + 0.3 * crumb, 0, 1)
    return mix(mix(dough, baked, edge), chip, smoothstep(-_cookie_chips(p, look), -0.008, 0.01))


PRALINE = (0.50, 0.38, 0.32)


def _praline_ridges(p: Array, look: Look) -> Array:
    """Return 1 on the white lines that are poured over the praline, 0 beside them."""
    x, y, _ = p
    turns = (x + 0.45 * y + 0.035 * wave(2 * y + look.phase)) / 0.21 + 0.4 * look.shape[2]
    return stripes(turns, 0.3, 0.2) * smoothstep(0.47 - jnp.abs(x), 0.0, 0.1)


def _praline(p: Array, look: Look) -> Array:
    x, y, z = p
    a, b, height = PRALINE
    taper = 1 - 0.35 * z
    a, b = a * (1 + 0.05 * look.shape[0]) * taper, b * (1 + 0.05 * look.shape[1]) * taper
    body = extrude(rectangle(x, y, a, b, 0.12), z - height / 2 + 0.1 * (x * x + y * y), height / 2, 0.07)
    return 0.85 * (jnp.maximum(body, -z) - 0.016 * _praline_ridges(p, look) * smoothstep(z, 0.2, 0.16))


def _praline_colour(p: Array, look: Look) -> Array:
    chocolate, cream, _, _ = look.palette
    return mix(chocolate, cream, _praline_ridges(p, look) * smoothstep(p[2], 0.17, 0.08))


def _confetto(p: Array, look: Look) -> Array:
    x, y, z = p
    a, b, c = 0.55 * (1 + 0.06 * look.shape[0]), 0.38 * (1 + 0.06 * look.shape[1]), 0.24
    egg = 1 - 0.35 * x  # one end is blunter, as in an almond
    return 0.8 * ellipsoid(x, y * egg, (z - c) * (1 - 0.12 * x), a, b, c)


def _confetto_colour(p: Array, look: Look) -> Array:
    shell, shade, _, _ = look.palette
    return mix(shell, shade, 0.5 + 0.5 * mottle(p, 0.9, look.phase))


def _bear_face(p: Array) -> Array:
    """Compute the distance to the eyes and the nose."""
    x, y, z = p
    eyes = norm(norm(x) - 0.095, y - 0.42, z - 0.395) - 0.036
    return jnp.minimum(eyes, ellipsoid(x, y - 0.27, z - 0.445, 0.042, 0.03, 0.03))


def _bear(p: Array, look: Look) -> Array:
    x, y, z = p
    x = norm(x)  # left-right symmetry
    belly = 0.25 * (1 + 0.06 * look.shape[0])
    body = ellipsoid(x, y + 0.10, z - 0.20, 0.30, 0.37, belly)
    body = smooth_union(body, norm(x, y - 0.36, z - 0.22) - 0.215, 0.08)
    body = smooth_union(body, norm(x - 0.165, y - 0.54, z - 0.22) - 0.085, 0.05)
    body = smooth_union(body, ellipsoid(x, y - 0.29, z - 0.37, 0.105, 0.085, 0.085), 0.04)
    body = jnp.minimum(body, _bear_face(p))
    hand = (0.20 + 0.02 * look.shape[1], 0.02 + 0.04 * look.shape[2], 0.42)
    body = smooth_union(body, segment(x, y, z, (0.29, 0.16, 0.26), hand) - 0.085, 0.05)
    foot = (0.24 + 0.02 * look.shape[3], -0.46, 0.34)
    body = smooth_union(body, segment(x, y, z, (0.20, -0.34, 0.18), foot) - 0.125, 0.05)
    return jnp.maximum(body, -z)


def _bear_colour(p: Array, look: Look) -> Array:
    jelly, deep, _, _ = look.palette
    return mix(mix(deep, jelly, smoothstep(p[2], 0.2, 0.4)), 0.12 * deep, smoothstep(-_bear_face(p), -0.004, 0.008))


TRUFFLE_RADIUS, CUP_HEIGHT = 0.42, 0.27


def _truffle_parts(p: Array, look: Look) -> tuple[Array, Array, Array]:
    """Compute the distances to the ball and to its paper cup, and a pattern that is large inside pieces of nut."""
    x, y, z = p
    u = 4.0 * x + 0.2 * wave(2.6 * y + look.phase)
    v = 4.0 * y + 0.2 * wave(2.3 * z + 0.2)
    w = 4.0 * z + 0.2 * wave(2.9 * x + 0.3)
    nuts = jnp.abs(wave(u) * wave(v) * wave(w))
    squash = 1 + 0.05 * look.shape[0]
    ball = norm(x, y, (z - 0.40) * squash) - TRUFFLE_RADIUS - 0.03 * smoothstep(nuts, 0.35, 0.7)
    pleats = 0.016 * wave(28 * arctan2_turns(y, x) + look.phase)
    wall = norm(x, y) - 0.36 - 0.42 * z - pleats * (0.4 + 2 * z)
    cup = extrude(jnp.abs(wall) - 0.012, z - CUP_HEIGHT / 2, CUP_HEIGHT / 2, 0.01)
    return ball, cup, nuts


def _truffle(p: Array, look: Look) -> Array:
    ball, cup, _ = _truffle_parts(p, look)
    return 0.75 * jnp.maximum(jnp.minimum(ball, cup), -p[2])


def _truffle_colour(p: Array, look: Look) -> Array:
    ball, cup, nuts = _truffle_parts(p, look)
    chocolate, nut, paper, _ = look.palette
    return mix(mix(chocolate, nut, smoothstep(nuts, 0.38, 0.16)), paper, smoothstep(ball - cup, 0.0, 0.01))


LICORICE, LAYERS = (0.40, 0.40, 0.50), 5


def _licorice(p: Array, look: Look) -> Array:
    x, y, z = p
    a, b, height = LICORICE
    sides = a * (1 + 0.06 * look.shape[0]), b * (1 + 0.06 * look.shape[1])
    layer = wave(LAYERS * z / height + 0.25)  # 1 between two layers, -1 in the middle of a layer
    lean = 0.06 * look.shape[2] * (z - height / 2)
    return 0.85 * (extrude(rectangle(x - lean, y, *sides, 0.05), z - height / 2, height / 2, 0.03) + 0.008 * layer)


def _licorice_colour(p: Array, look: Look) -> Array:
    height = LICORICE[2]
    pink, black, white, _ = look.palette
    layer = LAYERS * p[2] / height
    outer = smoothstep(jnp.abs(layer - 2.5), 1.5, 0.06)
    inner = smoothstep(0.5 - jnp.abs(layer - 2.5), 0.0, 0.06)
    sugar = 1 + 0.07 * mottle(p, 7.0, look.phase)
    return mix(mix(black, white, inner), pink, outer) * sugar[None]


DISC_RADIUS, DISC_HEIGHT = 0.46, 0.17


def _lollipop_disc(p: Array) -> tuple[Array, Array, Array]:
    x, y, z = p
    return x + 0.22, y, z - DISC_HEIGHT / 2


def _lollipop(p: Array, look: Look) -> Array:
    x, y, z = _lollipop_disc(p)
    radius = DISC_RADIUS * (1 + 0.05 * look.shape[0])
    disc = extrude(norm(x, y) - radius, z, DISC_HEIGHT / 2 - 0.02 + 0.12 * (radius**2 - x * x - y * y), 0.08)
    end = 1.0 + 0.06 * look.shape[1]
    return jnp.minimum(0.9 * disc, segment(x, y, z, (0.3, 0.0, 0.0), (end, 0.0, 0.0)) - 0.042)


def _lollipop_colour(p: Array, look: Look) -> Array:
    x, y, _ = _lollipop_disc(p)
    radius = norm(x, y)
    turns = arctan2_turns(y, x) + radius / 0.17 + look.phase
    red, cream, gold, stick = look.palette
    colour = mix(mix(cream, red, stripes(turns, 0.42, 0.07)), gold, stripes(turns + 0.5, 0.2, 0.07))
    return mix(colour, stick, smoothstep(radius, DISC_RADIUS * 1.06, 0.01))


def _untwist(p: Array, look: Look) -> tuple[Array, Array]:
    """Map points to coordinates of the marshmallow's cross-section, before it is twisted."""
    x, y, z = p
    turns = 0.57 * (1 + 0.06 * look.shape[0]) * x + 0.5 * look.phase
    c, s = wave(turns + 0.25), wave(turns)
    z = z - 0.235
    return c * y - s * z, s * y + c * z


def _marshmallow(p: Array, look: Look) -> Array:
    u, v = _untwist(p, look)
    lobes = norm(jnp.abs(u) - 0.10, jnp.abs(v) - 0.10) - 0.125
    lobes = smooth_union(lobes, norm(u, v) - 0.13, 0.05)
    return 0.75 * extrude(lobes, p[0], 0.60 * (1 + 0.05 * look.shape[1]), 0.07)


def _marshmallow_colour(p: Array, look: Look) -> Array:
    u, v = _untwist(p, look)
    pink, white, yellow, _ = look.palette
    return mix(mix(pink, yellow, smoothstep(u, 0.0, 0.02)), white, smoothstep(u * v, 0.0, 0.004))


MINT_RADIUS, MINT_HEIGHT = 0.52, 0.28


def _peppermint(p: Array, look: Look) -> Array:
    x, y, z = p
    radius = norm(x, y)
    rim = MINT_RADIUS * (1 + 0.04 * look.shape[0]) + 0.008 * wave(12 * arctan2_turns(y, x) + look.phase)
    dome = MINT_HEIGHT / 2 - 0.25 * radius * radius + 0.05
    return 0.85 * extrude(radius - rim, z - MINT_HEIGHT / 2, dome, 0.10)


def _peppermint_colour(p: Array, look: Look) -> Array:
    x, y, _ = p
    radius = norm(x, y)
    turns = 6 * arctan2_turns(y, x) + 1.5 * (1 + 0.1 * look.shape[1]) * radius / MINT_RADIUS + look.phase
    red, white, _, _ = look.palette
    red_fraction = stripes(turns, 0.5, 0.07) * smoothstep(radius, 0.07, 0.08)
    return mix(white, red, red_fraction)


SWEETS = {
    "CandyCane": Sweet(
        _cane, _cane_colour, Material(0.6, 60.0), 0.0, ((0.985, 0.85, 0.85), (0.1, 0.03, 0.97), (0.37, 0.7, 0.65))
    ),
    "ChocolateCookie": Sweet(
        _cookie, _cookie_colour, Material(0.1, 15.0), 0.0, ((0.09, 0.55, 0.82), (0.05, 0.6, 0.27), (0.07, 0.66, 0.62))
    ),
    "ChocolatePraline": Sweet(
        _praline, _praline_colour, Material(0.35, 30.0), 0.35, ((0.05, 0.62, 0.40), (0.11, 0.28, 0.93))
    ),
    "Confetto": Sweet(_confetto, _confetto_colour, Material(0.8, 90.0), 0.3, ((0.95, 0.25, 0.96), (0.95, 0.30, 0.93))),
    "GummyBear": Sweet(_bear, _bear_colour, Material(0.7, 70.0, 0.8), 0.0, ((0.02, 0.86, 0.93), (0.99, 0.92, 0.72))),
    "HazelnutTruffle": Sweet(
        _truffle,
        _truffle_colour,
        Material(0.25, 25.0),
        0.0,
        ((0.06, 0.62, 0.38), (0.09, 0.48, 0.76), (0.12, 0.62, 0.86)),
    ),
    "LicoriceSandwich": Sweet(
        _licorice,
        _licorice_colour,
        Material(0.2, 20.0),
        0.6,
        ((0.93, 0.55, 0.94), (0.7, 0.15, 0.13), (0.1, 0.06, 0.95)),
    ),
    "Lollipop": Sweet(
        _lollipop,
        _lollipop_colour,
        Material(0.5, 60.0),
        -0.5,
        ((0.93, 0.75, 0.88), (0.12, 0.10, 0.96), (0.55, 0.6, 0.85), (0.1, 0.05, 0.93)),
    ),
    "Marshmallow": Sweet(
        _marshmallow,
        _marshmallow_colour,
        Material(0.05, 10.0, 0.3),
        0.3,
        ((0.95, 0.36, 0.97), (0.1, 0.03, 0.97), (0.55, 0.25, 0.95)),
    ),
    "PeppermintCandy": Sweet(
        _peppermint, _peppermint_colour, Material(0.6, 80.0), 0.0, ((0.985, 0.88, 0.85), (0.1, 0.02, 0.97))
    ),
}  # in the order of Eyecandies
