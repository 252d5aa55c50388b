"""The reconstruction transformer compared with loops in float64, written from the papers of UniAD and IUF."""

import jax
import numpy as np
import pytest
from scipy.stats import kstest

from iumad_jax.models.layers import FeedForward
from iumad_jax.models.reconstruction import ReconstructionTransformer, neighbour_mask


def feed_forward(naive, p, x):
    return naive.dense(p["output"], np.maximum(naive.dense(p["hidden"], x), 0))


def positions(p, grid):
    """Concatenate, for token (i, j), row i of the row table and row j of the column table."""
    row, column = p["row_position"], p["column_position"]
    return np.stack(
        [np.concatenate([row[i, 0], column[0, j]]) for i in range(grid) for j in range(grid)],
    )


def allowed_beyond_neighbours(grid, reach=3):
    allowed = np.ones((grid * grid, grid * grid), bool)
    for i, j in np.ndindex(grid, grid):
        for y in range(max(i - reach, 0), min(i + reach + 1, grid)):
            for x in range(max(j - reach, 0), min(j + reach + 1, grid)):
                allowed[i * grid + j, y * grid + x] = False
    return allowed


def transformer(naive, p, tokens, condition, grid, layers, allowed=None):
    norm, attention = naive.layer_norm, naive.attention
    pos = positions(p, grid)
    x = naive.dense(p["embed"], tokens)
    for i in range(layers):
        name = f"encoder_{i}"
        x = norm(
            p[f"{name}_norm_1"], x + attention(p[f"{name}_attention"], (x + pos) * condition[i], x + pos, x, allowed)
        )
        x = norm(p[f"{name}_norm_2"], x + feed_forward(naive, p[f"{name}_feed_forward"], x))
    memory, previous, outputs = x, x, []
    for i in range(layers):
        name = f"decoder_{i}"
        query = p[f"{name}_query"]
        first = attention(p[f"{name}_attention_1"], query + pos, memory + pos, memory, allowed)
        query = norm(p[f"{name}_norm_1"], query + first)
        second = attention(p[f"{name}_attention_2"], query + pos, previous + pos, previous, allowed)
        query = norm(p[f"{name}_norm_2"], query + second)
        previous = norm(p[f"{name}_norm_3"], query + feed_forward(naive, p[f"{name}_feed_forward"], query))
        outputs.append(norm(p["final_norm"], previous))
    return outputs


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("grid", "hide_neighbours", "conditioned"), [(3, False, True), (3, False, False), (8, True, True)]
)
def test_transformer(naive, grid, hide_neighbours, conditioned):
    layers = 2
    network = ReconstructionTransformer(
        grid, width=8, heads=2, layers=layers, hidden=10, hide_neighbours=hide_neighbours
    )
    tokens = random(grid * grid, 5)
    condition = tuple(random(grid * grid, 8, seed=i) for i in range(layers)) if conditioned else None
    params, exact = naive.parameters(network, tokens, condition, deterministic=True)
    outputs = jax.jit(lambda p: network.apply({"params": p}, tokens, condition, deterministic=True))(params)
    expected = transformer(
        naive,
        exact,
        tokens.astype(np.float64),
        condition or np.ones(layers),
        grid,
        layers,
        allowed_beyond_neighbours(grid) if hide_neighbours else None,
    )
    assert len(outputs) == layers
    for actual, reference in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", [8, 14])
def test_neighbour_mask_hides_seven_by_seven(grid):
    np.testing.assert_array_equal(neighbour_mask(grid), allowed_beyond_neighbours(grid))


@pytest.mark.slow
def test_dropout_applies_to_every_branch(naive):
    """With dropout 1, only the residual streams remain: the outputs are the normalised queries for any image."""
    network = ReconstructionTransformer(grid=3, width=8, heads=2, layers=2, hidden=10, dropout=1.0)
    tokens, condition = random(9, 5), (random(9, 8),) * 2
    params, p = naive.parameters(network, tokens, condition, deterministic=True)
    outputs = network.apply(
        {"params": params}, tokens, condition, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    for i, output in enumerate(outputs):
        x = p[f"decoder_{i}_query"]
        for norm in (f"decoder_{i}_norm_1", f"decoder_{i}_norm_2", f"decoder_{i}_norm_3", "final_norm"):
            x = naive.layer_norm(p[norm], x)
        np.testing.assert_allclose(output, x, rtol=1e-4, atol=1e-4)


def test_dropout_applies_to_hidden_units():
    identity = {"kernel": np.eye(64, dtype=np.float32), "bias": np.zeros(64, np.float32)}
    x = FeedForward(hidden=64, dropout=0.1).apply(
        {"params": {"hidden": identity, "output": identity}},
        np.ones((64, 64), np.float32),
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
    )
    kept = np.asarray(x) > 0.5
    np.testing.assert_allclose(x[kept], 1 / 0.9, rtol=1e-5)
    np.testing.assert_allclose(x[~kept], 0, atol=1e-6)
    assert abs((~kept).mean() - 0.1) < 0.02


@pytest.mark.slow
def test_parameters_are_initialised_as_in_uniad():
    network = ReconstructionTransformer(grid=6, width=64, layers=1, hidden=128)
    tokens = np.zeros((36, 48), np.float32)
    params = jax.jit(lambda key: network.init(key, tokens, deterministic=True))(jax.random.key(0))["params"]
    for kernel, fan_in, fan_out in [
        (params["embed"]["kernel"], 48, 64),
        (params["encoder_0_feed_forward"]["hidden"]["kernel"], 64, 128),
        (params["encoder_0_attention"]["query"]["kernel"], 64, 64),
    ]:
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert np.abs(kernel).max() <= bound
        assert kstest(np.ravel(kernel), "uniform", (-bound, 2 * bound)).pvalue > 0.01
    query = np.asarray(params["decoder_0_query"])
    assert query.shape == (36, 64)
    assert kstest(query.ravel(), "norm").pvalue > 0.01
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "bias"]
    assert all((leaf == 0).all() for leaf in biases)
