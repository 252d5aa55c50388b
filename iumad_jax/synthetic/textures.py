"""Random textures for synthetic defects: four kinds of coloured patterns, and other images.

DRAEM and DeSTSeg take photographs of textures instead (DTD, Cimpoi et al., 2014).
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iumad_jax.shapes import Image
from iumad_jax.synthetic import draws, perlin

_CONTRAST = 64  # least difference between the first and the last colour of a pattern, in every channel
_GRATINGS = 3  # largest number of sinusoids
_CELLS = (16, 64)  # smallest and largest number of cells
_OCTAVES = 4
_PERMUTATIONS = np.array(list(itertools.permutations(range(3))))
_LEVELS = 33  # quantiles of a pattern between which its colours are interpolated


def texture(key: Key[Array, ""], size: int, other: Image | None) -> Image:
    """Draw a texture of `size` x `size` pixels, 0..255; all families are equally likely.

    Args:
        key: Random key.
        size: Side of the texture in pixels.
        other: Another image of this size for the last family; None leaves out that family.
    """
    shapes = (), (12,), (_OCTAVES, perlin.NODES, perlin.NODES), (_CELLS[1], 3), (size, size), (), (5, 3), (4,)
    family, u, lattices, cells, white, number, colours, changes = draws.uniform(key, *shapes)
    patterns = [  # share random numbers, as only one of them is shown
        lambda: _spectral_noise(u, white),
        lambda: _gratings(u, lattices, size),
        lambda: _cells(u, cells, size),
        lambda: _octaves(u, lattices, size),
    ]
    index = draws.below(family, len(patterns) + (other is not None))
    coloured = _colour(number, colours, jax.lax.switch(jnp.minimum(index, len(patterns) - 1), patterns))
    return coloured if other is None else jnp.where(index < len(patterns), coloured, _rearrange(changes, other))


def _spectral_noise(u: Float[Array, " k"], white: Float[Array, "s s"]) -> Float[Array, "s s"]:
    """Filter white noise: its amplitude falls with frequency by a random power, stretched along a random direction."""
    power, stretch, angle = draws.between(u[0], 0, 2.5), draws.log_between(u[1], 1, 8), jnp.pi * u[2]
    y, x = jnp.meshgrid(jnp.fft.fftfreq(len(white)), jnp.fft.rfftfreq(len(white)), indexing="ij")
    along, across = jnp.cos(angle) * x + jnp.sin(angle) * y, jnp.cos(angle) * y - jnp.sin(angle) * x
    frequency = jnp.hypot(along * stretch, across)
    amplitude = jnp.where(frequency > 0, jnp.where(frequency > 0, frequency, 1) ** -power, 0)
    return jnp.fft.irfft2(jnp.fft.rfft2(white) * amplitude, white.shape)


def _gratings(u: Float[Array, " k"], lattices: Float[Array, "o n n"], size: int) -> Float[Array, "s s"]:
    """Add one to three sinusoids warped by Perlin noise, half of the time with sharp edges.

    Their wavelengths are 4 to 64 pixels, at most half of the image.
    """
    number, amount, sharp = 1 + draws.below(u[0], _GRATINGS), draws.between(u[1], 0, 16), u[2] < 0.5
    waves, angles, phases = u[3:12].reshape(3, _GRATINGS)
    frequencies, angles = 2 * jnp.pi / draws.log_between(waves, 4, min(64, size / 2)), jnp.pi * angles
    y, x = jnp.stack(perlin.pixel_grid(size)) + amount * _noise(lattices[:2], jnp.full(2, 4.0), size)

    def grating(i: Int[Array, ""]) -> Float[Array, "s s"]:
        along = jnp.cos(angles[i]) * x + jnp.sin(angles[i]) * y
        return jnp.where(i < number, jnp.sin(frequencies[i] * along + 2 * jnp.pi * phases[i]), 0)

    pattern = jax.vmap(grating)(jnp.arange(_GRATINGS)).sum(0)
    return jnp.where(sharp, jnp.sign(pattern), pattern)


def _cells(u: Float[Array, " k"], cells: Float[Array, "c 3"], size: int) -> Float[Array, "s s"]:
    """Divide the image among random points: each pixel has its nearest point's value, or the distance from it."""
    fewest, most = _CELLS
    number = fewest + draws.below(u[0], most + 1 - fewest)
    y, x = perlin.pixel_grid(size)

    def closer(i: Int[Array, ""], nearest: tuple[Array, Array]) -> tuple[Array, Array]:
        distance, value = nearest
        to_point = jnp.hypot(y - size * cells[i, 0], x - size * cells[i, 1])
        return jnp.minimum(distance, to_point), jnp.where(to_point < distance, cells[i, 2], value)

    start = jnp.full((size, size), jnp.inf), jnp.zeros((size, size))
    distance, value = jax.lax.fori_loop(0, number, closer, start)
    return jnp.where(u[1] < 0.5, value, distance)


def _octaves(u: Float[Array, " k"], lattices: Float[Array, "o n n"], size: int) -> Float[Array, "s s"]:
    """Add four octaves of Perlin noise; half of the patterns are folded at 0, which makes veins."""
    scales = 2.0 ** jnp.arange(_OCTAVES)
    octaves = _noise(lattices, draws.log_between(u[0], 1, 4) * scales, size)
    pattern = (octaves / scales[:, None, None]).sum(0)
    return jnp.where(u[1] < 0.5, jnp.abs(pattern), pattern)


def _noise(lattices: Float[Array, "o n n"], cells: Float[Array, " o"], size: int) -> Float[Array, "o s s"]:
    """Compute Perlin noise on lattices of `cells` x `cells` cells, at most 32 each."""
    rows, columns = perlin.pixel_grid(size)

    def noise(octave: tuple[Float[Array, "n n"], Float[Array, ""]]) -> Float[Array, "s s"]:
        lattice, cells = octave
        return perlin.gradient_noise(2 * jnp.pi * lattice, rows * cells / size, columns * cells / size)

    return jax.lax.map(noise, (lattices, cells))


def _colour(number: Float[Array, ""], u: Float[Array, "5 3"], pattern: Float[Array, "s s"]) -> Image:
    """Colour a pattern by its quantiles with a blend of two to four random colours."""
    last = 1 + draws.below(number, 3)
    second = (255 * u[0] + draws.between(u[1], _CONTRAST, 255 - _CONTRAST)) % 255
    colours = jnp.stack([255 * u[0], *(jnp.where(last == i, second, 255 * u[i + 1]) for i in (1, 2, 3))])
    levels = jnp.linspace(0, 1, _LEVELS)
    quantiles = jnp.quantile(pattern[::4, ::4], levels)  # of every 16th pixel, since sorting all takes long
    rank = jnp.interp(quantiles, quantiles, levels)  # equal for equal quantiles
    position = jnp.interp(pattern, quantiles, last * (rank - rank[0]) / (rank[-1] - rank[0]))
    shares = jnp.maximum(1 - jnp.abs(position[..., None] - jnp.arange(4.0)[None, None]), 0)
    return (shares[..., None] * colours[None, None]).sum(2)


def _rearrange(u: Float[Array, "4"], image: Image) -> Image:
    """Mirror an image, turn it by a multiple of 90 degrees and permute its channels, at random."""
    image = image[..., jnp.asarray(_PERMUTATIONS)[draws.below(u[3], len(_PERMUTATIONS))]]
    changes: list[Callable[[Image], Image]] = [jnp.flipud, jnp.fliplr, lambda image: jnp.swapaxes(image, 0, 1)]
    for i, change in enumerate(changes):
        image = jnp.where(u[i] < 0.5, change(image), image)
    return image
