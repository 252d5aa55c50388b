"""Procedural sweets: shape, relief, colours and material of sweet_001, sweet_002, ... follow from their numbers alone.

A sweet is a form, such as a ring or a star, with six traits, a relief and two layers of colour above a third. Reliefs
and layers are patterns. All sweets of a form share one compiled geometry pass, since their recipes are data.
"""

import colorsys
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.data.candies.sweets import (
    SWEETS,
    Array,
    Look,
    Material,
    Sweet,
    arctan2_turns,
    ellipsoid,
    extrude,
    mix,
    mottle,
    norm,
    rectangle,
    segment,
    smooth_union,
    smoothstep,
    wave,
)

VERSION = 1  # of the recipes; another one has other sweets
MOST = 999  # sweets

STEP_SHARE = 0.75  # factor of distances, which forms and reliefs make too long where they are steep
CONTRAST = 0.3  # smallest contrast of a sweet's colours: largest difference of a channel's screen values
MATERIALS = Material(0.08, 12.0), Material(0.25, 25.0), Material(0.6, 70.0), Material(0.6, 70.0, 0.6)
GOLDEN_RATIO = 0.618034  # multiples of it, modulo 1, lie far from each other


class Pattern(NamedTuple):
    """A scalar field of about -1..1: a weighted sum of a wave, a product of two waves, grain and a linear field."""

    weights: Array  # (4,)
    turns: Array  # (2, 6): turns of a wave per metre along x, y, z and away from the z axis, around it, and offset
    frequency: Array  # () waves of the grain per metre


class Recipe(NamedTuple):
    """What distinguishes the sweets of one form; metres before scaling by `size`."""

    size: Array  # ()
    traits: Array  # (6,) within 0..1, with a different meaning for each form
    relief: Pattern
    height: Array  # () metres by which the relief sticks out
    calm: Array  # () radius in metres of the centre, in which the relief fades
    layers: tuple[Pattern, Pattern]  # where the second and third colour of the palette are
    edges: Array  # (2, 2): value of the pattern at a layer's edge, and width of this edge


def names(count: int) -> tuple[str, ...]:
    """Return the names of the first procedural sweets."""
    return tuple(f"sweet_{number:03d}" for number in range(1, count + 1))


# ---- forms: distances (n,) at points x, y, z (n,) from the traits t (6,) ---------------------------------------------


def between(trait: Array, low: Array | float, high: Array | float) -> Array:
    """Map a trait in 0..1 to low..high."""
    return low + (high - low) * trait


def count(trait: Array, low: int, high: int) -> Array:
    """Map a trait in 0..1 to a whole number from low to high."""
    return jnp.minimum(jnp.floor(between(trait, low, high + 1)), high)


def fold(x: Array, y: Array, sectors: Array) -> tuple[Array, Array]:
    """Rotate points of the plane into the one of several equal sectors that lies around the x axis."""
    radius, turns = norm(x, y), arctan2_turns(y, x)
    turns = turns - jnp.round(turns * sectors) / sectors
    return radius * wave(turns + 0.25), radius * wave(turns)


def _pillow(x: Array, y: Array, z: Array, t: Array) -> Array:
    a, c = between(t[0], 0.32, 0.52), between(t[2], 0.12, 0.25)
    b = a * between(t[1], 0.55, 1.0)
    flat, upright = 2 ** between(t[3], 0.4, 2.6), 2 ** between(t[4], 0.8, 2.2)  # exponents: 2 is an ellipse
    ground = (jnp.abs(x) / a) ** flat + (jnp.abs(y) / b) ** flat
    return c * ((ground ** (upright / flat) + (jnp.abs(z - c) / c) ** upright) ** (1 / upright) - 1)


def _ring(x: Array, y: Array, z: Array, t: Array) -> Array:
    a = between(t[0], 0.26, 0.40)
    b = a * between(t[1], 0.6, 1.0)
    width, height = between(t[3], 0.08, 0.15), between(t[4], 0.07, 0.14)
    outline = jnp.abs(rectangle(x, y, a, b, b * between(t[2], 0.3, 1.0)))
    return extrude(outline - width, z - height, height, jnp.minimum(width, height) * between(t[5], 0.2, 0.98))


def _bar(x: Array, y: Array, z: Array, t: Array) -> Array:
    a, height = between(t[0], 0.34, 0.52), between(t[2], 0.08, 0.17)
    b = a * between(t[1], 0.4, 0.85)
    taper = 1 - between(t[3], 0.0, 1.0) * z
    base = rectangle(x, y, a * taper, b * taper, b * between(t[5], 0.1, 0.6))
    return 0.85 * extrude(base, z - height + between(t[4], 0.0, 0.3) * (x * x + y * y), height, 0.04)


def _cone(x: Array, y: Array, z: Array, t: Array) -> Array:
    height, radius, tip = between(t[0], 0.25, 0.44), between(t[1], 0.28, 0.42), between(t[2], 0.05, 0.5)
    side, _ = fold(x, y, count(t[5], 3, 6))
    across = jnp.where(t[4] < 0.5, norm(x, y), side)  # a cone or a pyramid
    slope = (jnp.clip(1 - z / height, 0, 1) + 0.01) ** between(t[3], 0.5, 1.8)
    return 0.55 * extrude(across - radius * (tip + (1 - tip) * slope), z - height / 2, height / 2, 0.04)


def _star(x: Array, y: Array, z: Array, t: Array) -> Array:
    points, radius, height = count(t[0], 3, 8), between(t[1], 0.38, 0.52), between(t[3], 0.07, 0.13)
    valley = radius * between(t[2], 0.45, 0.85)
    u, v = fold(x, y, points)
    edge_u, edge_v = valley * jnp.cos(jnp.pi / points) - radius, valley * jnp.sin(jnp.pi / points)
    outline = ((u - radius) * edge_v - norm(v, jnp.float32(0.03)) * edge_u) / norm(edge_u, edge_v)
    return 0.9 * extrude(outline, z - height + between(t[4], 0.0, 0.4) * (x * x + y * y), height, 0.05)


def _cluster(x: Array, y: Array, z: Array, t: Array) -> Array:
    balls, radius = count(t[0], 4, 9), between(t[1], 0.22, 0.34)
    u, v = fold(x, y, balls)
    size, height = between(t[2], 0.09, 0.17), between(t[3], 0.08, 0.17)
    middle = between(t[4], 0.10, 0.25)
    around = ellipsoid(u - radius, v, z - height, size, size, height)
    return smooth_union(around, ellipsoid(x, y, z - 0.17, middle, middle, 0.17), between(t[5], 0.01, 0.15))


def _stack(x: Array, y: Array, z: Array, t: Array) -> Array:
    radius, corner = between(t[0], 0.32, 0.46), between(t[4], 0.2, 1.0)
    height, bottom = between(t[1], 0.05, 0.09), jnp.zeros(())
    tiers = []
    for size in (1.0, between(t[2], 0.6, 1.1), between(t[3], 0.35, 1.0)):
        side = radius * size
        outline = rectangle(x, y, side, side, side * corner)
        tiers.append(extrude(outline, z - bottom - height, height, 0.8 * height))
        bottom = bottom + 2 * height * between(t[5], 0.7, 1.0)
    return jnp.minimum(jnp.minimum(tiers[0], tiers[1]), tiers[2])


def _wrapped(x: Array, y: Array, z: Array, t: Array) -> Array:
    a, b = between(t[0], 0.2, 0.34), between(t[1], 0.15, 0.23)
    length, spread = between(t[2], 0.15, 0.24), between(t[3], 0.5, 1.1)
    beyond = jnp.abs(x) - 0.85 * a
    sides = jnp.maximum(0.7 * (jnp.abs(y) - 0.04 - spread * beyond), jnp.abs(beyond - length / 2) - length / 2)
    pleats = 0.02 * wave(between(t[4], 5.0, 9.0) * y)
    fans = extrude(sides, z - 0.6 * b - pleats, 0.035, 0.02)
    return 0.85 * smooth_union(ellipsoid(x, y, z - b, a, b, b), fans, 0.04)


def _strands(v: Array, w: Array, turns: Array, lobes: Array, offset: Array, radius: Array) -> Array:
    """Compute the distance in the cross-section (v, w) of twisted strands."""
    c, s = wave(turns + 0.25), wave(turns)
    u, v = fold(c * v - s * w, s * v + c * w, lobes)
    return 0.75 * smooth_union(norm(u - offset, v) - radius, norm(u, v) - offset, 0.03)


def _rope(x: Array, y: Array, z: Array, t: Array) -> Array:
    offset, radius = between(t[0], 0.06, 0.11), between(t[1], 0.06, 0.11)
    turns = between(t[2], 0.5, 1.7) * jnp.where(t[5] < 0.5, -1.0, 1.0) * x
    strands = _strands(y, z - offset - radius, turns, count(t[3], 2, 5), offset, radius)
    return extrude(strands, x, between(t[4], 0.36, 0.6), 0.06)


def _wreath(x: Array, y: Array, z: Array, t: Array) -> Array:
    offset, radius = between(t[0], 0.045, 0.08), between(t[1], 0.05, 0.08)
    lobes = count(t[3], 2, 5)
    turns = count(t[4], 3, 10) / lobes * arctan2_turns(y, x)
    return _strands(norm(x, y) - between(t[2], 0.26, 0.38), z - offset - radius, turns, lobes, offset, radius)


def _arc(x: Array, y: Array, z: Array, t: Array) -> Array:
    bend, end = between(t[0], 0.28, 0.42), between(t[1], 0.12, 0.40)  # radius in metres, half the arc in turns
    end_x, end_y = bend * jnp.cos(2 * jnp.pi * end), bend * jnp.sin(2 * jnp.pi * end)
    x, y = x + (bend + end_x) / 2, jnp.abs(y)
    turns = arctan2_turns(y, x)
    part = jnp.minimum(turns / end, 1)
    thickness = between(t[2], 0.08, 0.15) * (1 - between(t[3], -0.3, 0.6) * part * part)
    lateral = jnp.where(turns < end, norm(x, y) - bend, norm(x - end_x, y - end_y))
    return 0.9 * (norm(lateral, (z - thickness) / between(t[4], 0.7, 1.0)) - thickness) * between(t[4], 0.7, 1.0)


def _lollipop(x: Array, y: Array, z: Array, t: Array) -> Array:
    a, height = between(t[0], 0.26, 0.40), between(t[2], 0.07, 0.18)
    b = a * between(t[1], 0.6, 1.0)
    x = x + 0.25
    head = extrude(rectangle(x, y, a, b, b * between(t[3], 0.2, 1.0)), z - height, height, 0.07)
    return jnp.minimum(head, segment(x, y, z, (0.0, 0.0, 0.05), (between(t[4], 0.7, 1.0), 0.0, 0.05)) - 0.045)


def _button(x: Array, y: Array, z: Array, t: Array) -> Array:
    radius, height = between(t[0], 0.36, 0.48), between(t[1], 0.06, 0.12)
    outline = rectangle(x, y, radius, radius, radius * between(t[2], 0.35, 1.0))
    dish = between(t[5], -0.03, 0.05) * smoothstep(-outline, 0.1, 0.08)
    u, v = fold(x, y, count(t[3], 2, 5))
    holes = between(t[4], 0.05, 0.085) - norm(u - 0.45 * radius, v)
    return 0.8 * jnp.maximum(extrude(outline, z - height + dish, height, 0.04), holes)


def _heart(x: Array, y: Array, z: Array, t: Array) -> Array:
    top, height = (between(t[0], 0.13, 0.32), between(t[1], 0.08, 0.24)), between(t[4], 0.07, 0.14)
    x, y = jnp.abs(x), y + 0.25
    along = jnp.clip((x * top[0] + y * top[1]) / (top[0] ** 2 + top[1] ** 2), 0, 1)
    radius = between(along, between(t[2], 0.05, 0.17), between(t[3], 0.14, 0.22))
    x, y = x - along * top[0], y - along * top[1]
    return 0.85 * extrude(norm(x, y) - radius, z - height + between(t[5], 0.0, 1.0) * (x * x + y * y), height, 0.05)


def _blobs(x: Array, y: Array, z: Array, t: Array) -> Array:
    first, second, third = (between(t[i], 0.15, 0.24) for i in range(3))
    balls = norm(x + 0.24, y - between(t[3], -0.15, 0.15), z - first) - first
    balls = smooth_union(balls, norm(x - 0.02, y + between(t[4], -0.2, 0.2), z - second) - second, 0.1)
    return smooth_union(balls, norm(x - 0.26, y - between(t[5], -0.2, 0.2), z - third) - third, 0.1)


def _asterisk(x: Array, y: Array, z: Array, t: Array) -> Array:
    arms, length, radius = count(t[0], 3, 7), between(t[1], 0.32, 0.44), between(t[2], 0.06, 0.10)
    u, v = fold(x, y, arms)
    arm = segment(u, v, z, (0.0, 0.0, radius), (length, 0.0, radius)) - radius
    knob, middle = radius * between(t[3], 1.0, 1.7), between(t[4], 0.08, 0.22)
    arm = smooth_union(arm, norm(u - length, v, z - knob) - knob, 0.03)
    return smooth_union(arm, ellipsoid(x, y, z - 0.15, middle, middle, between(t[5], 0.15, 0.2)), 0.04)


# ---- from a recipe to a surface --------------------------------------------------------------------------------------


def values(p: Array, pattern: Pattern, phase: Array) -> Array:
    """Compute the values (n,) of a pattern at points (3, n)."""
    x, y, z = p
    radius, around = norm(x, y), arctan2_turns(y, x)
    first, second = (a * x + b * y + c * z + d * radius + e * around + f for a, b, c, d, e, f in pattern.turns)
    a, b, c, d = pattern.weights
    waves = wave(first + phase) * (a + b * wave(second + phase))
    return waves + c * mottle(p, pattern.frequency, phase) + d * first


def distance(form: Callable[..., Array], p: Array, look: Look) -> Array:
    """Compute the signed distance (n,) of points (3, n) to a sweet."""
    recipe = look.recipe
    local = p / (recipe.size * (1 + 0.04 * look.shape[:3, None]))
    fade = jnp.minimum(norm(local[0], local[1]) / recipe.calm, 1)
    raised = recipe.height * (1 + 0.1 * look.shape[3]) * values(local, recipe.relief, look.phase) * fade
    return STEP_SHARE * jnp.maximum(recipe.size * (form(*local, recipe.traits) - raised), -p[2])


def colour(p: Array, look: Look) -> Array:
    """Compute the linear RGB (3, n) of points (3, n)."""
    recipe = look.recipe
    blend: Array = jnp.broadcast_to(look.palette[0][:, None], p.shape)
    for layer, (edge, width), above in zip(recipe.layers, recipe.edges, look.palette[1:3], strict=True):
        blend = mix(blend, above, smoothstep(values(p / recipe.size, layer, look.phase), edge, width))
    return blend


FORMS = tuple(
    partial(distance, form)
    for form in (
        *(_pillow, _star, _rope, _bar, _cluster, _lollipop, _cone, _ring),
        *(_heart, _stack, _asterisk, _button, _wrapped, _blobs, _wreath, _arc),
    )
)

# ---- from a number to a recipe ---------------------------------------------------------------------------------------


@cache
def sweet(name: str) -> Sweet:
    """Return one of the ten sweets, or the procedural sweet of a name such as sweet_007."""
    return SWEETS[name] if name in SWEETS else _procedural(int(name.removeprefix("sweet_")))


def _procedural(number: int) -> Sweet:
    rng = np.random.default_rng((VERSION, number))
    turn, form = divmod(number - 1, len(FORMS))
    # Within a form, each trait runs through a low-discrepancy sequence, so that no two sweets have nearly equal traits.
    steps = 1.1673 ** -np.arange(1.0, 7.0)
    relief_kind = rng.choice(["none", "none", "none", "stripes", "rings", "rays", "checks", "nets", "grain"])
    kinds = [rng.choice(["stripes", "rings", "rays", "spirals", "checks", "nets", "grain", "dip", "none", "none"])]
    kinds += [rng.choice(["none", "none", "sprinkles", "dip", "lines", "nets"])]
    frequency = rng.uniform(4, 9)
    relief = _pattern(relief_kind, frequency, rng)
    below, above = (_pattern(kind, rng.uniform(2.0, 5.0), rng) for kind in kinds)
    recipe = Recipe(
        size=np.array(rng.uniform(0.95, 1.2)),
        traits=(0.5 + 0.31 * form + turn * steps) % 1,
        relief=relief,
        height=np.array(rng.uniform(0.04, 0.09) / frequency),
        calm=np.array(0.3 if relief.turns[:, 4].any() else 1e-3),
        layers=(below, above),
        edges=np.array([(_edge(kind, rng), rng.choice([0.1, 0.2, 1.0], p=[0.5, 0.3, 0.2])) for kind in kinds]),
    )
    return Sweet(
        FORMS[form],
        colour,
        MATERIALS[rng.integers(4)],
        rotation=rng.uniform(-np.pi, np.pi),
        palette=_palette(number * GOLDEN_RATIO, rng),
        recipe=_float32(recipe),
        turn=float(np.exp(rng.uniform(0, np.log(20)))),
        shift=rng.uniform(0.5, 3),
    )


def _float32(tree: Recipe) -> Recipe:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def _pattern(kind: str, frequency: float, rng: np.random.Generator) -> Pattern:
    """Draw a pattern of a kind with about `frequency` waves per metre."""
    weights, turns = np.zeros(4), np.zeros((2, 6))
    weights[{"checks": 1, "nets": 1, "grain": 2, "sprinkles": 2, "dip": 3}.get(kind, 0)] = kind != "none"
    turns[:, 5] = rng.uniform(0, 1, 2)
    angle = rng.uniform(0, np.pi)
    across, along = frequency * np.cos(angle), frequency * np.sin(angle)
    match kind:
        case "stripes" | "checks":
            turns[:, :3] = (across, along, 0.5 * frequency), (-along, across, 0.5 * frequency)
        case "lines":
            turns[0, :2] = 2 * across, 2 * along
        case "rings" | "spirals":
            turns[0, 2:5] = 0.5 * frequency, frequency, 0 if kind == "rings" else rng.choice([-4, -3, -2, 2, 3, 4])
        case "rays" | "nets":
            turns[0, 4], turns[1, 2:4] = round(2.5 * frequency), (0.5 * frequency, frequency)
        case "dip":
            turns[0] = *rng.uniform(-2, 2, 2), rng.uniform(2, 5), 0, 0, rng.uniform(-0.8, -0.3)
    return Pattern(weights, turns, np.array(frequency * (3 if kind == "sprinkles" else 1)))


def _edge(kind: str, rng: np.random.Generator) -> float:
    """Draw the value at the edge of a layer, whose pattern is of the kind."""
    fixed = {"dip": 0.0, "sprinkles": 0.45, "lines": 0.75, "none": 9.0}
    varying = {"checks": (-0.05, 0.35), "nets": (-0.05, 0.35), "grain": (0.0, 0.35)}
    return fixed[kind] if kind in fixed else rng.uniform(*varying.get(kind, (-0.5, 0.5)))


def _palette(hue: float, rng: np.random.Generator) -> tuple[tuple[float, float, float], ...]:
    """Draw three colours as hue, saturation and value; the first one has the given hue, unless it is brown or grey."""
    chosen: list[tuple[float, float, float]] = []
    while len(chosen) < 3:
        tint = hue % 1 if not chosen else rng.random()
        vivid = tint, rng.uniform(0.65, 0.95), rng.uniform(0.7, 0.97)
        pastel = tint, rng.uniform(0.2, 0.45), rng.uniform(0.88, 0.97)
        brown = rng.uniform(0.03, 0.1), rng.uniform(0.5, 0.75), rng.uniform(0.25, 0.65)
        cream = rng.uniform(0.08, 0.14), rng.uniform(0.02, 0.25), rng.uniform(0.9, 0.97)
        black = tint, rng.uniform(0.1, 0.3), rng.uniform(0.12, 0.2)
        new = (vivid, pastel, brown, cream, black)[rng.choice(5, p=[0.4, 0.2, 0.2, 0.13, 0.07])]
        rgb = np.array([colorsys.hsv_to_rgb(*c) for c in (new, *chosen)])
        if (np.abs(rgb[1:] - rgb[0]).max(1, initial=0) >= CONTRAST).all():
            chosen.append(new)
    return tuple(chosen)
