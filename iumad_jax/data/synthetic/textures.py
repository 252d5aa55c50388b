"""Random textures for synthetic defects: four kinds of coloured patterns, and other images.

DRAEM and DeSTSeg take photographs of textures instead (DTD, Cimpoi et al., 2014).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from iumad_jax.data.synthetic import perlin
from iumad_jax.shapes import Image

FAMILIES = ("spectral noise", "gratings", "cells", "octaves", "another image")

_CONTRAST = 64  # least difference between the first and the last colour of a pattern, in every channel
_GRATINGS = 3  # largest number of sinusoids
_CELLS = (16, 64)  # smallest and largest number of cells
_LEVELS = 33  # quantiles of a pattern between which its colours are interpolated


def texture(key: Key[Array, ""], size: int, other: Image | None) -> Image:
    """Draw a texture of `size` x `size` pixels, 0..255; all families are equally likely.

    Args:
        key: Random key.
        size: Side of the texture in pixels.
        other: Another image of this size for the last family; None leaves out that family.
    """
    family_key, texture_key = jax.random.split(key)
    families = len(FAMILIES) - (other is None)
    return of_family(texture_key, jax.random.randint(family_key, (), 0, families), size, other)


def of_family(key: Key[Array, ""], family: Int[Array, ""], size: int, other: Image | None) -> Image:
    """Draw a texture of the family with this index in FAMILIES; see `texture`."""
    pattern_key, colour_key, turn_key = jax.random.split(key, 3)
    patterns = [lambda key, draw=draw: draw(key, size) for draw in (_spectral_noise, _gratings, _cells, _octaves)]
    coloured = _colour(colour_key, jax.lax.switch(jnp.minimum(family, len(patterns) - 1), patterns, pattern_key))
    return coloured if other is None else jnp.where(family < len(patterns), coloured, _rearrange(turn_key, other))


def _spectral_noise(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Draw noise whose amplitude falls with frequency by a random power, stretched along a random direction."""
    noise_key, power_key, stretch_key, angle_key = jax.random.split(key, 4)
    power = jax.random.uniform(power_key, maxval=2.5)
    stretch = log_uniform(stretch_key, 1, 8)
    angle = jax.random.uniform(angle_key, maxval=jnp.pi)
    y, x = jnp.meshgrid(jnp.fft.fftfreq(size), jnp.fft.rfftfreq(size), indexing="ij")
    along, across = jnp.cos(angle) * x + jnp.sin(angle) * y, jnp.cos(angle) * y - jnp.sin(angle) * x
    frequency = jnp.hypot(along * stretch, across)
    amplitude = jnp.where(frequency > 0, jnp.where(frequency > 0, frequency, 1) ** -power, 0)
    return jnp.fft.irfft2(jnp.fft.rfft2(jax.random.normal(noise_key, (size, size))) * amplitude, (size, size))


def _gratings(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Add one to three sinusoids warped by Perlin noise, half of the time with sharp edges.

    Their wavelengths are 4 to 64 pixels, at most half of the image.
    """
    number_key, wave_key, angle_key, phase_key, sharp_key, amount_key, *warp_keys = jax.random.split(key, 8)
    number = jax.random.randint(number_key, (), 1, _GRATINGS + 1)
    frequency = 2 * jnp.pi / log_uniform(wave_key, 4, min(64, size / 2), (_GRATINGS,))
    angle = jax.random.uniform(angle_key, (_GRATINGS,), maxval=jnp.pi)
    phase = jax.random.uniform(phase_key, (_GRATINGS,), maxval=2 * jnp.pi)
    amount = jax.random.uniform(amount_key, maxval=16)
    y, x = (
        grid + amount * _octave(key, size, jnp.float32(4))
        for grid, key in zip(perlin.pixel_grid(size), warp_keys, strict=True)
    )
    pattern = sum(
        jnp.where(i < number, jnp.sin(frequency[i] * (jnp.cos(angle[i]) * x + jnp.sin(angle[i]) * y) + phase[i]), 0)
        for i in range(_GRATINGS)
    )
    return jnp.where(jax.random.bernoulli(sharp_key), jnp.sign(pattern), pattern)


def _cells(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Divide the image among random points: each pixel has its nearest point's value, or the distance from it."""
    number_key, point_key, value_key, kind_key = jax.random.split(key, 4)
    fewest, most = _CELLS
    number = jax.random.randint(number_key, (), fewest, most + 1)
    points = jax.random.uniform(point_key, (most, 2), maxval=size)
    values = jax.random.uniform(value_key, (most,))
    y, x = perlin.pixel_grid(size)

    def closer(i: Int[Array, ""], nearest: tuple[Array, Array]) -> tuple[Array, Array]:
        distance, value = nearest
        to_point = jnp.hypot(y - points[i, 0], x - points[i, 1])
        return jnp.minimum(distance, to_point), jnp.where(to_point < distance, values[i], value)

    start = jnp.full((size, size), jnp.inf), jnp.zeros((size, size))
    distance, value = jax.lax.fori_loop(0, number, closer, start)
    return jnp.where(jax.random.bernoulli(kind_key), value, distance)


def _octaves(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Add four octaves of Perlin noise; half of the patterns are folded at 0, which makes veins."""
    cells_key, fold_key, *octave_keys = jax.random.split(key, 6)
    cells = log_uniform(cells_key, 1, 4)
    pattern = sum(_octave(octave_keys[i], size, cells * 2**i) / 2**i for i in range(4))
    return jnp.where(jax.random.bernoulli(fold_key), jnp.abs(pattern), pattern)


def _octave(key: Key[Array, ""], size: int, cells: Float[Array, ""]) -> Float[Array, "s s"]:
    """Draw Perlin noise on a lattice of `cells` x `cells` cells, at most 32."""
    rows, columns = perlin.pixel_grid(size)
    return perlin.gradient_noise(perlin.random_angles(key), rows * cells / size, columns * cells / size)


def _colour(key: Key[Array, ""], pattern: Float[Array, "s s"]) -> Image:
    """Colour a pattern by its quantiles with a blend of two to four random colours."""
    number_key, first_key, step_key, rest_key = jax.random.split(key, 4)
    last = jax.random.randint(number_key, (), 1, 4)
    first = jax.random.uniform(first_key, (1, 3), maxval=255)
    second = (first + jax.random.uniform(step_key, (1, 3), minval=_CONTRAST, maxval=255 - _CONTRAST)) % 255
    colours = jnp.concatenate([first, jax.random.uniform(rest_key, (3, 3), maxval=255)]).at[last].set(second[0])
    levels = jnp.linspace(0, 1, _LEVELS)
    quantiles = jnp.quantile(pattern[::4, ::4], levels)  # of every 16th pixel, since sorting all takes long
    rank = jnp.interp(quantiles, quantiles, levels)  # equal for equal quantiles
    position = last * (rank - rank[0]) / (rank[-1] - rank[0])

    def channel(values: Float[Array, "4"]) -> Float[Array, "s s"]:
        return jnp.interp(pattern, quantiles, jnp.interp(position, jnp.arange(4.0), values))

    return jax.vmap(channel, in_axes=1, out_axes=-1)(colours)


def _rearrange(key: Key[Array, ""], image: Image) -> Image:
    """Mirror an image, turn it by a multiple of 90 degrees and permute its channels, at random."""
    channel_key, *keys = jax.random.split(key, 4)
    image = image[..., jax.random.permutation(channel_key, 3)]
    changes: list[Callable[[Image], Image]] = [jnp.flipud, jnp.fliplr, lambda image: jnp.swapaxes(image, 0, 1)]
    for key, change in zip(keys, changes, strict=True):
        image = jnp.where(jax.random.bernoulli(key), change(image), image)
    return image


def log_uniform(key: Key[Array, ""], low: float, high: float, shape: tuple[int, ...] = ()) -> Array:
    """Draw numbers between two bounds whose logarithm is uniform."""
    return jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(low), maxval=jnp.log(high)))
