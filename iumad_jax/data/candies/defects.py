"""Defects: a patch on the sweet's surface that sticks out, sinks in, is stained or is creased.

A sample carries one slot per kind; a slot with amount 0 is no defect. The patch is an ellipsoid with an uneven outline,
flat on the surface; `profile` is 1 in its middle and 0 from its outline on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.data.candies.sweets import wave

KINDS = ("bumps", "dents", "colors", "normals")

EDGE = 0.03  # a pixel belongs to the mask where the profile exceeds this

Array = jax.Array | np.ndarray


class Defects(NamedTuple):
    """One slot per kind, in the order of KINDS; lengths in metres in the sweet's own frame."""

    centre: Array  # (4, 3)
    axes: Array  # (4, 3, 3): rows are two directions along the surface and the normal, each over its radius
    amount: Array  # (4,): height, depth, share of the stain, slope
    outline: Array  # (4, 2): how the outline is uneven
    stain: Array  # (3,) linear RGB


NONE = Defects(*(np.zeros(s, np.float32) for s in ((4, 3), (4, 3, 3), (4,), (4, 2), (3,))))


def local(points: Array, defects: Defects, slot: int) -> tuple[Array, Array, Array]:
    """Coordinates (n,) of points (3, n) along a patch's three axes, 1 at its outline."""
    x, y, z = (points[i] - defects.centre[slot, i] for i in range(3))
    u, v, w = (a[0] * x + a[1] * y + a[2] * z for a in defects.axes[slot])
    return u, v, w


def profile(points: Array, defects: Defects, slot: int) -> Array:
    """1 in the middle of a patch, falling smoothly to 0 at its outline: (3, n) -> (n,)."""
    u, v, w = local(points, defects, slot)
    a, b = defects.outline[slot]
    uneven = 1 + a * u * (u * u - 3 * v * v) + b * v * (3 * u * u - v * v)
    t = jnp.clip(1 - (u * u + v * v) * jnp.maximum(uneven, 0.5) - w * w, 0, 1)
    return t * t * (3 - 2 * t) * (defects.amount[slot] != 0)


def relief(points: Array, defects: Defects) -> Array:
    """Metres by which bumps and dents raise the surface: (3, n) -> (n,)."""
    bump, dent = (defects.amount[slot] * profile(points, defects, slot) for slot in (0, 1))
    return bump - dent


def stained(colour: Array, points: Array, defects: Defects) -> Array:
    """The surface's colour (3, n) under the stain."""
    share = defects.amount[2] * jnp.clip(4 * (profile(points, defects, 2) - EDGE), 0, 1)
    return colour + (defects.stain[:, None] - colour) * share[None]


def creased(normal: Array, points: Array, defects: Defects) -> Array:
    """Unit normals (3, n) under the creases; the surface itself stays where it is, as in Eyecandies."""
    u, v, _ = local(points, defects, 3)
    size = jnp.clip(2 * (profile(points, defects, 3) - EDGE), 0, 1) * defects.amount[3]
    a, b = (2 * defects.outline[3, i] for i in range(2))
    slope_u = wave(0.8 * u + 0.4 * wave(0.5 * v + a)) * size
    slope_v = wave(1.0 * v + 0.4 * wave(0.6 * u + b)) * size
    along = defects.axes[3, :2] / jnp.maximum(jnp.sqrt((defects.axes[3, :2] ** 2).sum(1, keepdims=True)), 1e-6)
    bent = normal - along[0][:, None] * slope_u[None] - along[1][:, None] * slope_v[None]
    return bent / jnp.sqrt((bent * bent).sum(0, keepdims=True))
