"""What chance decides: how one good instance differs from another, and where and how large defects are.

The numbers on top set how hard the dataset is.
"""

import colorsys

import numpy as np
from scipy.ndimage import distance_transform_edt

from iumad_jax.data.candies.defects import KINDS, NONE, Defects
from iumad_jax.data.candies.scene import FOCAL, Surface
from iumad_jax.data.candies.sweets import Look, Sweet

# Good instances: the spread to either side of the usual. VARIATION scales all of them.
VARIATION = 0.8
PLACE = 0.03  # metres, in x and in y
TURN = 0.15  # radians
SCALE = 0.03  # relative
SHAPE = 0.8  # of each sweet's own proportions
PHASE = 0.08  # turns of its pattern
HUE = 0.012  # of the colour wheel
VALUE = 0.04  # relative brightness
BELT = 0.04  # metres

# Defects: uniform or log-uniform between two numbers.
AREA = 0.006, 0.022  # of the picture, for most
TINY_AREA = 0.0009, 0.002  # for a few
TINY_SHARE = 0.12  # of the defects are tiny
ASPECT = 1.0, 2.2  # length over width
RELIEF = 0.35, 0.5  # height of a bump or depth of a dent over the patch's mean radius
RELIEF_LIMITS = 0.02, 0.06  # metres
STAIN = 0.75, 1.0  # how much of the stain's colour covers the sweet's
CONTRAST = 0.35  # least difference between the two, in one channel of the screen's 0..1
CREASE = 1.1, 1.8  # slope
UNEVEN = 0.22  # outline


def instance(sweet: Sweet, rng: np.random.Generator) -> Look:
    """A good instance of a sweet."""

    def vary(spread: float, *shape: int) -> np.ndarray:
        return (VARIATION * spread * rng.uniform(-1, 1, shape)).astype(np.float32)

    palette = [linear(h + float(vary(HUE)), s, v * float(1 + vary(VALUE))) for h, s, v in sweet.palette]
    palette += [np.zeros(3)] * (4 - len(palette))
    return Look(
        place=vary(PLACE, 2),
        turn=sweet.turn + vary(TURN),
        scale=1 + vary(SCALE),
        shape=vary(SHAPE, 4),
        phase=vary(PHASE),
        palette=np.array(palette, np.float32),
        belt=vary(BELT),
    )


def linear(hue: float, saturation: float, value: float) -> np.ndarray:
    """A colour as linear RGB (3,), from hue, saturation and value as they look on a screen."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0))) ** 2.2


def defects(kinds: tuple[str, ...], good: Surface, size: int, rng: np.random.Generator) -> Defects:
    """Defects of the given kinds, on parts of a good instance that the camera sees well.

    Args:
        kinds: of KINDS; each once.
        good: what the pixels of the good instance show.
        size: of the picture, pixels.
        rng: the sample's own.
    """
    good = Surface(*map(np.asarray, good))
    from_outline = distance_transform_edt(good.hit.reshape(size, size)).ravel()
    inner = from_outline >= min(0.02 * size, 0.5 * from_outline.max())
    (suitable,) = np.nonzero(inner & (good.facing > 0.5) & (good.local[2] > 0.03))
    # Of several tries, the one whose defects lie farthest apart.
    tries = rng.choice(suitable, (8, len(kinds)))
    where = np.stack([tries // size, tries % size], -1)
    gaps = np.linalg.norm(where[:, :, None] - where[:, None], axis=-1) + 1e9 * np.eye(len(kinds))
    chosen = tries[gaps.min((1, 2)).argmax()]

    drawn = Defects(*(array.copy() for array in NONE))
    for kind, pixel in zip(kinds, chosen, strict=True):
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
        drawn.centre[slot] = good.local[:, pixel]
        drawn.axes[slot] = axes
        drawn.amount[slot] = (height, height, rng.uniform(*STAIN), rng.uniform(*CREASE))[slot]
        drawn.outline[slot] = rng.uniform(-UNEVEN, UNEVEN, 2)
        if kind == "colors":
            drawn.stain[:] = stain(np.asarray(good.albedo[:, pixel]), rng)
    return drawn


def stain(albedo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour, linear RGB (3,), that stands out from the given one."""
    while True:
        colour = linear(rng.random(), rng.uniform(0.45, 0.9), rng.uniform(0.25, 0.9))
        if np.abs(colour ** (1 / 2.2) - albedo ** (1 / 2.2)).max() >= CONTRAST:
            return colour
