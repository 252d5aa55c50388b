"""Perlin noise against its definition, a closed form, and facts counted over DRAEM's noise at 256 pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from iumad_jax.synthetic import perlin

SIZE = 64
DRAWS = 2000
KEYS = jax.random.split(jax.random.key(0), DRAWS)


@pytest.fixture(scope="module")
def lattices():
    return jax.jit(jax.vmap(perlin.random_lattice))(KEYS)


@pytest.fixture(scope="module")
def noise(lattices):
    return noise_on(lattices)


def noise_on(lattices, size=SIZE):
    """Compute noise (n s s) on n lattices."""
    return np.asarray(_noise_on(lattices, size))


@functools.partial(jax.jit, static_argnums=1)
def _noise_on(lattices, size):
    return jax.vmap(lambda lattice: perlin.on_lattice(lattice, size))(lattices)


def by_definition(angles, cells, turn, size):
    """Compute noise pixel by pixel in float64."""
    angles, result, centre = np.asarray(angles, np.float64), np.zeros((size, size)), (size - 1) / 2

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    for y, x in np.ndindex(size, size):
        offset = (x - centre) + 1j * (y - centre)
        turned = offset * np.exp(-1j * turn) + centre * (1 + 1j)  # the lattice's position at this pixel
        if min(turned.real, turned.imag) < 0 or max(turned.real, turned.imag) > size - 1:
            continue
        row, column = turned.imag * cells[0] / size, turned.real * cells[1] / size
        for i in (int(row), int(row) + 1):
            for j in (int(column), int(column) + 1):
                product = np.cos(angles[i, j]) * (column - j) + np.sin(angles[i, j]) * (row - i)
                result[y, x] += np.sqrt(2) * product * (1 - fade(abs(row - i))) * (1 - fade(abs(column - j)))
    return result


@pytest.mark.parametrize(("cells", "turn"), [((1, 1), 0.0), ((4, 32), 0.0), ((8, 2), 0.4), ((32, 16), -1.2)])
@pytest.mark.parametrize("size", [24, 37])  # the lattice need not divide the size
def test_noise_by_its_definition(cells, turn, size):
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (33, 33)).astype(np.float32)
    lattices = perlin.Lattice(*(np.array(value)[None] for value in (angles, cells, np.float32(turn))))
    values = noise_on(lattices, size)[0]
    expected = by_definition(angles, cells, turn, size)
    outline = (values == 0) != (expected == 0)  # rounding may move a pixel over the edge of the turned lattice
    assert outline.sum() <= 2
    np.testing.assert_allclose(values, np.where(outline, values, expected), atol=2e-5)


def test_noise_is_0_at_nodes_and_has_a_closed_form_for_equal_gradients():
    rows, columns = perlin.pixel_grid(SIZE)
    noise = jax.jit(perlin.gradient_noise)
    assert not noise(np.random.default_rng(0).uniform(0, 7, (33, 33)).astype(np.float32), rows // 2, columns // 2).any()
    f = np.linspace(0, 1, 64, endpoint=False)
    expected = np.sqrt(2) * (f - (6 * f**5 - 15 * f**4 + 10 * f**3))
    values = noise(jnp.zeros((33, 33)), rows / 64 * 7, columns / 64 + 3)
    np.testing.assert_allclose(values, np.broadcast_to(expected, (SIZE, SIZE)), atol=1e-5)


def test_lattices_are_drawn_uniformly(lattices):
    exponents = np.log2(lattices.cells).astype(int)
    counts = np.bincount(exponents @ [6, 1], minlength=36)
    assert len(counts) == 36
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(lattices.turn, stats.uniform(-np.pi / 2, np.pi).cdf).pvalue > 1e-3
    assert stats.kstest(np.ravel(lattices.angles[:50]), stats.uniform(0, 2 * np.pi).cdf).pvalue > 1e-3


def within(values, expected, tolerance=0.0):
    """Return whether a mean is within three standard errors of the expected value, which is known to a tolerance."""
    return abs(np.mean(values) - expected) < tolerance + 3 * np.std(values) / np.sqrt(len(values))


def test_facts_about_masks(lattices, noise):
    areas = (noise > 0.5).mean((1, 2))
    assert within(areas, 0.0485, 3 * 0.0008)
    spread = (areas - areas.mean()) ** 2  # its mean is the variance
    assert within(spread, 0.030**2, 0.00006)
    assert within(areas == 0, 0.055, 0.005)
    single = noise_on(lattices._replace(cells=jnp.ones_like(lattices.cells)))
    assert within((single != 0).mean((1, 2)), 0.883, 0.015)  # at 64 pixels, the edge has some weight


def test_facts_about_noise_before_the_turn(lattices):
    noise = noise_on(lattices._replace(turn=jnp.zeros(DRAWS)))
    assert within((noise > 0.5).mean((1, 2)), 0.0545, 0.0015)
    assert within((noise**2).mean((1, 2)), 0.30**2, 0.003)


def test_noise_differs_between_images_but_not_between_devices(noise):
    mesh = jax.make_mesh((4,), ("device",))
    on_four = jax.device_put(KEYS[:8], NamedSharding(mesh, PartitionSpec("device")))
    drawn = jax.jit(jax.vmap(lambda key: perlin.noise(key, SIZE)))(on_four)
    np.testing.assert_allclose(drawn, noise[:8], atol=1e-5)
    assert len({image.tobytes() for image in noise}) == DRAWS
