"""Defects: a patch of the sweet's surface sticks out, sinks in, is stained or is creased.

A sample has one slot per kind of defect; a slot with amount 0 is empty. A patch is a flat ellipsoid on the surface with
an uneven outline. Its `profile` is 1 at the centre and falls to 0 at the outline.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.data.candies.sweets import wave

KINDS = ("bumps", "dents", "colors", "normals")

EDGE = 0.03  # pixels whose profile exceeds this belong to the mask

Array = jax.Array | np.ndarray


class Defects(NamedTuple):
    """The defects of one sample, one slot per kind in the order of KINDS; metres in the sweet's frame."""

    centre: Array  # (4, 3)
    axes: Array  # (4, 3, 3): rows are two directions along the surface and the normal, each divided by its radius
    amount: Array  # (4,): height of the bump, depth of the dent, opacity of the stain, slope of the creases
    outline: Array  # (4, 2): coefficients of the uneven outline
    stain: Array  # (3,): linear RGB of the stain


NO_DEFECTS = Defects(*(np.zeros(s, np.float32) for s in ((4, 3), (4, 3, 3), (4,), (4, 2), (3,))))


def patch_coordinates(points: Array, defects: Defects, slot: int) -> tuple[Array, Array, Array]:
    """Return coordinates (n,) of points (3, n) along the three axes of a patch, in units of its radii."""
    x, y, z = (points[i] - defects.centre[slot, i] for i in range(3))
    u, v, w = (a[0] * x + a[1] * y + a[2] * z for a in defects.axes[slot])
    return u, v, w


def profile(points: Array, defects: Defects, slot: int) -> Array:
    """Compute a patch's profile (n,) at points (3, n): 1 at the centre, falling smoothly to 0 at the outline."""
    u, v, w = patch_coordinates(points, defects, slot)
    a, b = defects.outline[slot]
    uneven = 1 + a * u * (u * u - 3 * v * v) + b * v * (3 * u * u - v * v)
    t = jnp.clip(1 - (u * u + v * v) * jnp.maximum(uneven, 0.5) - w * w, 0, 1)
    return t * t * (3 - 2 * t) * (defects.amount[slot] != 0)


def relief(points: Array, defects: Defects) -> Array:
    """Compute the relief (n,) in metres at points (3, n): positive on bumps, negative in dents."""
    bump, dent = (defects.amount[slot] * profile(points, defects, slot) for slot in (0, 1))
    return bump - dent


def apply_stain(colour: Array, points: Array, defects: Defects) -> Array:
    """Blend the stain into the surface's colour (3, n)."""
    opacity = defects.amount[2] * jnp.clip(4 * (profile(points, defects, 2) - EDGE), 0, 1)
    return colour + (defects.stain[:, None] - colour) * opacity[None]


def apply_creases(normal: Array, points: Array, defects: Defects) -> Array:
    """Bend unit normals (3, n) by the creases. As in Eyecandies, the surface itself does not move."""
    u, v, _ = patch_coordinates(points, defects, 3)
    size = jnp.clip(2 * (profile(points, defects, 3) - EDGE), 0, 1) * defects.amount[3]
    a, b = (2 * defects.outline[3, i] for i in range(2))
    slope_u = wave(0.8 * u + 0.4 * wave(0.5 * v + a)) * size
    slope_v = wave(1.0 * v + 0.4 * wave(0.6 * u + b)) * size
    tangents = defects.axes[3, :2] / jnp.maximum(jnp.sqrt((defects.axes[3, :2] ** 2).sum(1, keepdims=True)), 1e-6)
    bent = normal - tangents[0][:, None] * slope_u[None] - tangents[1][:, None] * slope_v[None]
    return bent / jnp.sqrt((bent * bent).sum(0, keepdims=True))
