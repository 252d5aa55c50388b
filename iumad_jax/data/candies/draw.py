"""Random choices: how good instances of a sweet differ, and where and how large its defects are.

The constants determine how hard the dataset is.
"""

import colorsys

import numpy as np
from scipy.ndimage import distance_transform_edt

from iumad_jax.data.candies.defects import KINDS, NO_DEFECTS, Defects
from iumad_jax.data.candies.scene import FOCAL, Surface
from iumad_jax.data.candies.sweets import Look, Sweet

# Good instances deviate uniformly from the usual one, by at most VARIATION times these values in either direction.
VARIATION = 0.8
POSITION = 0.03  # metres, in x and in y
ROTATION = 0.15  # radians
SCALE = 0.03  # relative
SHAPE = 0.8  # entries of Look.shape
PHASE = 0.08  # turns
HUE = 0.012  # fraction of the colour wheel
VALUE = 0.04  # relative brightness
BELT_SHIFT = 0.04  # metres

# Properties of defects are uniform or log-uniform between two limits.
AREA = 0.006, 0.022  # fraction of the image's area
TINY_AREA = 0.0009, 0.002  # area of tiny defects
TINY_SHARE = 0.12  # probability that a defect is tiny
ASPECT = 1.0, 2.2  # length over width
RELIEF = 0.35, 0.5  # height of a bump or depth of a dent over the patch's mean radius
RELIEF_LIMITS = 0.02, 0.06  # metres
STAIN = 0.75, 1.0  # opacity of the stain
CONTRAST = 0.35  # smallest contrast of stain and sweet: largest difference of a channel's screen values (0..1)
CREASE = 1.1, 1.8  # slope of the creases
UNEVEN = 0.22  # largest coefficient of the uneven outline


def instance(sweet: Sweet, rng: np.random.Generator) -> Look:
    """Draw a good instance of a sweet."""

    def vary(spread: float, *shape: int) -> np.ndarray:
        return (VARIATION * spread * rng.uniform(-1, 1, shape)).astype(np.float32)

    palette = [linear_rgb(h + float(vary(HUE)), s, v * float(1 + vary(VALUE))) for h, s, v in sweet.palette]
    palette += [np.zeros(3)] * (4 - len(palette))
    return Look(
        position=vary(POSITION, 2),
        rotation=sweet.rotation + vary(ROTATION),
        scale=1 + vary(SCALE),
        shape=vary(SHAPE, 4),
        phase=vary(PHASE),
        palette=np.array(palette, np.float32),
        belt_shift=vary(BELT_SHIFT),
    )


def linear_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a screen colour (hue, saturation, value) to linear RGB, shape (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0))) ** 2.2


def defects(kinds: tuple[str, ...], good: Surface, size: int, rng: np.random.Generator) -> Defects:
    """Draw defects on clearly visible parts of a good instance.

    Args:
        kinds: Kinds of defect from KINDS, without repetition.
        good: Visible surface of the good instance.
        size: Side of the image in pixels.
        rng: Random generator of the sample.
    """
    good = Surface(*map(np.asarray, good))
    from_outline = distance_transform_edt(good.hit.reshape(size, size)).ravel()
    inner = from_outline >= min(0.02 * size, 0.5 * from_outline.max())
    (suitable,) = np.nonzero(inner & (good.facing > 0.5) & (good.local_point[2] > 0.03))
    # Draw several candidate placements and choose the one whose defects lie farthest apart.
    candidates = rng.choice(suitable, (8, len(kinds)))
    positions = np.stack([candidates // size, candidates % size], -1)
    gaps = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1) + 1e9 * np.eye(len(kinds))
    pixels = candidates[gaps.min((1, 2)).argmax()]

    drawn = Defects(*(array.copy() for array in NO_DEFECTS))
    for kind, pixel in zip(kinds, pixels, strict=True):
        slot = KINDS.index(kind)
        low, high = np.log(TINY_AREA if rng.random() < TINY_SHARE else AREA)
        area = np.exp(rng.uniform(low, high)) * size**2 / len(kinds) ** 0.5
        radius = good.depth[pixel] / (FOCAL * size) * np.sqrt(area / (np.pi * good.facing[pixel]))
        aspect, angle = np.sqrt(rng.uniform(*ASPECT)), rng.uniform(0, np.pi)
        height = np.clip(rng.uniform(*RELIEF) * radius, *RELIEF_LIMITS)
        normal = good.local_normal[:, pixel]
        side = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
        side /= np.linalg.norm(side)
        side = np.cos(angle) * side + np.sin(angle) * np.cross(normal, side)
        axes = side / (radius * aspect), np.cross(normal, side) / (radius / aspect), normal / (radius + 2 * height)
        drawn.centre[slot] = good.local_point[:, pixel]
        drawn.axes[slot] = axes
        drawn.amount[slot] = (height, height, rng.uniform(*STAIN), rng.uniform(*CREASE))[slot]
        drawn.outline[slot] = rng.uniform(-UNEVEN, UNEVEN, 2)
        if kind == "colors":
            drawn.stain[:] = stain(np.asarray(good.albedo[:, pixel]), rng)
    return drawn


def stain(albedo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a linear RGB colour (3,) that stands out from the surface's albedo (3,)."""
    while True:
        colour = linear_rgb(rng.random(), rng.uniform(0.45, 0.9), rng.uniform(0.25, 0.9))
        if np.abs(colour ** (1 / 2.2) - albedo ** (1 / 2.2)).max() >= CONTRAST:
            return colour
