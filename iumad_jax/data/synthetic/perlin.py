"""Perlin noise on a randomly turned lattice, as DRAEM (Zavrtanik et al., 2021) and DeSTSeg use it for defect masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

NODES = 33  # lattice nodes per side: 2^5 cells and one more node
EXPONENTS = 6  # the number of cells per side is 2 to the power of 0, ..., 5


def noise(key: Key[Array, ""], size: int) -> Float[Array, "s s"]:
    """Draw Perlin noise of `size` x `size` pixels.

    The lattice has 2^a x 2^b cells with independent a and b, is turned by up to 90 degrees about the centre of the
    image, and the noise is 0 outside of it. Values above 0.5 cover 5 % of the image on average.
    """
    cells_key, angle_key, turn_key = jax.random.split(key, 3)
    cells = 2 ** jax.random.randint(cells_key, (2,), 0, EXPONENTS)
    turn = jax.random.uniform(turn_key, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    centre = (size - 1) / 2
    y, x = pixel_grid(size)
    rows = jnp.cos(turn) * (y - centre) - jnp.sin(turn) * (x - centre) + centre
    columns = jnp.sin(turn) * (y - centre) + jnp.cos(turn) * (x - centre) + centre
    inside = (jnp.minimum(rows, columns) >= 0) & (jnp.maximum(rows, columns) <= size - 1)
    values = gradient_noise(random_angles(angle_key), rows * cells[0] / size, columns * cells[1] / size)
    return jnp.where(inside, values, 0)


def gradient_noise(
    angles: Float[Array, "n n"], rows: Float[Array, "s s"], columns: Float[Array, "s s"]
) -> Float[Array, "s s"]:
    """Interpolate Perlin noise (Perlin, "Improving Noise", 2002) between the nodes of a lattice.

    Args:
        angles: Direction of the gradient at each node, radians from the direction of columns to that of rows.
        rows: Row of each pixel on the lattice, from 0 to n - 1.
        columns: Column of each pixel on the lattice, from 0 to n - 1.
    """
    row, column = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    v, u = rows - row, columns - column
    gradient_u, gradient_v = jnp.cos(angles), jnp.sin(angles)

    def corner(i: int, j: int) -> Float[Array, "s s"]:
        node = row + i, column + j
        return gradient_u[node] * (u - j) + gradient_v[node] * (v - i)

    above, below = (corner(i, 0) + _fade(u) * (corner(i, 1) - corner(i, 0)) for i in (0, 1))
    return jnp.sqrt(2.0) * (above + _fade(v) * (below - above))


def random_angles(key: Key[Array, ""]) -> Float[Array, "n n"]:
    """Draw the directions of the gradients of a lattice."""
    return jax.random.uniform(key, (NODES, NODES), maxval=2 * jnp.pi)


def pixel_grid(size: int) -> tuple[Float[Array, "s s"], Float[Array, "s s"]]:
    """Return the row and the column of every pixel."""
    pixels = jnp.arange(size, dtype=jnp.float32)
    rows, columns = jnp.meshgrid(pixels, pixels, indexing="ij")
    return rows, columns


def _fade(t: Float[Array, "s s"]) -> Float[Array, "s s"]:
    return t**3 * (t * (6 * t - 15) + 10)
