"""Perlin noise on a randomly turned lattice, as DRAEM (Zavrtanik et al., 2021) and DeSTSeg use it for defect masks."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from iumad_jax.synthetic import draws

NODES = 33  # lattice nodes per side: 2^5 cells and one more node
EXPONENTS = 6  # the number of cells per side is 2 to the power of 0, ..., 5


class Lattice(NamedTuple):
    """Lattice of Perlin noise."""

    angles: Float[Array, "n n"]  # direction of the gradient at each node, radians from the columns' to the rows'
    cells: Int[Array, " 2"]  # cells per image side, along rows and along columns
    turn: Float[Array, ""]  # angle of the lattice about the centre of the image, radians


def noise(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Draw Perlin noise of `size` x `size` pixels; values above 0.5 cover 5 % of them on average."""
    return on_lattice(random_lattice(key), size)


def random_lattice(key: Key[Array, ""]) -> Lattice:
    """Draw a lattice of 2^a x 2^b cells with independent a and b from 0 to 5, turned by up to 90 degrees."""
    angles, exponents, turn = draws.uniform(key, (NODES, NODES), (2,), ())
    cells = 1 << draws.below(exponents, EXPONENTS)
    return Lattice(2 * jnp.pi * angles, cells, draws.between(turn, -jnp.pi / 2, jnp.pi / 2))


def on_lattice(lattice: Lattice, size: int) -> Float[Array, "s s"]:
    """Compute Perlin noise of `size` x `size` pixels, which is 0 outside of the turned lattice."""
    cosine, sine, centre = jnp.cos(lattice.turn), jnp.sin(lattice.turn), (size - 1) / 2
    y, x = (pixels - centre for pixels in pixel_grid(size))
    rows, columns = cosine * y - sine * x + centre, sine * y + cosine * x + centre
    inside = (jnp.minimum(rows, columns) >= 0) & (jnp.maximum(rows, columns) <= size - 1)
    rows, columns = (rows * lattice.cells[0] / size, columns * lattice.cells[1] / size)
    return jnp.where(inside, gradient_noise(lattice.angles, rows, columns), 0)


def gradient_noise(
    angles: Float[Array, "n n"], rows: Float[Array, "s s"], columns: Float[Array, "s s"]
) -> Float[Array, "s s"]:
    """Interpolate Perlin noise (Perlin, "Improving Noise", 2002) between the nodes of a lattice.

    Args:
        angles: See `Lattice`.
        rows: Row of each pixel on the lattice, at least 0 and below n - 1.
        columns: Column of each pixel on the lattice, at least 0 and below n - 1.
    """
    row, column = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    v, u = rows - row, columns - column
    nodes = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    corners = jnp.stack([nodes[:-1, :-1], nodes[:-1, 1:], nodes[1:, :-1], nodes[1:, 1:]], axis=2)  # of each cell
    gradients = corners[row, column]  # a single gather is six times as fast as one per corner

    def corner(i: int, j: int) -> Float[Array, "s s"]:
        gradient = gradients[:, :, 2 * i + j]
        return gradient[..., 0] * (u - j) + gradient[..., 1] * (v - i)

    above, below = (corner(i, 0) + _fade(u) * (corner(i, 1) - corner(i, 0)) for i in (0, 1))
    return jnp.sqrt(2.0) * (above + _fade(v) * (below - above))


def pixel_grid(size: int) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    """Return the row and the column of every pixel."""
    pixels = jnp.arange(size, dtype=jnp.float32)
    rows, columns = jnp.meshgrid(pixels, pixels, indexing="ij")
    return rows, columns


def _fade(t: Float[Array, "s s"]) -> Float[Array, "s s"]:
    return t**3 * (t * (6 * t - 15) + 10)
