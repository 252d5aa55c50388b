"""Random choices: how good instances of a sweet differ, and where and how large its defects are."""

import colorsys
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt

from iumad_jax.data.candies.defects import KINDS, NO_DEFECTS, Defects
from iumad_jax.data.candies.scene import BRIGHTNESS, FOCAL, Surface
from iumad_jax.data.candies.sweets import Look, Sweet

Limits = tuple[float, float]


class Constants(NamedTuple):
    """What determines how hard the dataset is. The defaults are those of version 1."""

    # Good instances deviate uniformly from the usual one, by at most `variation` times these values either way.
    variation: float = 0.8
    position: float = 0.03  # metres, in x and in y
    rotation: float = 0.15  # radians
    scale: float = 0.03  # relative
    shape: float = 0.8  # entries of Look.shape
    phase: float = 0.08  # turns
    hue: float = 0.012  # fraction of the colour wheel
    value: float = 0.04  # relative brightness of the colours
    belt_shift: float = 0.04  # metres
    blotches: float = 0.0  # relative strength of brighter and darker areas
    brightness: float = 0.0  # relative brightness of each lamp and of the ambient light

    # Light and surface.
    lamps: float = 1.0  # factor of the lamps' brightness
    ambient: float = 1.0  # factor of the ambient light's brightness
    stray: float = 0.0  # largest brightness that each lamp has in every image in addition
    gloss: float = 1.0  # factor of the sweets' gloss

    # Properties of defects are uniform or log-uniform between two limits.
    area: Limits = (0.006, 0.022)  # fraction of the image's area
    tiny_area: Limits = (0.0009, 0.002)  # area of tiny defects
    tiny_share: float = 0.12  # probability that a defect is tiny
    aspect: Limits = (1.0, 2.2)  # length over width
    relief: Limits = (0.35, 0.5)  # height of a bump or depth of a dent over the patch's mean radius
    relief_limits: Limits = (0.02, 0.06)  # metres
    stain: Limits = (0.75, 1.0)  # opacity of the stain
    contrast: float = 0.35  # smallest contrast of stain and sweet: largest difference of a channel's screen values
    crease: Limits = (1.1, 1.8)  # slope of the creases
    uneven: float = 0.22  # largest coefficient of the uneven outline


VERSIONS = {
    1: Constants(),
    # Stains are faint. Relief is shallow, on matt sweets with mottled colours under diffuse light, so that RGB hardly
    # shows it. Neither RGB nor depth alone finds all defects.
    2: Constants(
        scale=0.02,
        shape=0.4,
        hue=0.02,
        value=0.07,
        blotches=0.2,
        brightness=0.25,
        lamps=0.2,
        ambient=2.5,
        stray=0.2,
        gloss=0.1,
        tiny_share=0.03,
        relief=(0.2, 0.28),
        relief_limits=(0.014, 0.038),
        stain=(0.35, 0.6),
    ),
}


def instance(sweet: Sweet, constants: Constants, rng: np.random.Generator, lamp: float = 0.0) -> Look:
    """Draw a good instance of a sweet under lamps that are changed by `lamp`, from 0 to 1."""
    (light_rng,) = rng.spawn(1)  # a generator of its own leaves the other choices of version 1 as they were

    def vary(spread: float, *shape: int, rng: np.random.Generator = rng) -> np.ndarray:
        return (constants.variation * spread * rng.uniform(-1, 1, shape)).astype(np.float32)

    def colour(hue: float, saturation: float, value: float) -> np.ndarray:
        return linear_rgb(hue + float(vary(constants.hue)), saturation, value * float(1 + vary(constants.value)))

    palette = [colour(*usual) for usual in sweet.palette]
    palette += [np.zeros(3)] * (4 - len(palette))
    brightness = BRIGHTNESS * ([constants.lamps] * 4 + [constants.ambient])
    brightness *= 1 + vary(constants.brightness, 5, rng=light_rng)
    brightness[:, :4] += light_rng.uniform(0, constants.stray, 4)
    return Look(
        position=vary(constants.position * sweet.shift, 2),
        rotation=sweet.rotation + vary(constants.rotation * sweet.turn),
        scale=1 + vary(constants.scale),
        shape=vary(constants.shape, 4),
        phase=vary(constants.phase),
        palette=np.array(palette, np.float32),
        belt_shift=vary(constants.belt_shift),
        blotches=np.array(constants.blotches, np.float32),
        blotch_offset=light_rng.uniform(-1, 1, 3).astype(np.float32),
        brightness=brightness.astype(np.float32),
        lamp=np.array(lamp, np.float32) if lamp else None,
        recipe=sweet.recipe,
    )


def linear_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert a screen colour (hue, saturation, value) to linear RGB, shape (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0))) ** 2.2


def defects(
    kinds: tuple[str, ...], good: Surface, size: int, constants: Constants, rng: np.random.Generator
) -> Defects:
    """Draw defects on clearly visible parts of a good instance.

    Args:
        kinds: Kinds of defect from KINDS, without repetition.
        good: Visible surface of the good instance.
        size: Side of the image in pixels.
        constants: Constants of the renderer's version.
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
        low, high = np.log(constants.tiny_area if rng.random() < constants.tiny_share else constants.area)
        area = np.exp(rng.uniform(low, high)) * size**2 / len(kinds) ** 0.5
        radius = good.depth[pixel] / (FOCAL * size) * np.sqrt(area / (np.pi * good.facing[pixel]))
        aspect, angle = np.sqrt(rng.uniform(*constants.aspect)), rng.uniform(0, np.pi)
        height = np.clip(rng.uniform(*constants.relief) * radius, *constants.relief_limits)
        normal = good.local_normal[:, pixel]
        side = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
        side /= np.linalg.norm(side)
        side = np.cos(angle) * side + np.sin(angle) * np.cross(normal, side)
        axes = side / (radius * aspect), np.cross(normal, side) / (radius / aspect), normal / (radius + 2 * height)
        drawn.centre[slot] = good.local_point[:, pixel]
        drawn.axes[slot] = axes
        drawn.amount[slot] = (height, height, rng.uniform(*constants.stain), rng.uniform(*constants.crease))[slot]
        drawn.outline[slot] = rng.uniform(-constants.uneven, constants.uneven, 2)
        if kind == "colors":
            drawn.stain[:] = stain(np.asarray(good.albedo[:, pixel]), constants.contrast, rng)
    return drawn


def stain(albedo: np.ndarray, contrast: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a linear RGB colour (3,) that stands out from the surface's albedo (3,) by at least the contrast."""
    while True:
        colour = linear_rgb(rng.random(), rng.uniform(0.45, 0.9), rng.uniform(0.25, 0.9))
        if np.abs(colour ** (1 / 2.2) - albedo ** (1 / 2.2)).max() >= contrast:
            return colour
